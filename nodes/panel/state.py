"""What the memory panel shows, as plain values: devices by what fills them, resident models, phases.

`PanelState` names every key; web/panel reads them. The state is read once a second, on a thread of its own, so reading
it only looks: no device is started, and no heap is walked.
"""

from __future__ import annotations

import time
from typing import Any, TypedDict

import comfy.model_base
import comfy.model_management as mm
import psutil
import torch

from ...memory import ledger, probe
from ...memory.reading import WHOLE_DEVICE, Figure, Reading, exact
from ...patches import prompt
from ...patches.kept import Entry, registry
from ...patches.residency import handle_of
from ...patches.versions import torch_devices

PHASE_SECONDS = 120
"""How far back the timeline of the panel goes."""


class ModelState(TypedDict):
    """A network in ComfyUI's list, or one that is kept.

    Attributes:
        handle: names it as long as it lives (`residency.handle_of`).
        id: of the registry's entry; None for a model that the registry does not know.
        name: class of the network.
        kind: MODEL | CLIP | VAE, or what its loader calls it; None where nothing tells.
        dtype: of its first weight, such as "float16".
        device: where it is: the device that it computes on, or the one that it rests on.
        bytes, size: on the device that it computes on, and of all its weights.
        policy: no | keep | pin, or None.
        last_used: seconds of `time.time`, or None.
        movable: whether it can be offloaded at all.
    """

    handle: str
    id: str | None
    name: str
    kind: str | None
    dtype: str | None
    device: str
    bytes: int
    size: int
    policy: str | None
    last_used: float | None
    movable: bool


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
        ram: bytes of all kept models together (`kept`), and how many they may have (`budget`).
    """

    time: float
    prompt: bool
    devices: list[DeviceState]
    residents: list[ModelState]
    phases: list[PhaseState]
    ram: dict[str, int]


def patcher_of(handle: str) -> Any | None:
    """The patcher of the network with that name (`residency.handle_of`): a loaded one, or one that is kept."""
    return next((patcher for patcher in _all_patchers() if handle_of(patcher.model) == handle), None)


def state() -> PanelState:
    """Everything that the panel shows, at this moment."""
    models = [_model(patcher) for patcher in _all_patchers()]
    levels = ledger.current().levels
    devices = [_device(reading, models, levels) for reading in _readings()]
    kept = registry()
    return {
        "time": time.time(),
        "prompt": prompt.in_work(),
        "devices": devices,
        "residents": sorted(models, key=lambda model: (-model["bytes"], model["name"], model["handle"])),
        "phases": _phases(),
        "ram": {"kept": kept.kept_bytes(), "budget": kept.budget_bytes()},
    }


def _all_patchers() -> list[Any]:
    """Patchers of everything in ComfyUI's list and of every kept model, one for each network."""
    listed = [loaded.model for loaded in list(mm.current_loaded_models)]
    owned = [patcher for entry in registry().owned() for patcher in entry.patchers]
    one_each = {id(patcher.model): patcher for patcher in [*owned, *listed] if patcher is not None}
    return list(one_each.values())


def _model(patcher: Any) -> ModelState:
    entry = registry().owner_of(patcher)
    weight = next(patcher.model.parameters(), None)
    loaded = patcher.loaded_size()
    return {
        "handle": handle_of(patcher.model),
        "id": entry and entry.id,
        "name": type(patcher.model).__name__,
        "kind": _kind(patcher, entry),
        "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
        "device": str(patcher.load_device if loaded else patcher.offload_device),
        "bytes": loaded,
        "size": patcher.model_size(),
        "policy": entry and entry.policy,
        "last_used": entry and entry.last_used,
        "movable": patcher.load_device != patcher.offload_device,
    }


def _kind(patcher: Any, entry: Entry | None) -> str | None:
    if isinstance(patcher.model, comfy.model_base.BaseModel):
        return "MODEL"
    if patcher.is_clip:
        return "CLIP"
    if hasattr(patcher.model, "decode") and hasattr(patcher.model, "encode"):
        return "VAE"
    return entry.key.kind.upper() if entry is not None else None


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
