"""Reported equals actual: the process against the kernel's tables, several cards, and an NVML that is odd or dies."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from steadyvsr.memory.ledger import Ledger
from steadyvsr.memory.nvml import Nvml
from steadyvsr.memory.offload import Subject, Verdict, offload
from steadyvsr.memory.probe import DeviceProbe, tracking
from steadyvsr.memory.reading import Reading
from steadyvsr.memory.tracker import tensor_bytes
from steadyvsr.tests.memory.doubles import GIB, MIB, FakeCard, FakeCuda, FakeNvml, NVMLError

SMAPS = Path("/proc/self/smaps_rollup")
OWN = 100
BALLAST = 200 * MIB


def kernel_bytes(table: Path, *words: str) -> int:
    """The sum of some rows of one of the kernel's tables of this process, which are in kB."""
    text = table.read_text()
    return sum(int(re.search(rf"^{word}:\s+(\d+) kB", text, re.M).group(1)) * 1024 for word in words)


def close(first: int, second: int) -> bool:
    return abs(first - second) <= max(32 * MIB, second // 10)


@pytest.mark.skipif(not SMAPS.is_file(), reason="this system has no smaps")
def test_process_bytes_are_the_private_pages_of_smaps_in_the_same_moment() -> None:
    def both() -> tuple[int, int]:
        reading = DeviceProbe().sample("cpu", settled=True)
        assert reading.process.source == "USS"
        return reading.process.bytes, kernel_bytes(SMAPS, "Private_Clean", "Private_Dirty", "Private_Hugetlb")

    without = both()
    ballast = torch.ones(BALLAST // 4)
    held = both()
    assert close(*without) and close(*held), (without, held)
    assert abs((held[0] - without[0]) - ballast.nbytes) <= 8 * MIB


@pytest.mark.skipif(not SMAPS.is_file(), reason="this system has no table of a process")
def test_without_the_right_to_read_private_pages_the_resident_size_is_the_kernel_s(monkeypatch) -> None:
    def denied(self):
        raise psutil.AccessDenied()

    monkeypatch.setattr(psutil.Process, "memory_full_info", denied)
    process = DeviceProbe().sample("cpu", settled=True).process
    assert process.source == "RSS" and "mapped" in process.note
    assert close(process.bytes, kernel_bytes(Path("/proc/self/status"), "VmRSS"))


def test_tensor_bytes_are_those_of_a_storage_tracker_through_a_network() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
    with torch.no_grad(), tracking() as tracker:
        kept = [network(torch.rand(1, 3, 256 + 32 * step, 256)) for step in range(6)]
        kept += [kept[0][:, :2], kept[1].transpose(1, 2)]
        reading = DeviceProbe(tracker=tracker).sample("cpu")
    actual = tensor_bytes(kept)
    assert actual > 5 * MIB
    assert abs(reading.allocated.bytes - actual) <= actual // 100 + MIB
    assert reading.peak.bytes > actual


def card(allocated: int, uuid: str, free: int = 10 * GIB) -> dict:
    return {
        "allocated": allocated, "peak": allocated + 1, "reserved": allocated + 2, "free": free, "total": 24 * GIB,
        "properties": {"uuid": uuid, "total_memory": 24 * GIB},
    }  # fmt: skip


def cuda(nvml: FakeNvml, *cards: dict) -> DeviceProbe:
    return DeviceProbe(SimpleNamespace(cuda=FakeCuda(list(cards)), version=SimpleNamespace(hip=None)), Nvml(nvml, OWN))


def test_each_number_belongs_to_its_card_though_nvml_counts_them_in_another_order() -> None:
    first = FakeCard("GPU-aaaa", 3 * GIB, 25 * GIB, {OWN: 1 * GIB})
    second = FakeCard("GPU-bbbb", 5 * GIB, 49 * GIB, {OWN: 2 * GIB, 4242: 7})
    for order in ([first, second], [second, first]):
        reader = cuda(FakeNvml(order), card(10 * MIB, "bbbb"), card(20 * MIB, "aaaa"))
        seen = [reader.sample(device) for device in ("cuda:0", "cuda:1")]
        numbers = [(r.allocated.bytes, r.used.bytes, r.total.bytes, r.process.bytes, len(r.others)) for r in seen]
        assert numbers == [
            (10 * MIB, 5 * GIB, 49 * GIB, 2 * GIB, 1), (20 * MIB, 3 * GIB, 25 * GIB, 1 * GIB, 0),
        ]  # fmt: skip


MIG = (FakeCard("MIG-i1", MIB, GIB), FakeCard("MIG-aaaa", 2 * MIB, 2 * GIB, {OWN: 30 * MIB}))
ODD = {
    "no number for our process": (FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {OWN: None}), 9 * GIB, None, "WDDM"),
    "a container's foreign pids": (FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {4242: GIB}), 9 * GIB, None, "no process"),
    "our pid, another process": (FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {OWN: 1}), 9 * GIB, None, "not this process"),
    "a MIG instance": (FakeCard("GPU-c", 9 * GIB, 25 * GIB, instances=MIG), 2 * MIB, 30 * MIB, ""),
    "another card only": (FakeCard("GPU-zzzz", 9 * GIB, 25 * GIB, {OWN: GIB}), 14 * GIB, None, "no card"),
}


@pytest.mark.parametrize(("nvml_card", "used", "process", "note"), ODD.values(), ids=ODD)
def test_an_odd_nvml_gives_true_numbers_or_none_and_a_word_about_it(nvml_card, used, process, note) -> None:
    reading = cuda(FakeNvml([nvml_card]), card(10 * MIB, "aaaa")).sample("cuda:0")
    assert (reading.used.bytes, reading.process.bytes) == (used, process)
    assert reading.allocated.bytes == 10 * MIB
    assert note in " ".join([reading.process.note, *reading.notes])


def test_two_xpu_cards_are_read_and_reset_each_by_itself() -> None:
    xpu = FakeCuda([card(MIB, ""), card(2 * MIB, "", free=20 * GIB)])
    reader = DeviceProbe(SimpleNamespace(xpu=xpu))
    seen = [reader.sample(f"xpu:{index}") for index in (1, 0)]
    assert [(r.allocated.bytes, r.used.bytes) for r in seen] == [(2 * MIB, 4 * GIB), (MIB, 14 * GIB)]
    reader.reset_peak(torch.device("xpu:1"))
    assert xpu.resets == [1]


def test_an_mps_that_tells_no_total_says_so() -> None:
    mps = SimpleNamespace(current_allocated_memory=lambda: 3, driver_allocated_memory=lambda: 9)
    reading = DeviceProbe(SimpleNamespace(mps=mps)).sample("mps")
    assert (reading.allocated.bytes, reading.process.bytes, reading.total.bytes) == (3, 9, None)
    assert "does not tell" in reading.total.note


class DyingNvml(FakeNvml):
    """An NVML whose driver goes away after some readings."""

    def __init__(self, cards: list[FakeCard], readings: int) -> None:
        super().__init__(cards)
        self.readings = readings

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard):
        self.readings -= 1
        if self.readings < 0:
            self.fails = "Driver/library version mismatch"
            raise NVMLError("GPU is lost")
        return super().nvmlDeviceGetMemoryInfo(card)


def test_an_nvml_that_dies_in_a_phase_leaves_a_marked_reading_and_torch_s_own_numbers() -> None:
    nvml = DyingNvml([FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {OWN: 5 * GIB})], readings=1)
    book = Ledger(cuda(nvml, card(10 * MIB, "aaaa")), ["cuda:0"])
    with book.phase("sample"):
        book.mark("step", step=1)
        book.mark("step", step=2)
    (ended,) = book.phases
    before, after = ended.before[0], ended.after[0]
    assert (before.process.bytes, before.used.source) == (5 * GIB, "NVML")
    assert (after.process.bytes, after.used.source) == (None, "torch.cuda.mem_get_info")
    assert after.allocated.bytes == 10 * MIB and not ended.failed
    notes = [" ".join(mark.reading.notes) for mark in book.marks]
    assert "GPU is lost" in notes[0] and "version mismatch" in notes[1]


def test_an_offload_during_which_nvml_dies_is_judged_by_torch_and_gives_the_driver_no_number() -> None:
    nvml = DyingNvml([FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {OWN: 7 * GIB})], readings=1)
    state = card(6 * GIB, "aaaa")
    reader = cuda(nvml, state)
    network = torch.nn.Linear(2, 2)

    def move() -> None:
        state.update(allocated=0, reserved=0)

    subject = Subject(
        "Wan", torch.device("cuda:0"), torch.device("cpu"), lambda: state["allocated"], move, network.named_parameters
    )
    receipt = offload(subject, lambda: None, reader=reader)
    assert (receipt.verdict, receipt.left_tensors) == (Verdict.FREED, 6 * GIB)
    assert receipt.left_driver.bytes is None and any("GPU is lost" in note for note in receipt.notes)
    assert isinstance(receipt.before, Reading) and receipt.before.process.bytes == 7 * GIB
