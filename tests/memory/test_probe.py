"""Readings of devices: against doubles of torch's modules, and of this process against the operating system."""

from __future__ import annotations

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from steadyvsr.memory import probe
from steadyvsr.memory import process as state
from steadyvsr.memory.host import trim
from steadyvsr.memory.nvml import Nvml
from steadyvsr.memory.probe import DeviceProbe, ScriptedProbe, attempt
from steadyvsr.memory.reading import EXACT, UNKNOWN, WHOLE_DEVICE, Figure, Reading, exact
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.tests.memory.doubles import GIB, MIB, FakeCard, FakeCuda, FakeNvml

CARD = {
    "allocated": 2 * GIB, "peak": 3 * GIB, "reserved": 4 * GIB, "free": 10 * GIB, "total": 24 * GIB,
    "stats": {"inactive_split_bytes.all.current": 5 * MIB}, "properties": {"uuid": "aaaa"},
}  # fmt: skip


def cuda_probe(nvml: FakeNvml, cards=(CARD,), hip: str | None = None, pid: int = 100) -> DeviceProbe:
    backend = SimpleNamespace(cuda=FakeCuda(list(cards)), version=SimpleNamespace(hip=hip))
    return DeviceProbe(backend, Nvml(nvml, pid))


def test_every_cuda_number_is_the_scripted_one_with_its_source() -> None:
    nvml = FakeNvml([FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {100: 5 * GIB})])
    reading = cuda_probe(nvml).sample("cuda:0")
    assert reading.device == "cuda:0"
    assert reading.allocated == Figure(2 * GIB, "torch.cuda", EXACT)
    assert reading.peak == Figure(3 * GIB, "torch.cuda", EXACT)
    assert reading.reserved == Figure(4 * GIB, "torch.cuda", EXACT)
    assert reading.inactive_split == Figure(5 * MIB, "torch.cuda", EXACT)
    assert reading.used == Figure(9 * GIB, "NVML", WHOLE_DEVICE)
    assert reading.total == Figure(25 * GIB, "NVML", EXACT)
    assert reading.process == Figure(5 * GIB, "NVML", EXACT)


def test_without_nvml_the_whole_device_is_read_from_torch_and_the_process_is_unknown() -> None:
    reading = cuda_probe(FakeNvml([], fails="Driver Not Loaded")).sample("cuda:0")
    assert reading.used == Figure(14 * GIB, "torch.cuda.mem_get_info", WHOLE_DEVICE)
    assert (reading.process.bytes, reading.process.confidence) == (None, UNKNOWN)
    assert reading.driver == reading.used
    assert "NVML: Driver Not Loaded" in reading.notes


def test_on_rocm_nvml_is_not_asked_even_where_it_knows_a_card_of_that_identity() -> None:
    nvml = FakeNvml([FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {100: 5 * GIB})])
    reading = cuda_probe(nvml, hip="6.2").sample("cuda:0")
    assert (reading.used.source, reading.process.bytes) == ("torch.cuda.mem_get_info", None)


def test_a_bare_cuda_device_is_named_by_its_index() -> None:
    assert cuda_probe(FakeNvml([])).sample("cuda").device == "cuda:0"


def test_dynamic_weights_are_read_and_count_as_held() -> None:
    reader = cuda_probe(FakeNvml([]))
    reader.dynamic = lambda device: 7 * MIB
    reading = reader.sample("cuda:0")
    assert reading.dynamic.bytes == 7 * MIB
    assert reading.tensors.bytes == 2 * GIB + 7 * MIB
    assert "dynamic" in reading.line("load")


def test_xpu_is_read_exactly_and_says_that_the_process_is_unknown() -> None:
    reading = DeviceProbe(SimpleNamespace(xpu=FakeCuda([CARD]))).sample("xpu:0")
    numbers = (reading.allocated.bytes, reading.peak.bytes, reading.reserved.bytes, reading.used.bytes)
    assert numbers == (2 * GIB, 3 * GIB, 4 * GIB, 14 * GIB)
    assert reading.process.bytes is None and "per process" in reading.process.note


@pytest.mark.parametrize("absent", [True, False], ids=["no mem_get_info", "mem_get_info raises"])
def test_xpu_without_a_reading_of_the_device_says_so(absent: bool) -> None:
    class Older(FakeCuda):
        def mem_get_info(self, device):
            raise RuntimeError("The device does not support querying the available free memory")

    xpu = Older([{**CARD, "properties": {"total_memory": 16 * GIB}}])
    if absent:
        backend = {name: getattr(xpu, name) for name in dir(FakeCuda) if not name.startswith("_")}
        del backend["mem_get_info"]
        xpu = SimpleNamespace(**backend)
    reading = DeviceProbe(SimpleNamespace(xpu=xpu)).sample("xpu:0")
    assert (reading.used.bytes, reading.total.bytes, reading.free) == (None, 16 * GIB, None)
    assert any("mem_get_info" in note for note in reading.notes)


def test_mps_is_read_exactly_and_invents_no_pool() -> None:
    mps = SimpleNamespace(
        current_allocated_memory=lambda: 3 * MIB,
        driver_allocated_memory=lambda: 9 * MIB,
        recommended_max_memory=lambda: GIB,
    )
    reading = DeviceProbe(SimpleNamespace(mps=mps)).sample("mps")
    assert (reading.allocated.bytes, reading.process.bytes, reading.total.bytes) == (3 * MIB, 9 * MIB, GIB)
    assert (reading.reserved.bytes, reading.used.bytes, reading.peak.bytes) == (None, None, None)
    assert "driver (torch.mps" in reading.line("decode")


def test_process_bytes_of_the_cpu_equal_the_system_s_in_the_same_moment() -> None:
    ballast = torch.zeros(64 * MIB // 4)
    reading = DeviceProbe().sample("cpu", settled=True)
    uss = psutil.Process().memory_full_info().uss
    assert ballast.numel() and reading.process.bytes is not None
    assert abs(reading.process.bytes - uss) <= max(32 * MIB, uss // 10)
    assert reading.total.bytes == psutil.virtual_memory().total


def test_freed_pages_leave_the_settled_reading_of_the_process() -> None:
    if not trim():
        pytest.skip("this C library has no malloc_trim")
    before = DeviceProbe().sample("cpu", settled=True).process.bytes
    # Blocks this small lie in the heap, and a last one that stays keeps the C library from giving the others back.
    blocks = [torch.ones(25_000) for _ in range(1280)]
    last = blocks.pop()
    held = DeviceProbe().sample("cpu", settled=True).process.bytes
    del blocks
    after = DeviceProbe().sample("cpu", settled=True).process.bytes
    assert last.numel() and held - before > 100 * MIB and after - before < 28 * MIB


def test_allocated_on_the_cpu_is_unknown_until_a_tracker_runs() -> None:
    reading = DeviceProbe().sample("cpu")
    assert reading.allocated.bytes is None and "no tracker" in reading.allocated.note
    assert "allocated unknown" in reading.line("load")


def test_tracked_bytes_on_the_cpu_are_the_tracker_s_and_end_with_it() -> None:
    with probe.tracking() as tracker:
        kept = torch.zeros(MIB)
        torch.zeros(2 * MIB)
        reading = probe.read("cpu")
        assert reading.allocated.bytes == tracker.now == kept.numel() * 4
        assert reading.peak.bytes == tracker.peak == 12 * MIB
        probe.current().reset_peak("cpu")
        assert probe.read("cpu").peak.bytes == 4 * MIB
    assert probe.read("cpu").allocated.bytes is None


def test_tracked_bytes_agree_with_storages_added_up() -> None:
    with StorageTracker() as tracker:
        kept = [torch.ones(1000 * i) for i in range(1, 40)]
        views = [tensor[::2] for tensor in kept]
        kept = kept[::3]
        views = views[1::3]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in [*kept, *views]}
        reading = DeviceProbe(tracker=tracker).sample("cpu")
    assert reading.allocated.bytes == sum(storages.values())


def test_free_counts_the_unused_pool_but_not_its_split_blocks() -> None:
    reading = cuda_probe(FakeNvml([], fails="x")).sample("cuda:0")
    assert reading.free == 10 * GIB + 2 * GIB - 5 * MIB


def test_a_reader_that_raises_gives_a_reading_that_says_so() -> None:
    def script(device: str) -> Reading:
        raise RuntimeError("CUDA error: device-side assert")

    reading = attempt(ScriptedProbe(script), "cuda:0")
    assert reading.allocated.bytes is None and "device-side assert" in reading.notes[0]


def test_interrupts_leave_through_a_reading() -> None:
    def script(device: str) -> Reading:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(ScriptedProbe(script), "cuda:0")


def test_a_device_that_no_reader_knows_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected a device of cuda, xpu, mps, cpu; got 'meta'"):
        DeviceProbe().sample("meta")


def test_a_line_names_amounts_in_one_unit_and_the_driver_s_source() -> None:
    reading = Reading(
        "cuda:0",
        allocated=exact(int(2.1 * GIB), "torch.cuda"),
        reserved=exact(int(2.5 * GIB), "torch.cuda"),
        process=exact(int(3.02 * GIB), "NVML"),
    )
    assert reading.line("VAE encode") == "after VAE encode · 2.10 GiB allocated · 2.50 reserved · 3.02 driver (NVML)"
    assert reading.line("after VAE encode") == reading.line("VAE encode")


def test_a_line_says_where_the_driver_s_number_is_the_whole_device() -> None:
    line = cuda_probe(FakeNvml([], "x")).sample("cuda").line("x")
    assert "14.00 driver (torch.cuda.mem_get_info, whole device)" in line


def test_a_reading_is_plain_json() -> None:
    nvml = FakeNvml([FakeCard("GPU-aaaa", 9 * GIB, 25 * GIB, {4242: MIB})])
    text = json.dumps(cuda_probe(nvml).sample("cuda:0").to_json())
    assert json.loads(text)["others"] == [{"pid": 4242, "name": "blender", "bytes": MIB}]


def test_shared_state_is_one_object_for_two_imports_of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("a_second_import_of_state", state.__file__)
    second = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_second_import_of_state", second)
    spec.loader.exec_module(second)
    assert second.shared("probe", object) is probe.current()
