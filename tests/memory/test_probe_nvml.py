"""NVML readings: cards by identity, processes, containers, Windows, MIG, a library that dies."""

from __future__ import annotations

import pytest
from steadyvsr.memory.nvml import Nvml
from steadyvsr.tests.memory.doubles import GIB, MIB, FakeCard, FakeNvml, NVMLError

OWN = 100


def reader(*cards: FakeCard, pid: int = OWN) -> Nvml:
    return Nvml(FakeNvml(list(cards)), pid)


def test_reordered_cards_are_told_apart_by_uuid() -> None:
    first, second = FakeCard("GPU-aaaa", 1 * GIB, 8 * GIB), FakeCard("GPU-bbbb", 2 * GIB, 16 * GIB)
    for order in ((first, second), (second, first)):
        assert reader(*order).read("bbbb", None).used.bytes == 2 * GIB
        assert reader(*order).read("aaaa", None).total.bytes == 8 * GIB


def test_without_a_uuid_the_card_is_found_by_its_pci_address() -> None:
    cards = FakeCard("GPU-aaaa", GIB, 8 * GIB, pci="00000000:01:00.0"), FakeCard("GPU-b", 3, 4, pci="00000000:65:00.0")
    assert reader(*cards).read(None, "00000000:65:00.0").used.bytes == 3


def test_a_card_that_nvml_does_not_know_is_never_replaced_by_another() -> None:
    reading = reader(FakeCard("GPU-aaaa", GIB, 8 * GIB)).read("cccc", "00000000:99:00.0")
    assert reading.used.bytes is None and "no card" in reading.notes[0]


def test_own_process_is_found_and_the_others_are_named() -> None:
    reading = reader(FakeCard("GPU-a", GIB, 8 * GIB, {OWN: 300 * MIB, 4242: 200 * MIB, 77: MIB, 9: 2})).read("a", None)
    assert reading.process.bytes == 300 * MIB
    assert {(other.name, other.bytes) for other in reading.others} == {
        ("blender", 200 * MIB), ("ffmpeg", MIB), ("process 9", 2),
    }  # fmt: skip


def test_foreign_pids_only_give_an_unknown_process_that_says_so() -> None:
    reading = reader(FakeCard("GPU-a", GIB, 8 * GIB, {4242: 200 * MIB})).read("a", None)
    assert reading.process.bytes is None and "no process 100" in reading.process.note
    assert reading.used.bytes == GIB


def test_a_process_with_our_number_and_fewer_bytes_than_our_pool_is_not_ours() -> None:
    reading = reader(FakeCard("GPU-a", GIB, 8 * GIB, {OWN: 100 * MIB})).read("a", None, reserved=300 * MIB)
    assert reading.process.bytes is None and "not this process" in reading.process.note
    assert [other.pid for other in reading.others] == [OWN]


def test_a_driver_without_numbers_per_process_says_so() -> None:
    reading = reader(FakeCard("GPU-a", GIB, 8 * GIB, {OWN: None, 4242: None})).read("a", None)
    assert reading.process.bytes is None and "WDDM" in reading.process.note
    assert [(other.pid, other.bytes) for other in reading.others] == [(4242, None)]


def test_a_process_that_computes_and_draws_is_counted_once() -> None:
    card = FakeCard("GPU-a", GIB, 8 * GIB, {OWN: 300 * MIB})
    card.graphics = {OWN: 300 * MIB}
    assert reader(card).read("a", None).process.bytes == 300 * MIB


def test_an_instance_is_found_by_its_own_uuid() -> None:
    parts = FakeCard("MIG-i1", MIB, GIB), FakeCard("MIG-i2", 2 * MIB, 2 * GIB)
    assert reader(FakeCard("GPU-a", 9, 10, instances=parts)).read("i2", None).total.bytes == 2 * GIB


def test_a_split_card_gives_the_instance_that_holds_this_process() -> None:
    parts = FakeCard("MIG-i1", MIB, GIB), FakeCard("MIG-i2", 2 * MIB, 2 * GIB, {OWN: MIB})
    reading = reader(FakeCard("GPU-a", 9, 10, instances=parts)).read("a", None)
    assert (reading.total.bytes, reading.process.bytes) == (2 * GIB, MIB)


def test_a_split_card_whose_instance_is_unclear_gives_no_number_of_the_whole_card() -> None:
    parts = FakeCard("MIG-i1", MIB, GIB), FakeCard("MIG-i2", 2 * MIB, 2 * GIB)
    reading = reader(FakeCard("GPU-a", 9, 10, instances=parts)).read("a", None)
    assert reading.used.bytes is None and "which of 2 instances" in reading.notes[0]


def test_a_card_that_is_lost_mid_run_gives_a_marked_reading_and_recovers() -> None:
    card = FakeCard("GPU-a", GIB, 8 * GIB, {OWN: MIB})
    library = FakeNvml([card])
    nvml = Nvml(library, OWN)
    assert nvml.read("a", None).process.bytes == MIB
    card.lost = True
    lost = nvml.read("a", None)
    assert (lost.used.bytes, lost.process.bytes) == (None, None) and "GPU is lost" in lost.notes[0]
    card.lost = False
    assert nvml.read("a", None).process.bytes == MIB and library.starts == 2


def test_a_forbidden_process_list_leaves_the_card_s_own_numbers() -> None:
    class Forbidding(FakeNvml):
        def nvmlDeviceGetComputeRunningProcesses(self, card):
            raise NVMLError("Insufficient Permissions")

    reading = Nvml(Forbidding([FakeCard("GPU-a", GIB, 8 * GIB)]), OWN).read("a", None)
    assert reading.used.bytes == GIB and "Insufficient Permissions" in reading.process.note


def test_a_missing_library_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "not installed" in Nvml().read("a", None).notes[0]
