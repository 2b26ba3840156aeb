"""What is loaded where by ComfyUI's books, and the verified offload of one model through ComfyUI's own functions."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import torch

from ..memory import budget, ledger, offload, probe
from ..memory.process import shared
from . import prompt, versions
from .kept import adopt, registry, same_model

EVERYTHING = 1e30
"""Bytes to ask ComfyUI for when every model has to go that is not excepted."""


@dataclass(frozen=True)
class Resident:
    """A model in ComfyUI's list, or one that it lost sight of.

    Attributes:
        name: class of the network.
        device: where ComfyUI's books say that it is loaded.
        bytes: on that device; with dynamic VRAM, what is there now.
        size: of all its weights.
        policy: keep | pin | no, or None for a model that the registry does not know.
        id: of the registry's entry, or None.
        dead: its patcher is gone while somebody holds its module: ComfyUI can no longer move it.
        handle: names the network as long as it lives (`handle_of`).
    """

    name: str
    device: torch.device
    bytes: int
    size: int
    policy: str | None
    id: str | None
    dead: bool
    handle: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "device": str(self.device)}


class Network(TypedDict):
    """A network in ComfyUI's list, or one that is kept, as ComfyUI's worker last saw it.

    Plain values only: on another thread, a reference to a model might be the last one when it goes.

    Attributes:
        handle: names it as long as it lives (`handle_of`).
        id: of the registry's entry; None for a model that the registry does not know.
        name: class of the network.
        kind: MODEL | CLIP | VAE, or what its loader calls it; None where nothing tells.
        dtype: of its first weight, such as "float16".
        device: where it is: the device that it computes on, or the one that it rests on.
        bytes, size: on the device that it computes on, and of all its weights.
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
    movable: bool


class _Seen:
    networks: tuple[Network, ...] = ()


def look() -> None:
    """Notes what is in ComfyUI's list and in the registry, for other threads to read; done by ComfyUI's worker."""
    if prompt.on_worker():
        shared("networks", _Seen).networks = tuple(_network(patcher) for patcher in _all_patchers())


def networks() -> tuple[Network, ...]:
    """What the last `look` saw of the networks that are alive; any thread may ask."""
    # Not by asking the weak references: that would hold each network for a moment.
    alive = set(shared("handles", weakref.WeakKeyDictionary).data.values())
    return tuple(network for network in shared("networks", _Seen).networks if network["handle"] in alive)


def patcher_of(handle: str) -> Any | None:
    """The patcher of the network with that name (`handle_of`): a loaded one, or one that is kept."""
    return next((patcher for patcher in _all_patchers() if handle_of(patcher.model) == handle), None)


def _all_patchers() -> list[Any]:
    """Patchers of everything in ComfyUI's list and of every kept model, one for each network."""
    listed = [loaded.model for loaded in mm.current_loaded_models]
    owned = [patcher for entry in registry().owned() for patcher in entry.patchers]
    one_each = {id(patcher.model): patcher for patcher in [*owned, *listed] if patcher is not None}
    return list(one_each.values())


def _network(patcher: Any) -> Network:
    entry = registry().owner_of(patcher)
    weight = next(patcher.model.parameters(), None)
    loaded = patcher.loaded_size()
    return Network(
        handle=handle_of(patcher.model),
        id=entry and entry.id,
        name=type(patcher.model).__name__,
        kind=_kind(patcher) or (entry and entry.key.kind.upper()),
        dtype=None if weight is None else str(weight.dtype).removeprefix("torch."),
        device=str(patcher.load_device if loaded else patcher.offload_device),
        bytes=loaded,
        size=patcher.model_size(),
        movable=patcher.load_device != patcher.offload_device,
    )


def _kind(patcher: Any) -> str | None:
    if isinstance(patcher.model, comfy.model_base.BaseModel):
        return "MODEL"
    if patcher.is_clip:
        return "CLIP"
    return "VAE" if hasattr(patcher.model, "decode") and hasattr(patcher.model, "encode") else None


def handle_of(module: Any) -> str:
    """A short name for a network, valid as long as it lives and never given again; no address can be read from it."""
    handles, numbers = shared("handles", weakref.WeakKeyDictionary), shared("handle_numbers", itertools.count)
    if module not in handles:
        handles[module] = f"m{next(numbers)}"
    return handles[module]


def patchers_of(value: Any) -> list[Any]:
    """The ModelPatchers inside a MODEL, CLIP, VAE, FLASHVSR, CLIP_VISION, CONTROL_NET, GLIGEN or anything like them.

    Raises:
        TypeError: none is in it.
    """
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        return [value]
    if isinstance(getattr(value, "patcher", None), comfy.model_patcher.ModelPatcher):
        return [value.patcher]
    for method in ("patchers", "get_models"):  # ours, and a ControlNet's: itself and those before it
        if callable(getattr(value, method, None)):
            return list(getattr(value, method)())
    raise TypeError(f"expected a model; got {type(value).__name__}")


def residents(device: torch.device | None = None) -> list[Resident]:
    """What ComfyUI's list says is loaded, on one device or on all, largest first."""
    listed = [loaded for loaded in list(mm.current_loaded_models) if device is None or loaded.device == device]
    found = [resident for loaded in listed if (resident := _resident(loaded)) is not None]
    return sorted(found, key=lambda resident: -resident.bytes)


def _resident(loaded: Any) -> Resident | None:
    patcher = loaded.model
    module = patcher.model if patcher is not None else loaded.real_model and loaded.real_model()
    if module is None:
        return None
    name, handle = type(module).__name__, handle_of(module)
    if patcher is None:
        size = getattr(module, "model_loaded_weight_memory", 0)
        return Resident(name, loaded.device, size, size, None, None, True, handle)
    entry = registry().owner_of(patcher)
    policy, id = (None, None) if entry is None else (entry.policy, entry.id)
    return Resident(name, loaded.device, patcher.loaded_size(), patcher.model_size(), policy, id, False, handle)


def unload_others(device: torch.device, patchers: Sequence[Any]) -> bool:
    """Has ComfyUI move every model off a device except those of `patchers`; pinned ones stay.

    Returns:
        Whether the weights on the device became fewer.
    """
    own = [loaded for loaded in mm.current_loaded_models if any(loaded.model is patcher for patcher in patchers)]
    before = sum(resident.bytes for resident in residents(device))
    try:
        versions.free_memory(EVERYTHING, device, own)
    except versions.memory_errors() as error:  # to move a model takes memory, too
        if not versions.is_out_of_memory(error):
            raise
    versions.empty_caches()
    return sum(resident.bytes for resident in residents(device)) < before


def may_load(needed: int, device: torch.device) -> budget.Admission:
    """Whether that many bytes fit on a device now, by measurement, and what is in the way; see `budget.may_load`."""
    ours = [budget.Occupant(item.name, item.bytes, movable=not item.dead) for item in residents(device) if item.bytes]
    return budget.may_load(needed, probe.read(device, settled=True), ours)


def offload_model(value: Any, drop: Callable[[], None] = lambda: None) -> list[offload.Receipt]:
    """Moves every network of a MODEL, CLIP, VAE or FLASHVSR off its device, with a receipt for each.

    Kept and pinned models move too: keep and pin protect against others, not against who asks for this.

    Args:
        drop: lets go of the caller's own references after the move.

    Raises:
        TypeError: not a model.
    """
    return [offload.offload(subject(patcher), versions.empty_caches, drop=drop) for patcher in patchers_of(value)]


def subject(patcher: Any) -> offload.Subject:
    """One patcher as `memory.offload` sees it."""
    module = patcher.model

    def move() -> None:
        if not _listed(patcher) and patcher.loaded_size():
            adopt(patcher)
        own = {id(loaded) for loaded in _listed(patcher)}
        others = [loaded for loaded in mm.current_loaded_models if id(loaded) not in own]
        with explicit():
            versions.free_memory(EVERYTHING, patcher.load_device, others)

    return offload.Subject(
        name=type(module).__name__,
        load_device=patcher.load_device,
        offload_device=patcher.offload_device,
        loaded_bytes=patcher.loaded_size,
        move=move,
        tensors=lambda: [*module.named_parameters(), *module.named_buffers()],
        roots={
            "the patcher's backup": lambda: patcher.backup,
            "the patcher's hook backup": lambda: (patcher.hook_backup, patcher.cached_hook_patches),
            "ComfyUI's stream buffers": versions.stream_buffers,
            "ComfyUI's node cache": node_outputs,
        },
    )


def node_outputs() -> list[Any]:
    """What ComfyUI's caches keep of finished nodes, except models: those are moved, not held there."""
    # By name: the class lives in a module that starts the server's side when it is imported.
    executors = [item for item in gc.get_objects() if type(item).__name__ == "PromptExecutor"]
    kept = [value for executor in executors for value in versions.cached_outputs(executor)]
    return [value for value in kept if not is_model(value)]


class _Explicit(threading.local):
    depth = 0


@contextmanager
def explicit() -> Iterator[None]:
    """Marks what this thread asks of ComfyUI as the owner's own wish, from which nothing is protected."""
    mark = shared("explicit", _Explicit)
    mark.depth += 1
    try:
        yield
    finally:
        mark.depth -= 1


def is_explicit() -> bool:
    """Whether this thread is inside `explicit()`."""
    return shared("explicit", _Explicit).depth > 0


class _LedgerPrompt:
    id: str | None = None
    began: float = 0.0


def prompt_ledger() -> ledger.Ledger:
    """The ledger of the process, which reads ComfyUI's devices. A new prompt begins a new sequence of phases."""
    book = ledger.current()
    devices = versions.torch_devices()
    if book.devices != devices:
        book.devices = devices
    running, last = prompt.running(), shared("ledger_prompt", _LedgerPrompt)
    if running is not None and running.id != last.id:
        last.id, last.began = running.id, time.perf_counter()
        book.begin_sequence()
    return book


def prompt_began() -> float:
    """When the prompt began in which `prompt_ledger` was last asked for: seconds of `time.perf_counter`."""
    return shared("ledger_prompt", _LedgerPrompt).began


def read_dynamic_vram() -> None:
    """Lets the process' probe see weights that ComfyUI keeps outside torch's allocator (dynamic VRAM)."""
    reader = probe.current()
    if isinstance(reader, probe.DeviceProbe):
        reader.dynamic = _dynamic_bytes


def _dynamic_bytes(device: torch.device) -> int | None:
    there = [loaded.model for loaded in list(mm.current_loaded_models) if loaded.device == device]
    regions = {id(region): region for patcher in there if (region := versions.dynamic_vram(patcher)) is not None}
    return sum(region.loaded_size() for region in regions.values()) if regions else None


def is_model(value: Any) -> bool:
    """Whether there are ModelPatchers in a value."""
    try:
        return bool(patchers_of(value))
    except TypeError:
        return False


def _listed(patcher: Any) -> list[Any]:
    return [
        loaded for loaded in mm.current_loaded_models if loaded.model is not None and same_model(loaded.model, patcher)
    ]
