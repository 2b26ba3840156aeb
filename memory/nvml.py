"""NVIDIA's management library: what the driver says of one card, which is found by its identity, never by an index.

torch numbers only the cards that CUDA_VISIBLE_DEVICES shows, in an order of its own; NVML numbers all cards by PCI
address. So a card is looked up by UUID, or by PCI address with a torch that does not tell the UUID.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .reading import WHOLE_DEVICE, Figure, OtherProcess, Reading, exact, size_text, unknown


class Nvml:
    """Reads cards through `pynvml`. Whatever NVML cannot do becomes a note in the reading, never an exception.

    Args:
        module: stands in for `pynvml`, which is imported at the first reading.
        pid: of the process that is called "this process".
    """

    def __init__(self, module: Any = None, pid: int | None = None) -> None:
        self._module = module
        self._pid = pid
        self._started = False
        self._absent = ""

    def read(self, uuid: str | None, pci: str | None, reserved: int | None = None) -> Reading:
        """Reads the card with this UUID (without "GPU-") or PCI address ("00000000:65:00.0"): what the driver knows.

        Args:
            reserved: bytes that torch's pool holds. A process that the driver gives fewer cannot be this one: in a
                container a foreign process may happen to carry our number.
        """
        if not self._start():
            return Reading("NVML", notes=(self._absent,))
        nvml = self._module
        try:
            handle = self._find(uuid, pci)
            if handle is None:
                return Reading("NVML", notes=("NVML: no card with this UUID or PCI address",))
            handle, note = self._instance(handle, uuid)
            if handle is None:
                return Reading("NVML", notes=(note,))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            used = Figure(int(memory.used), "NVML", WHOLE_DEVICE)
            total = exact(memory.total, "NVML")
        except nvml.NVMLError as error:
            # The driver may have been reloaded: start anew at the next reading.
            self._started = False
            return Reading("NVML", notes=(f"NVML: {error}",))
        card = Reading("NVML", used=used, total=total, notes=(note,) if note else ())
        try:
            found = self._processes(handle)
        except nvml.NVMLError as error:
            said = unknown(f"NVML: {error}")
            return replace(card, process=said, notes=(*card.notes, f"NVML processes: {error}"))
        own = self._own_pid()
        process = self._own(found, reserved)
        if process.bytes is not None or (own in found and found[own] is None):
            del found[own]
        others = tuple(OtherProcess(pid, self._name(pid), size) for pid, size in sorted(found.items()))
        notes = (*card.notes, process.note) if process.note else card.notes
        return replace(card, process=process, others=others, notes=notes)

    def _own_pid(self) -> int:
        # Asked anew: a forked process has another number than the one that made this object.
        return os.getpid() if self._pid is None else self._pid

    def _start(self) -> bool:
        if self._started:
            return True
        if self._module is None:
            try:
                self._module = importlib.import_module("pynvml")
            except ImportError:
                self._absent = "NVML: pynvml (nvidia-ml-py) is not installed"
                return False
        try:
            self._module.nvmlInit()
        except self._module.NVMLError as error:
            self._absent = f"NVML: {error}"
            return False
        self._started = True
        return True

    def _find(self, uuid: str | None, pci: str | None) -> Any:
        """The handle of a card or MIG instance, or None."""
        nvml = self._module
        looked_up = [(nvml.nvmlDeviceGetHandleByUUID, f"{kind}-{uuid}") for kind in ("GPU", "MIG")] if uuid else []
        if pci:
            looked_up.append((nvml.nvmlDeviceGetHandleByPciBusId, pci))
        lost: Exception | None = None
        for look_up, identity in looked_up:
            try:
                return look_up(identity)
            except nvml.NVMLError as error:
                not_found = getattr(nvml, "NVMLError_NotFound", ()), getattr(nvml, "NVMLError_InvalidArgument", ())
                lost = lost if any(kind and isinstance(error, kind) for kind in not_found) else error
        if lost is not None:
            raise lost
        return None

    def _instance(self, handle: Any, uuid: str | None) -> tuple[Any, str]:
        """On a card split by MIG: the instance that torch sees, or None and why; else the card itself."""
        nvml = self._module
        try:
            if nvml.nvmlDeviceIsMigDeviceHandle(handle):
                return handle, ""
            split = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
        except nvml.NVMLError:  # a card that cannot be split, or a driver that knows nothing of it
            return handle, ""
        if not split:
            return handle, ""
        instances = []
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(nvml.NVMLError):  # no instance in this slot
                instances.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        if uuid:
            for instance in instances:
                if _text(nvml.nvmlDeviceGetUUID(instance)) == f"MIG-{uuid}":
                    return instance, ""
        holding = [instance for instance in instances if self._own_pid() in self._processes(instance)]
        if len(holding) == 1:
            return holding[0], "MIG: instance found by this process"
        if len(instances) == 1:
            return instances[0], "MIG: the card's only instance"
        return None, f"MIG: which of {len(instances)} instances is ours cannot be told"

    def _processes(self, handle: Any) -> dict[int, int | None]:
        """Bytes by process number; None where the driver has no number (Windows WDDM)."""
        nvml = self._module
        processes = list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        with suppress(nvml.NVMLError):  # not every driver lists what draws
            processes += nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
        found: dict[int, int | None] = {}
        for process in processes:
            # One process may compute and draw: both lists then give the same number.
            found[process.pid] = found.get(process.pid) or process.usedGpuMemory
        return found

    def _own(self, found: dict[int, int | None], reserved: int | None) -> Figure:
        if (pid := self._own_pid()) not in found:
            seen = ", ".join(map(str, sorted(found))) or "none"
            return unknown(f"NVML lists no process {pid} (listed: {seen}); in a container the numbers are the host's")
        size = found[pid]
        if size is None:
            return unknown("NVML has no number for this process (Windows WDDM, or not permitted)")
        if reserved is not None and size < reserved:
            return unknown(
                f"NVML gives process {pid} {size_text(size)}, less than torch's {size_text(reserved)}: not this process"
            )
        return exact(size, "NVML")

    def _name(self, pid: int) -> str:
        try:
            return _text(self._module.nvmlSystemGetProcessName(pid))
        except self._module.NVMLError:
            return f"process {pid}"


def _text(value: str | bytes) -> str:
    """Older bindings return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
