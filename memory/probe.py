"""One reading of one device, through whatever can be read there: torch's counters, NVML, the operating system.

| device | allocated, reserved | whole device | this process |
|---|---|---|---|
| cuda (CUDA, ROCm) | torch.cuda | NVML by UUID, else torch.cuda.mem_get_info | NVML, where it lists our own number |
| xpu | torch.xpu | torch.xpu.mem_get_info, where this torch has it | - |
| mps | torch.mps (no pool size) | - | torch.mps.driver_allocated_memory |
| cpu | a running tracker, else unknown | the system | USS, else RSS |

Reading a CUDA or XPU device makes torch start it, which takes a few hundred MiB on that device the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from .host import machine_memory, process_memory
from .nvml import Nvml
from .process import shared
from .reading import WHOLE_DEVICE, Figure, Reading, exact, unknown
from .tracker import StorageTracker

Device = torch.device | str

NO_TRACKER = "torch does not count tensors on the CPU; no tracker is running"


class Probe(Protocol):
    """What the ledger and a verified offload read from; `ScriptedProbe` stands in for it in tests."""

    def sample(self, device: Device, *, settled: bool = False) -> Reading:
        """Reads one device. `settled`: worth some milliseconds of tidying first (the end of a phase, not of a step)."""
        ...

    def reset_peak(self, device: Device) -> None:
        """Starts the peak counter of the device anew."""
        ...

    def synchronise(self, device: Device) -> None:
        """Waits until the device has finished what it was asked to do."""
        ...


class DeviceProbe:
    """Reads real devices.

    Args:
        backend: stands in for the `torch` module.
        nvml: stands in for the default `Nvml()`.
        tracker: what counts live tensors on the CPU, or None; `tracking` sets it for as long as one runs.
        dynamic: bytes of weights on a device that torch's counters do not see (ComfyUI's dynamic VRAM), or None.
    """

    def __init__(
        self,
        backend: Any = torch,
        nvml: Nvml | None = None,
        tracker: StorageTracker | None = None,
        dynamic: Callable[[torch.device], int | None] = lambda device: None,
    ) -> None:
        self.tracker = tracker
        self.dynamic = dynamic
        self._torch = backend
        self._nvml = nvml or Nvml()

    def sample(self, device: Device, *, settled: bool = False) -> Reading:
        """Reads one device; see `Probe`. What cannot be read is unknown and says why.

        Raises:
            ValueError: a kind of device that no reader here knows.
        """
        where = torch.device(device)
        readers = {"cuda": self._cuda, "xpu": self._xpu, "mps": self._mps, "cpu": self._cpu}
        if where.type not in readers:
            raise ValueError(f"probe: expected a device of {', '.join(readers)}; got {str(device)!r}.")
        return readers[where.type](where, settled)

    def reset_peak(self, device: Device) -> None:
        kind = torch.device(device).type
        if kind in ("cuda", "xpu"):
            getattr(self._torch, kind).reset_peak_memory_stats(device)
        elif kind == "cpu" and self.tracker is not None:
            self.tracker.reset_peak()

    def synchronise(self, device: Device) -> None:
        kind = torch.device(device).type
        if kind in ("cuda", "xpu"):
            getattr(self._torch, kind).synchronize(device)
        elif kind == "mps":
            self._torch.mps.synchronize()

    def _cuda(self, device: torch.device, settled: bool) -> Reading:
        cuda = self._torch.cuda
        reserved = int(cuda.memory_reserved(device))
        properties = cuda.get_device_properties(device)
        driver = Reading("cuda", notes=("NVML is for NVIDIA cards",))
        if not getattr(getattr(self._torch, "version", None), "hip", None):
            driver = self._nvml.read(_uuid(properties), _pci_address(properties), reserved)
        if driver.used.bytes is None:
            used, total, note = _from_free(cuda, device, "torch.cuda.mem_get_info")
            driver = replace(driver, used=used, total=total, notes=(*driver.notes, *filter(None, [note])))
        return self._counted(driver, device, cuda, "torch.cuda")

    def _xpu(self, device: torch.device, settled: bool) -> Reading:
        xpu = self._torch.xpu
        used, total, note = _from_free(xpu, device, "torch.xpu.mem_get_info")
        if total.bytes is None:
            total = exact(xpu.get_device_properties(device).total_memory, "torch.xpu")
        process = unknown("XPU: the driver gives no number per process")
        driver = Reading("xpu", used=used, total=total, process=process, notes=(note,) if note else ())
        return self._counted(driver, device, xpu, "torch.xpu")

    def _counted(self, driver: Reading, device: torch.device, module: Any, source: str) -> Reading:
        """What the driver says, with the counters of torch's allocator."""
        index = module.current_device() if device.index is None else device.index
        split = module.memory_stats(device).get("inactive_split_bytes.all.current")
        return replace(
            driver,
            device=f"{device.type}:{index}",
            allocated=exact(module.memory_allocated(device), source),
            peak=exact(module.max_memory_allocated(device), source),
            reserved=exact(module.memory_reserved(device), source),
            inactive_split=unknown("this allocator does not tell its split blocks")
            if split is None
            else exact(split, source),
            dynamic=self._dynamic(device),
        )

    def _mps(self, device: torch.device, settled: bool) -> Reading:
        mps = self._torch.mps
        total = unknown("this torch does not tell what MPS may use")
        if hasattr(mps, "recommended_max_memory"):
            total = exact(mps.recommended_max_memory(), "torch.mps.recommended_max_memory")
        return Reading(
            device="mps",
            allocated=exact(mps.current_allocated_memory(), "torch.mps"),
            dynamic=self._dynamic(device),
            total=total,
            process=exact(mps.driver_allocated_memory(), "torch.mps.driver_allocated_memory"),
            notes=("MPS: no peak counter, and nothing tells what other processes use",),
        )

    def _cpu(self, device: torch.device, settled: bool) -> Reading:
        allocated = peak = unknown(NO_TRACKER)
        if self.tracker is not None:
            allocated, peak = exact(self.tracker.now, "tracker"), exact(self.tracker.peak, "tracker")
        used, total = machine_memory()
        process = process_memory(trimmed=settled)
        notes = tuple(filter(None, [process.note, allocated.note]))
        return Reading("cpu", allocated=allocated, peak=peak, used=used, total=total, process=process, notes=notes)

    def _dynamic(self, device: torch.device) -> Figure:
        value = self.dynamic(device)
        return Figure() if value is None else exact(value, "dynamic VRAM")


class ScriptedProbe:
    """Readings from a script: for tests, and for a simulated card whose books are the only truth.

    Args:
        script: called for every sample with the device's name; what it raises leaves through `sample`.
    """

    def __init__(self, script: Callable[[str], Reading]) -> None:
        self.script = script
        self.calls: list[str] = []
        """What was asked, in order: "sample cuda:0", "reset_peak cuda:0", "synchronise cuda:0"."""

    def sample(self, device: Device, *, settled: bool = False) -> Reading:
        self.calls.append(f"sample {device}")
        return self.script(str(device))

    def reset_peak(self, device: Device) -> None:
        self.calls.append(f"reset_peak {device}")

    def synchronise(self, device: Device) -> None:
        self.calls.append(f"synchronise {device}")


def current() -> DeviceProbe:
    """The probe of the whole process. `current().dynamic = …` is where patches/ hands in its reader."""
    return shared("probe", DeviceProbe)


@contextmanager
def tracking(tracker: StorageTracker | None = None) -> Iterator[StorageTracker]:
    """Counts tensors that are made on the CPU inside the block, for the process' probe too. It slows every operator
    down: for tests and for a closer look, not for every run."""
    tracker = tracker or StorageTracker()
    reader, outer = current(), current().tracker
    reader.tracker = tracker
    try:
        with tracker:
            yield tracker
    finally:
        reader.tracker = outer


def read(device: Device, *, settled: bool = False) -> Reading:
    """One reading of one device, by the probe of the process. A reader that fails gives a reading that says so."""
    return attempt(current(), device, settled=settled)


def attempt(probe: Probe, device: Device, *, settled: bool = False) -> Reading:
    """`probe.sample`, but a failure is a reading in which all is unknown: measuring never ends a prompt."""
    try:
        return probe.sample(device, settled=settled)
    # Drivers fail in ways of their own (torch.AcceleratorError, a lost NVML, a missing library).
    except Exception as error:
        return Reading(str(device), notes=(f"not readable: {type(error).__name__}: {error}",))


def empty_cache(device: Device) -> None:
    """Gives what torch's allocator keeps unused of a device back to the driver; the CPU has no such pool."""
    kind = torch.device(device).type
    if kind in ("cuda", "xpu", "mps"):
        getattr(torch, kind).empty_cache()


def default_device() -> torch.device:
    """The accelerator that torch uses now, else the CPU."""
    first = devices()[0]
    return torch.device(first.type, getattr(torch, first.type).current_device()) if first.index is not None else first


def devices() -> list[torch.device]:
    """Every device that can be read here, accelerators first."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu"):
        found += [torch.device("xpu", index) for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def _uuid(properties: Any) -> str | None:
    uuid = str(getattr(properties, "uuid", "") or "")
    return uuid.removeprefix("GPU-").removeprefix("MIG-") or None


def _pci_address(properties: Any) -> str | None:
    """`00000000:65:00.0`, as NVML writes it."""
    if not hasattr(properties, "pci_bus_id"):
        return None
    domain, bus, slot = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    return f"{domain:08X}:{bus:02X}:{slot:02X}.0"


def _from_free(module: Any, device: torch.device, source: str) -> tuple[Figure, Figure, str]:
    """Used and total bytes of the whole device, or why they are unknown."""
    if not hasattr(module, "mem_get_info"):
        return Figure(), Figure(), f"this torch has no {source}"
    try:
        free, total = module.mem_get_info(device)
    except RuntimeError as error:  # older Intel drivers
        return Figure(), Figure(), f"{source}: {error}"
    return Figure(int(total - free), source, WHOLE_DEVICE), exact(total, source), ""
