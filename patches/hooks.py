"""Kept models stay through ComfyUI's freeing: wrappers around its functions, each of which runs the original.

| function | what the wrapper adds |
|---|---|
| unload_all_models | kept entries are out of the list while the original runs, and back at their places afterwards |
| free_memory | kept entries are protected first; if that frees too little, KEPT ones may go, PINNED ones stay |
| soft_empty_cache | entries whose patcher died with a clone get their owner's patcher; RAM is yielded if it is short |
| load_models_gpu | after an error in the middle of a load, resident kept models are put back into the list |
| PromptExecutor.reset | a press has come to its reset |
| PromptQueue.get_flags | ComfyUI's worker begins a turn: what waits for it is done, and an older press is over |

The one call of the original empties the caches of all devices of a backend; nothing is added to it.

ComfyUI's prompt worker has no guard around these calls: an exception here would end it for good. So whatever fails on
our account is logged once, and the original runs as if we were not there. With nothing kept, models are not touched.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import psutil

from ..memory.host import trim
from ..memory.process import shared
from ..memory.reading import size_text
from . import idle, presses, prompt, versions
from .kept import KEPT, PINNED, registry, same_model
from .residency import adopt, is_explicit

log = logging.getLogger("steadyvsr.patches")

NAMES = ("unload_all_models", "free_memory", "soft_empty_cache", "load_models_gpu")
ENOUGH_RAM = 1.5
"""Times the registry's `least_available_bytes`: RAM is yielded once below it, and again only after this was reached."""


class _Thread(threading.local):
    depth = 0
    loading = False
    emptying = False


class _State:
    """One for the process, whatever copy of this module was imported first."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self.failures: set[str] = set()
        self.ram_armed = True
        self.placed: list[Any] = []


def _state() -> _State:
    return shared("wrappers", _State)


@contextmanager
def _inside() -> Iterator[None]:
    """Calls from inside go straight to the originals, even through wrappers of a second installation."""
    thread = _state().thread
    thread.depth += 1
    try:
        yield
    finally:
        thread.depth -= 1


def _attempt(what: str, action: Callable[[], Any], otherwise: Any = None) -> Any:
    """Runs our own part of a wrapper; a failure is logged once with its traceback and changes nothing else."""
    try:
        return action()
    except Exception as error:
        if what not in _state().failures:
            _state().failures.add(what)
            log.error("%s failed; ComfyUI continues as it would without SteadyVSR.", what, exc_info=error)
        return otherwise


def unload_all_models(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if _state().thread.depth > 0:
        return original(*arguments, **keywords)
    # ComfyUI calls this while it handles an out-of-memory error: then KEPT yields, and PINNED stays.
    error = sys.exc_info()[1]
    out_of_memory = _attempt("reading an error", lambda: versions.is_out_of_memory(error), False)
    caller = "OOM" if out_of_memory else "housekeeping" if prompt.in_work() else "button"
    if caller == "housekeeping" and not registry().keeps_anything:
        return original(*arguments, **keywords)
    press = _attempt("snapshot", lambda: presses.begin(caller))
    with _inside(), versions.list_lock():
        _attempt("repair of entries", repair)
        before = _attempt("counting yields", _resident_bytes, {}) if out_of_memory else {}
        hidden = _attempt("hiding kept models", lambda: _hide(original, out_of_memory), [])
        try:
            return original(*arguments, **keywords)
        finally:
            _attempt("putting kept models back", lambda: _put_back(hidden))
            _attempt("counting yields", lambda: _count_yields(before))
            if press is not None:
                _attempt("snapshot", press.unloaded)


def _hide(original: Callable[..., Any], out_of_memory: bool) -> list[tuple[int, Any]]:
    """Takes kept entries out of ComfyUI's list, in place, and returns them with their positions."""
    models = mm.current_loaded_models
    kept = {id(loaded) for loaded in registry().listed(*((PINNED,) if out_of_memory else (KEPT, PINNED)))}
    # Another pack's function may read the patcher of every entry; an entry without one would end the worker.
    spare_dead = registry().keeps_anything and getattr(original, "__module__", None) != mm.__name__
    hidden = [
        (index, loaded)
        for index, loaded in enumerate(models)
        if id(loaded) in kept or (spare_dead and loaded.model is None)
    ]
    for index, _ in reversed(hidden):
        del models[index]
    return hidden


def _put_back(hidden: list[tuple[int, Any]]) -> None:
    # Read anew: other packs replace the list.
    models = mm.current_loaded_models
    for index, loaded in hidden:
        if loaded.model is None and (loaded.real_model is None or loaded.real_model() is None):
            continue  # its network died meanwhile, and ComfyUI could not strike it off
        again = any(
            other.model is not None and loaded.model is not None and same_model(other.model, loaded.model)
            for other in models
        )
        if not again:
            models.insert(min(index, len(models)), loaded)
    repair()  # what the original collected as garbage may have held a patcher


def free_memory(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if _state().thread.depth > 0 or not registry().keeps_anything or is_explicit():
        return original(*arguments, **keywords)
    asked = _attempt("reading a wish for memory", lambda: _Asked.of(arguments, keywords))
    with _inside():
        _attempt("repair of entries", repair)
        kept = _attempt("choosing kept models", registry().listed, [])
        if asked is None or not kept or _attempt("reading a wish for memory", lambda: asked.means_only(kept), False):
            return original(*arguments, **keywords)
        before = _attempt("counting yields", _resident_bytes, {})
        freed = asked.call(original, kept)
        if not _attempt("reading free memory", asked.short, False):
            return freed
        pinned = _attempt("choosing pinned models", lambda: registry().listed(PINNED), kept)
        if len(pinned) == len(kept):
            return freed
        more = asked.call(original, pinned)
        _attempt("counting yields", lambda: _count_yields(before))
        return [*(freed or []), *(more or [])]


@dataclass(frozen=True)
class _Asked:
    """A call of free_memory. Parameters that a version or a fork has added are passed on as they came."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    required: float
    device: Any
    spared: Any

    @classmethod
    def of(cls, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> _Asked:
        named = {**dict(zip(("memory_required", "device", "keep_loaded"), arguments, strict=False)), **keywords}
        return cls(arguments, keywords, named["memory_required"], named["device"], list(named.get("keep_loaded") or ()))

    def call(self, original: Callable[..., Any], protected: list[Any]) -> Any:
        spared = [*self.spared, *protected]
        if len(self.arguments) > 2:
            return original(*self.arguments[:2], spared, *self.arguments[3:], **self.keywords)
        return original(*self.arguments, **{**self.keywords, "keep_loaded": spared})

    def short(self) -> bool:
        return self.device is not None and mm.get_free_memory(self.device) < self.required

    def means_only(self, kept: list[Any]) -> bool:
        """Whether the caller asks for more than a device has and spares all but kept models: then it means these."""
        if not self.spared or self.device is None or self.required <= mm.get_total_memory(self.device):
            return False
        spared, ours = {id(loaded) for loaded in self.spared}, {id(loaded) for loaded in kept}
        rest = [x for x in mm.current_loaded_models if id(x) not in spared and x.device == self.device]
        return bool(rest) and all(id(loaded) in ours for loaded in rest)


def _resident_bytes() -> dict[str, int]:
    """Of every model that may yield."""
    return {entry.id: sum(patcher.loaded_size() for patcher in entry.patchers) for entry in registry().owned(KEPT)}


def _count_yields(before: dict[str, int]) -> None:
    now = _resident_bytes()
    for entry in registry().owned(KEPT):
        entry.yields += now[entry.id] < before.get(entry.id, 0)


def soft_empty_cache(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    thread, press = _state().thread, presses.open_press()
    if thread.depth > 0 or thread.emptying or not (press is not None or registry().keeps_anything):
        return original(*arguments, **keywords)
    # A mark of its own: if the original, another pack's, unloads models, then kept ones are still to be protected.
    thread.emptying = True
    try:
        if press is not None and (prompt.in_work() or is_explicit()):
            # What a prompt or an owner moves now is not the doing of a press that nobody has ended.
            _attempt("snapshot", press.end)
        if registry().keeps_anything:
            _attempt("repair of entries", repair)
            _attempt("yielding RAM", yield_ram)
        result = original(*arguments, **keywords)
        if press is not None:
            _attempt("snapshot", press.emptied)
        return result
    finally:
        thread.emptying = False


def repair() -> None:
    """Gives the owner's patcher to entries whose own patcher, a clone, has died while the owner keeps the module.

    Without a patcher, an entry can neither be used nor freed. If the module is listed again by now, the entry goes.
    """
    models = mm.current_loaded_models
    dead = [loaded for loaded in list(models) if loaded.model is None and loaded.real_model is not None]
    if not dead:
        return  # asked at every step of sampling
    owners = {id(patcher.model): patcher for entry in registry().owned() for patcher in entry.patchers}
    listed = {id(loaded.model.model) for loaded in models if loaded.model is not None}
    for loaded in dead:
        module = loaded.real_model()
        patcher = owners.get(id(module))
        if patcher is None:
            continue
        if id(module) in listed:
            # By identity: two dead entries are equal.
            del models[next(index for index, other in enumerate(models) if other is loaded)]
            loaded.model_finalizer.detach()
            continue
        loaded._set_model(patcher)
        loaded.device = patcher.load_device
        listed.add(id(module))


def yield_ram() -> None:
    """Releases kept models while RAM is short, but not during a prompt: attention empties caches in mid-sampling."""
    if prompt.in_work():
        return
    state, available, least = _state(), psutil.virtual_memory().available, registry().least_available_bytes()
    if available >= ENOUGH_RAM * least:
        state.ram_armed = True
    if not state.ram_armed or available >= least:
        return
    state.ram_armed = False
    owned = registry().kept_bytes()
    if registry().yield_ram(
        lambda: owned - registry().kept_bytes() < least - available, f"less than {size_text(least)} of RAM are free"
    ):
        gc.collect()
        trim()


def load_models_gpu(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    thread = _state().thread
    if thread.loading or not registry().keeps_anything:
        return original(*arguments, **keywords)
    thread.loading = True
    try:
        _attempt("repair of entries", repair)
        return original(*arguments, **keywords)
    except BaseException:
        _attempt("putting models back after an error", readopt)
        raise
    finally:
        thread.loading = False


def readopt() -> None:
    """Lists kept models again that are on their device, but that ComfyUI lost in the middle of a load."""
    repair()
    known = [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]
    for patcher in (patcher for entry in registry().owned() for patcher in entry.patchers):
        if patcher.loaded_size() and not any(same_model(patcher, other) for other in known):
            adopt(patcher)


def reset(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    result = original(*arguments, **keywords)
    if (press := presses.open_press()) is not None:
        _attempt("snapshot", press.was_reset)
    return result


def get_flags(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    flags = original(*arguments, **keywords)
    _attempt("snapshot", presses.end_open)
    idle.run_waiting()
    return flags


BODIES: dict[str, Callable[..., Any]] = {
    "unload_all_models": unload_all_models,
    "free_memory": free_memory,
    "soft_empty_cache": soft_empty_cache,
    "load_models_gpu": load_models_gpu,
    "PromptExecutor.reset": reset,
    "PromptQueue.get_flags": get_flags,
}


def install() -> None:
    """Puts the wrappers in place where they are not in the chain of calls; calling it again changes nothing.

    A function that this ComfyUI does not have costs its own wrapper only.
    """
    for name in BODIES:
        if status_of(name) == "replaced":
            _wrap(name)


def _place(name: str) -> tuple[Any, str]:
    """What has the function: ComfyUI's model management, or a class of its worker (None without a server)."""
    owner, _, attribute = name.rpartition(".")
    return (getattr(sys.modules.get("execution"), owner, None) if owner else mm), attribute


def _wrap(name: str) -> None:
    owner, attribute = _place(name)
    original, body = getattr(owner, attribute), BODIES[name]

    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if not wrapper.steadyvsr_armed:  # type: ignore[attr-defined]
            return original(*arguments, **keywords)
        return body(original, *arguments, **keywords)

    wrapper.steadyvsr_wrapper = name  # type: ignore[attr-defined]
    wrapper.steadyvsr_armed = True  # type: ignore[attr-defined]
    setattr(owner, attribute, wrapper)
    _state().placed.append(wrapper)


def uninstall() -> None:
    """Takes wrappers away where they are on top; those that others have wrapped stay and do nothing more."""
    for name in BODIES:
        owner, attribute = _place(name)
        top: Any = getattr(owner, attribute, None)
        if _ours(top, name):
            setattr(owner, attribute, top.__wrapped__)
    # All of them: others' wrappers need not say what they wrap.
    for wrapper in _state().placed:
        wrapper.steadyvsr_armed = False
    _state().placed.clear()


def status() -> dict[str, str]:
    """For each function: on top | in chain | replaced | missing; see `status_of`."""
    return {name: status_of(name) for name in BODIES}


def status_of(name: str) -> str:
    """Where our wrapper of a function stands.

    "replaced": it is not in the chain of wrappers, as far as that can be followed. "missing": no such function.
    """
    owner, attribute = _place(name)
    function = getattr(owner, attribute, None)
    if function is None:
        return "missing"
    for position, link in enumerate(_chain(function)):
        if _ours(link, name) and link.steadyvsr_armed:
            return "in chain" if position else "on top"
    return "replaced"


def _ours(link: Any, name: str) -> bool:
    """By its code: functools.wraps copies our marks to a foreign wrapper around ours."""
    code = getattr(link, "__code__", None)
    return (
        code is not None
        and vars(link).get("steadyvsr_wrapper") == name
        and (code.co_name, code.co_filename) == ("wrapper", __file__)
    )


def _chain(function: Any) -> Iterator[Any]:
    """A function and what it wraps, as far as `__wrapped__` says."""
    seen: set[int] = set()
    while callable(function) and hasattr(function, "__dict__") and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)
