"""Doubles of what the probe reads from: torch's device modules, pynvml, and a card whose books a test writes."""

from __future__ import annotations

from types import SimpleNamespace

from steadyvsr.memory.reading import WHOLE_DEVICE, Figure, Reading, exact

MIB = 1 << 20
GIB = 1 << 30


class FakeCuda:
    """torch.cuda or torch.xpu with fixed numbers for each device index."""

    def __init__(self, devices: list[dict], version: str | None = None) -> None:
        self.devices = devices
        self.resets: list[int] = []
        self.asked_driver = 0

    def _of(self, device) -> dict:
        return self.devices[device.index or 0]

    def current_device(self) -> int:
        return 0

    def memory_allocated(self, device) -> int:
        return self._of(device)["allocated"]

    def max_memory_allocated(self, device) -> int:
        return self._of(device)["peak"]

    def memory_reserved(self, device) -> int:
        return self._of(device)["reserved"]

    def memory_stats(self, device) -> dict:
        return self._of(device).get("stats", {})

    def mem_get_info(self, device) -> tuple[int, int]:
        self.asked_driver += 1
        return self._of(device)["free"], self._of(device)["total"]

    def get_device_properties(self, device) -> SimpleNamespace:
        return SimpleNamespace(**self._of(device).get("properties", {}))

    def reset_peak_memory_stats(self, device) -> None:
        self.resets.append(device.index if hasattr(device, "index") else int(str(device).partition(":")[2] or 0))

    def synchronize(self, device) -> None:
        pass


class NVMLError(Exception):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class FakeCard:
    """One card, or one MIG instance, as NVML sees it. `processes`: bytes (or None) by pid."""

    def __init__(self, uuid: str, used: int, total: int, processes=None, pci: str = "", instances=()) -> None:
        self.uuid, self.used, self.total, self.pci = uuid, used, total, pci
        self.processes = processes or {}
        self.graphics: dict[int, int | None] = {}
        self.instances = list(instances)
        self.lost = False


class FakeNvml:
    """pynvml over a list of cards, in NVML's own order."""

    NVMLError = NVMLError
    NVMLError_NotFound = NVMLError_NotFound

    def __init__(self, cards: list[FakeCard], fails: str = "") -> None:
        self.cards, self.fails = cards, fails
        self.starts = 0
        self.names = {4242: "blender", 77: b"ffmpeg"}

    def nvmlInit(self) -> None:
        if self.fails:
            raise NVMLError(self.fails)
        self.starts += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:
        return self._found(card for top in self.cards for card in (top, *top.instances) if card.uuid == uuid)

    def nvmlDeviceGetHandleByPciBusId(self, pci: str) -> FakeCard:
        return self._found(card for card in self.cards if card.pci == pci)

    def _found(self, cards) -> FakeCard:
        card = next(cards, None)
        if card is None:
            raise NVMLError_NotFound("Not Found")
        return card

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceIsMigDeviceHandle(self, card: FakeCard) -> int:
        return int(card not in self.cards)

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:
        if not card.instances:
            raise NVMLError_NotSupported("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        if index >= len(card.instances):
            raise NVMLError_NotFound("Not Found")
        return card.instances[index]

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> SimpleNamespace:
        if card.lost:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=card.used, total=card.total, free=card.total - card.used)

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in card.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in card.graphics.items()]

    def nvmlSystemGetProcessName(self, pid: int):
        if pid not in self.names:
            raise NVMLError_NotFound("Not Found")
        return self.names[pid]


class FakeCardBooks:
    """A simulated card for offload tests and the ledger: what is allocated, pooled, and used by others."""

    def __init__(self, total: int = 24 * GIB, name: str = "cuda:0") -> None:
        self.name, self.total = name, total
        self.allocated = self.pool = self.others = 0
        self.peak = 0
        self.nvml = True
        self.driver_known = True
        self.broken = False

    def use(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def read(self, device: str) -> Reading:
        if self.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        reserved = self.allocated + self.pool
        used = Figure(reserved + self.others, "NVML" if self.nvml else "mem_get_info", WHOLE_DEVICE)
        return Reading(
            self.name,
            allocated=exact(self.allocated, "torch.cuda"),
            peak=exact(self.peak, "torch.cuda"),
            reserved=exact(reserved, "torch.cuda"),
            used=used if self.driver_known else Figure(),
            total=exact(self.total, "torch.cuda"),
            process=exact(reserved, "NVML") if self.nvml else Figure(note="no NVML"),
        )
