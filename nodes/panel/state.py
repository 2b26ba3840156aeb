"""What the memory panel shows, as plain values: devices by what fills them, resident models, phases.

`PanelState` names every key; web/panel reads them. The state is read once a second, on a thread of its own, so reading
it only looks: no device is started, no heap is walked, and no model is held for a moment.
"""

from __future__ import annotations

import time
from typing import Any, TypedDict

import comfy.model_management as mm
import psutil
import torch

from ...memory import ledger, probe
from ...memory.reading import WHOLE_DEVICE, Figure, Reading, exact
from ...patches import hooks, prompt, residency
from ...patches.kept import registry
from ...patches.versions import torch_devices

PHASE_SECONDS = 120
"""How far back the timeline of the panel goes."""


class ModelState(residency.Network):
    """A network with what its registry's entry says now.

    Attributes:
        policy: no | keep | pin, or None.
        last_used: when it was handed out or put on a device, seconds of `time.time`, or None.
    """

    policy: str | None
    last_used: float | None


class DeviceState(TypedDict):
    """An accelerator, or the machine's RAM.

    Attributes:
        device: such as "cuda:0", or "RAM".
        name: of the card, or None.
        total, used: bytes, every process counted; None where they cannot be read.
        source: who said `used`.
        level: ok | warn | critical | unknown.
        parts: bytes by what takes them, see `_card_parts` and `_ram_parts`.
        processes: others on the card: {pid, name, bytes}.
        notes: what could not be read, and why.
    """

    device: str
    name: str | None
    total: int | None
    used: int | None
    source: str
    level: str
    parts: dict[str, int | None]
    processes: list[dict[str, Any]]
    notes: list[str]


class PhaseState(TypedDict):
    """A phase of the ledger, in seconds of `time.time`; `end` is None while it goes on."""

    name: str
    start: float
    end: float | None


class PanelState(TypedDict):
    """Everything that the panel shows.

    Attributes:
        time: of this state, seconds of `time.time`.
        prompt: whether one is being executed.
        devices: accelerators, then the RAM.
        residents: models, largest on its device first.
        phases: of the last two minutes, oldest first.
        promises_off: what cannot be promised in this ComfyUI, in words.
        ram: bytes of all kept models together (`kept`), and how many they may have (`budget`).
    """

    time: float
    prompt: bool
    devices: list[DeviceState]
    residents: list[ModelState]
    phases: list[PhaseState]
    promises_off: list[str]
    ram: dict[str, int]


def state() -> PanelState:
    """Everything that the panel shows, at this moment."""
    residency.look()  # by the worker alone; every other thread reads what the worker has seen
    kept = registry()
    known = {entry.id: (entry.wanted, entry.last_used) for entry in kept.entries()}
    models: list[ModelState] = []
    for network in residency.networks():
        policy, last_used = known.get(network["id"] or "", (None, None))
        models.append({**network, "policy": policy, "last_used": last_used})
    levels = ledger.current().levels
    devices = [_device(reading, models, levels) for reading in _readings()]
    return {
        "time": time.time(),
        "prompt": prompt.in_work(),
        "devices": devices,
        "residents": sorted(models, key=lambda model: (-model["bytes"], model["name"], model["handle"])),
        "phases": _phases(),
        "promises_off": hooks.promises_off(),
        "ram": {"kept": kept.kept_bytes(), "budget": kept.budget_bytes()},
    }


def _readings() -> list[Reading]:
    """One reading for each device of ComfyUI and one of the machine's RAM."""
    accelerators = [device for device in torch_devices() if device.type != "cpu" or device.index is not None]
    return [*(_accelerator(device) for device in accelerators), _ram()]


def _accelerator(device: torch.device) -> Reading:
    # Asking a card that nothing uses would start it and take hundreds of MiB there.
    in_use = device.type != "cuda" or (
        torch.cuda.is_initialized() and (device == mm.get_torch_device() or torch.cuda.memory_reserved(device) > 0)
    )
    if not in_use:
        return Reading(str(device), notes=("nothing of this process is on it",))
    return probe.attempt(probe.current(), device)


def _ram() -> Reading:
    """The machine's RAM. The resident size is cheap to read twice a second; USS walks every page of the process."""
    machine = psutil.virtual_memory()
    return Reading(
        "cpu",
        used=Figure(machine.total - machine.available, "system", WHOLE_DEVICE),
        total=exact(machine.total, "system"),
        process=exact(psutil.Process().memory_info().rss, "RSS"),
    )


def _device(reading: Reading, models: list[ModelState], levels: ledger.Levels) -> DeviceState:
    ram = reading.device == "cpu"
    return {
        "device": "RAM" if ram else reading.device,
        "name": None if ram else _name(torch.device(reading.device)),
        "total": reading.total.bytes,
        "used": reading.used.bytes,
        "source": reading.used.source,
        "level": levels.of(reading),
        "parts": _ram_parts(reading, models) if ram else _card_parts(reading, models),
        "processes": [{"pid": other.pid, "name": other.name, "bytes": other.bytes} for other in reading.others],
        "notes": list(reading.notes),
    }


def _card_parts(reading: Reading, models: list[ModelState]) -> dict[str, int | None]:
    """What fills a card. A part is None where one of the numbers that it is made of could not be read."""
    ours = [model for model in models if model["device"] == reading.device]
    kept = sum(model["bytes"] for model in ours if model["policy"] in ("keep", "pin"))
    rest = sum(model["bytes"] for model in ours) - kept
    allocated, reserved = reading.allocated.bytes, reading.reserved.bytes
    used, total, process = reading.used.bytes, reading.total.bytes, reading.process.bytes
    dynamic = reading.dynamic.bytes or 0
    in_pool = None if reserved is None else reserved + dynamic
    parts = {
        "kept": kept,
        "models": rest,
        "working": _difference(None if allocated is None else allocated + dynamic, kept + rest),
        "pool": _difference(reserved, allocated),
        "others": _difference(used, in_pool if process is None else process),
        "free": _difference(total, used),
    }
    if process is not None:
        parts["context"] = _difference(process, in_pool)
    return parts


def _ram_parts(reading: Reading, models: list[ModelState]) -> dict[str, int | None]:
    """What fills the RAM. Weights on a card count here with what is left of them in RAM."""
    resting = [(m["policy"], m["size"] - (m["bytes"] if m["device"] != "cpu" else 0)) for m in models]
    kept = sum(size for policy, size in resting if policy in ("keep", "pin"))
    rest = sum(size for _, size in resting) - kept
    return {
        "kept": kept,
        "models": rest,
        "own": _difference(reading.process.bytes, kept + rest),
        "others": _difference(reading.used.bytes, reading.process.bytes),
        "free": _difference(reading.total.bytes, reading.used.bytes),
    }


def _difference(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else max(0, first - second)


def _name(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.is_initialized():
        return torch.cuda.get_device_name(device)
    return None


def _phases() -> list[PhaseState]:
    offset = time.time() - time.perf_counter()
    earliest = time.perf_counter() - PHASE_SECONDS
    book = ledger.current()
    ended: list[PhaseState] = [
        {"name": phase.name, "start": phase.before[0].moment + offset, "end": phase.after[0].moment + offset}
        for phase in list(book.phases)
        if phase.after and phase.after[0].moment > earliest
    ]
    going_on: list[PhaseState] = [
        {"name": name, "start": moment + offset, "end": None} for name, moment in book.open_phases()
    ]
    return ended + going_on
