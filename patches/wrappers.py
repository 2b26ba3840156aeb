"""Kept models stay through ComfyUI's freeing: wrappers around four functions, each ending in the original.

| function | what the wrapper adds |
|---|---|
| unload_all_models | kept entries are out of the list while the original runs, and back at their places afterwards |
| free_memory | kept entries are protected first; if that frees too little, KEPT ones may go, PINNED ones stay |
| soft_empty_cache | entries whose patcher died with a clone get their owner's patcher; RAM is yielded if it is short |
| load_models_gpu | after an error in the middle of a load, resident kept models are put back into the list |

ComfyUI's prompt worker has no guard around these calls: an exception here would end it for good. So whatever fails on
our account is logged once, and the original runs as if we were not there. With nothing kept nothing is done.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_management as mm
import psutil

from ..memory.host import trim
from ..memory.state import shared
from . import prompt, snapshots
from .residency import adopt, is_explicit
from .retention import KEPT, PINNED, registry, same_model

log = logging.getLogger("steadyvsr.patches")

NAMES = ("unload_all_models", "free_memory", "soft_empty_cache", "load_models_gpu")
LOW_RAM_SHARE, ENOUGH_RAM_SHARE = 0.10, 0.15
"""Kept models are released below the first, once, and again only after the second was reached in between."""


class _Thread(threading.local):
    depth = 0


class _State:
    """Of the process, whatever copy of this module was imported first."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self.failures: set[str] = set()
        self.ram_armed = True


def _state() -> _State:
    return shared("wrappers", _State)


@contextmanager
def _inside() -> Iterator[None]:
    """Calls from within go straight to the originals, of a second installation too."""
    thread = _state().thread
    thread.depth += 1
    try:
        yield
    finally:
        thread.depth -= 1


def _idle() -> bool:
    """Whether a wrapper has nothing to do: it was called from within another one, or nothing is kept."""
    return _state().thread.depth > 0 or not registry().keeps_anything


def _attempt(what: str, action: Callable[[], Any], otherwise: Any = None) -> Any:
    """Our own part of a wrapper: its failure is logged once with its traceback and changes nothing else."""
    try:
        return action()
    except Exception as error:
        if what not in _state().failures:
            _state().failures.add(what)
            log.error("%s failed; ComfyUI goes on as without SteadyVSR.", what, exc_info=error)
        return otherwise


def _lock() -> Any:
    """Some forks guard the list of models with a lock of their own."""
    return getattr(mm, "model_management_lock", None) or nullcontext()


def unload_all_models(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if _state().thread.depth > 0:
        return original(*arguments, **keywords)
    # The handler of an out-of-memory error calls this while the error is being handled: KEPT yields, PINNED stays.
    out_of_memory = isinstance(sys.exc_info()[1], mm.OOM_EXCEPTION)
    press = _attempt("snapshot", lambda: snapshots.begin("OOM" if out_of_memory else _caller()))
    with _inside(), _lock():
        hidden = _attempt("hiding kept models", lambda: _hide((PINNED,) if out_of_memory else (KEPT, PINNED)), [])
        try:
            return original(*arguments, **keywords)
        finally:
            _attempt("putting kept models back", lambda: _put_back(hidden))
            _attempt("snapshot", lambda: snapshots.unloaded(press))


def _caller() -> str:
    return "housekeeping" if prompt.in_work() else "button"


def _hide(policies: tuple[str, ...]) -> list[tuple[int, Any]]:
    """Takes kept entries out of ComfyUI's list, in place, and returns them with their positions."""
    models = mm.current_loaded_models
    kept = {id(loaded) for loaded in registry().listed(*policies)}
    hidden = [(index, loaded) for index, loaded in enumerate(models) if id(loaded) in kept]
    for index, _ in reversed(hidden):
        del models[index]
    return hidden


def _put_back(hidden: list[tuple[int, Any]]) -> None:
    # Read anew: other packs replace the list.
    models = mm.current_loaded_models
    for index, loaded in hidden:
        again = any(
            other.model is not None and loaded.model is not None and same_model(other.model, loaded.model)
            for other in models
        )
        if not again:
            models.insert(min(index, len(models)), loaded)


def free_memory(
    original: Callable[..., Any],
    memory_required: float,
    device: Any,
    keep_loaded: Any = (),
    *arguments: Any,
    **keywords: Any,
) -> Any:
    def stock() -> Any:
        return original(memory_required, device, list(keep_loaded), *arguments, **keywords)

    if _idle() or is_explicit():
        return stock()
    kept = _attempt("choosing kept models", registry().listed, [])
    if not kept or _attempt("reading the caller's wish", lambda: _means_ours(kept, device, keep_loaded), False):
        return stock()
    with _inside():
        before = {id(loaded): loaded.model_loaded_memory() for loaded in kept if loaded.model is not None}
        freed = original(memory_required, device, [*keep_loaded, *kept], *arguments, **keywords)
        if device is None or mm.get_free_memory(device) >= memory_required:
            return freed
        pinned = _attempt("choosing pinned models", lambda: registry().listed(PINNED), kept)
        if len(pinned) == len(kept):
            return freed
        more = original(memory_required, device, [*keep_loaded, *pinned], *arguments, **keywords)
        _attempt("counting yields", lambda: _count_yields(kept, before))
        return [*(freed or []), *(more or [])]


def _means_ours(kept: list[Any], device: Any, keep_loaded: Any) -> bool:
    """Whether the caller spares everything else on the device: then it means these models, not just memory."""
    if not keep_loaded:
        return False
    spared, ours = {id(loaded) for loaded in keep_loaded}, {id(loaded) for loaded in kept}
    rest = [x for x in mm.current_loaded_models if id(x) not in spared and (device is None or x.device == device)]
    return bool(rest) and all(id(loaded) in ours for loaded in rest)


def _count_yields(kept: list[Any], before: dict[int, int]) -> None:
    for loaded in kept:
        # Unloaded entries keep their patcher as long as its owner lives.
        patcher = loaded.model
        entry = None if patcher is None else registry().owner_of(patcher)
        if entry is not None and patcher.loaded_size() < before.get(id(loaded), 0):
            entry.yields += 1


def soft_empty_cache(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if _state().thread.depth > 0:
        return original(*arguments, **keywords)
    if snapshots.press_open():
        _attempt("snapshot", snapshots.was_reset)
    if registry().keeps_anything:
        _attempt("repair of entries", repair)
        _attempt("yielding RAM", yield_ram)
    result = original(*arguments, **keywords)
    if snapshots.press_open():
        _attempt("snapshot", snapshots.collected)
    return result


def repair() -> None:
    """Gives entries whose patcher died with a clone, while the owner keeps the module, the owner's patcher."""
    for loaded in mm.current_loaded_models:
        if loaded.model is not None or loaded.real_model is None:
            continue
        module = loaded.real_model()
        for entry in registry().owned():
            for patcher in entry.patchers:
                if patcher.model is module:
                    loaded._set_model(patcher)
                    loaded.device = patcher.load_device


def yield_ram() -> None:
    """Releases kept models while RAM is short, never while a prompt runs (attention calls this in mid-sampling)."""
    if prompt.in_work():
        return
    state, memory = _state(), psutil.virtual_memory()
    if memory.available >= ENOUGH_RAM_SHARE * memory.total:
        state.ram_armed = True
    if not state.ram_armed or memory.available >= LOW_RAM_SHARE * memory.total:
        return
    state.ram_armed = False
    missing = LOW_RAM_SHARE * memory.total - memory.available
    owned = registry().kept_bytes()
    if registry().yield_ram(lambda: owned - registry().kept_bytes() < missing, "less than a tenth of the RAM is free"):
        gc.collect()
        trim()


def load_models_gpu(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not registry().keeps_anything:
        return original(*arguments, **keywords)
    try:
        return original(*arguments, **keywords)
    except BaseException:
        _attempt("putting models back after an error", readopt)
        raise


def readopt() -> None:
    """Lists kept models again that are on their device and that ComfyUI has lost in the middle of a load."""
    known = [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]
    for entry in registry().owned():
        for patcher in entry.patchers:
            if patcher.loaded_size() and not any(same_model(patcher, other) for other in known):
                adopt(patcher)


BODIES: dict[str, Callable[..., Any]] = {
    "unload_all_models": unload_all_models,
    "free_memory": free_memory,
    "soft_empty_cache": soft_empty_cache,
    "load_models_gpu": load_models_gpu,
}


def install() -> None:
    """Puts the wrappers in place where they are not in the chain of calls; calling it again changes nothing."""
    for name in NAMES:
        if status_of(name) != "replaced":
            continue
        _wrap(name, getattr(mm, name), BODIES[name])


def _wrap(name: str, original: Callable[..., Any], body: Callable[..., Any]) -> None:
    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if not wrapper.steadyvsr_armed:  # type: ignore[attr-defined]
            return original(*arguments, **keywords)
        return body(original, *arguments, **keywords)

    wrapper.steadyvsr_wrapper = name  # type: ignore[attr-defined]
    wrapper.steadyvsr_armed = True  # type: ignore[attr-defined]
    setattr(mm, name, wrapper)


def uninstall() -> None:
    """Takes wrappers away where they are on top; those that others have wrapped again only stop to act."""
    for name in NAMES:
        top = getattr(mm, name)
        if getattr(top, "steadyvsr_wrapper", None) == name and "steadyvsr_armed" in vars(top):
            setattr(mm, name, top.__wrapped__)
            continue
        for link in _chain(top):
            if getattr(link, "steadyvsr_wrapper", None) == name:
                link.steadyvsr_armed = False


def status() -> dict[str, str]:
    """For each function: on top | in chain | replaced."""
    return {name: status_of(name) for name in NAMES}


def status_of(name: str) -> str:
    """Where our wrapper of a function stands. "replaced": it is not in the chain, as far as that can be followed."""
    for position, link in enumerate(_chain(getattr(mm, name))):
        if vars(link).get("steadyvsr_wrapper") == name and vars(link).get("steadyvsr_armed") and _ours(link):
            return "in chain" if position else "on top"
    return "replaced"


def _ours(link: Any) -> bool:
    """functools.wraps copies marks to a foreign wrapper around ours: only our own function tells its original apart."""
    return link.__code__.co_name == "wrapper" and link.__code__.co_filename == __file__


def _chain(function: Any) -> Iterator[Any]:
    """A function and what it wraps, as far as `__wrapped__` tells."""
    seen: set[int] = set()
    while callable(function) and hasattr(function, "__dict__") and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)
