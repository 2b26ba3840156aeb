"""Kept models stay through ComfyUI's freeing: wrappers around its functions, each of which runs the original.

| function | what the wrapper adds |
|---|---|
| unload_all_models | kept entries are out of the list meanwhile; a press is for every accelerator with a listed model |
| free_memory | kept entries are protected first; if that frees too little, KEPT ones may go, PINNED ones stay |
| free_memory | after an error in the middle of it, what was unloaded before the error leaves the list |
| unload_model_and_clones | nothing is protected from a caller that names the model it wants gone (since 0.33) |
| soft_empty_cache | entries whose patcher died with a clone get their owner's patcher; RAM is yielded if it is short |
| load_models_gpu | what will not fit is said, and refused beyond the limit of a phase |
| load_models_gpu | after an error in the middle of a load, resident kept models are put back into the list |
| throw_exception_if_processing_interrupted | a phase that takes more than its gate allows stops |
| PromptExecutor.execute | wishes of the prompt's loaders are read before it; after it, no kept model is in use |
| execution.execute | between two nodes, values are given up as asked, and RAM is yielded if it is short |
| PromptExecutor.reset | a press has come to its reset |
| PromptQueue.get | the worker does not wait while there are flags: a press during a garbage collection is heard |
| PromptQueue.get_flags | a turn begins: what waits is done, an older press is over, RAM is relieved if short |

The one call of the original empties the caches of all devices of a backend; nothing is added to it. With nothing kept,
models are not touched. chain.py says how a wrapper keeps our failures from ComfyUI.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import psutil
import torch

from ..memory.host import trim
from ..memory.process import shared
from ..memory.reading import size_text
from . import chain, idle, limits, presses, prompt, versions
from .chain import Hook, attempt, state
from .kept import KEPT, PINNED, list_again, registry, same_model
from .residency import EVERYTHING, explicit, is_explicit, look

CPU = torch.device("cpu")
NAMES = ("unload_all_models", "free_memory", "soft_empty_cache", "load_models_gpu")


@contextmanager
def _inside() -> Iterator[None]:
    """Calls from inside go straight to the originals, even through wrappers of a second installation."""
    thread = state().thread
    thread.depth += 1
    try:
        yield
    finally:
        thread.depth -= 1


def unload_all_models(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    if state().thread.depth > 0:
        return original(*arguments, **keywords)
    # ComfyUI calls this while it handles an out-of-memory error: then KEPT yields, and PINNED stays.
    error = sys.exc_info()[1]
    out_of_memory = attempt("reading an error", lambda: versions.is_out_of_memory(error), False)
    in_work = attempt("reading the queue", prompt.in_work, False)
    caller = "OOM" if out_of_memory else "housekeeping" if in_work else "button"
    if caller == "housekeeping" and not registry().keeps_anything:
        return original(*arguments, **keywords)
    press = attempt("snapshot", lambda: presses.begin(caller))
    with _inside(), versions.list_lock():
        attempt("repair of entries", repair)
        before = attempt("counting yields", _resident_bytes, {}) if out_of_memory else {}
        hidden = attempt("hiding kept models", lambda: _hide(original, out_of_memory), [])
        try:
            result = original(*arguments, **keywords)
            if caller == "button":
                attempt("unloading other devices", _unload_everywhere)
            return result
        finally:
            attempt("putting kept models back", lambda: _put_back(hidden))
            attempt("counting yields", lambda: _count_yields(before))
            if press is not None:
                attempt("snapshot", press.unloaded)
            attempt("looking at models", look)


def _unload_everywhere() -> None:
    """A press means every accelerator that has a listed model; 0.3.64 unloads its current one alone."""
    devices = dict.fromkeys(loaded.device for loaded in mm.current_loaded_models if loaded.model is not None)
    for device in [device for device in devices if device not in (CPU, mm.get_torch_device())]:
        versions.free_memory(EVERYTHING, device, [])


def _hide(original: chain.Original, out_of_memory: bool) -> list[tuple[int, Any]]:
    """Takes kept entries out of ComfyUI's list, in place, and returns them with their positions."""
    models = mm.current_loaded_models
    kept = {id(loaded) for loaded in registry().listed(*((PINNED,) if out_of_memory else (KEPT, PINNED)))}
    # Another pack's function may read the patcher of every entry; an entry without one would end the worker.
    spare_dead = registry().keeps_anything and getattr(original.function, "__module__", None) != mm.__name__
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


def free_memory(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    try:
        return _free_memory(original, *arguments, **keywords)
    except BaseException:
        attempt("striking off what was unloaded before an error", _strike_off)
        raise


def _strike_off() -> None:
    """Takes entries of nothing out of the list. ComfyUI does so after the last unload, and fails at them ever after."""
    models = mm.current_loaded_models
    for index in reversed(range(len(models))):
        if models[index].real_model is None:
            del models[index]


def _free_memory(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    if state().thread.depth > 0 or not registry().keeps_anything or is_explicit():
        return original(*arguments, **keywords)
    asked = attempt("reading a wish for memory", lambda: _Asked.of(arguments, keywords))
    with _inside():
        attempt("repair of entries", repair)
        kept = attempt("choosing kept models", registry().listed, [])
        if asked is None or not kept:
            return original(*arguments, **keywords)
        before = attempt("counting yields", _resident_bytes, {})
        freed = asked.call(original, kept)
        attempt("marking idle models", lambda: asked.mark_idle(kept))
        if not attempt("reading free memory", asked.short, False):
            return freed
        pinned = attempt("choosing pinned models", lambda: registry().listed(PINNED), kept)
        if len(pinned) == len(kept):
            return freed
        more = asked.call(original, pinned)
        attempt("counting yields", lambda: _count_yields(before))
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

    def call(self, original: chain.Original, protected: list[Any]) -> Any:
        spared = [*self.spared, *protected]
        if len(self.arguments) > 2:
            return original(*self.arguments[:2], spared, *self.arguments[3:], **self.keywords)
        return original(*self.arguments, **{**self.keywords, "keep_loaded": spared})

    def short(self) -> bool:
        return self.device is not None and mm.get_free_memory(self.device) < self.required

    def mark_idle(self, kept: list[Any]) -> None:
        """What ComfyUI does to every model that it may unload: a ControlNet loads those again that are in use."""
        for loaded in kept:
            if loaded.device == self.device and loaded not in self.spared:
                loaded.currently_used = False


def _resident_bytes() -> dict[str, int]:
    """Of every model that may yield."""
    return {entry.id: sum(patcher.loaded_size() for patcher in entry.patchers) for entry in registry().owned(KEPT)}


def _count_yields(before: dict[str, int]) -> None:
    now = _resident_bytes()
    for entry in registry().owned(KEPT):
        entry.yields += now[entry.id] < before.get(entry.id, 0)


def unload_model_and_clones(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    with explicit():
        return original(*arguments, **keywords)


def soft_empty_cache(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    thread, press = state().thread, presses.open_press()
    if thread.depth > 0 or thread.emptying or not (press is not None or registry().keeps_anything):
        return original(*arguments, **keywords)
    # A mark of its own: if the original, another pack's, unloads models, then kept ones are still to be protected.
    thread.emptying = True
    try:
        in_work = attempt("reading the queue", prompt.in_work, True)
        if press is not None and (in_work or is_explicit()):
            # What a prompt or an owner moves now is not the doing of a press that nobody has ended.
            attempt("snapshot", press.end)
        if registry().keeps_anything:
            attempt("repair of entries", repair)
            if not in_work:  # attention empties caches in mid-sampling
                attempt("yielding RAM", yield_ram)
        result = original(*arguments, **keywords)
        if press is not None:
            attempt("snapshot", press.emptied)
        if not in_work:
            attempt("looking at models", look)
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


def yield_ram(running: prompt.RunningPrompt | None = None) -> None:
    """Releases kept models while RAM is short; called at a safe point.

    Args:
        running: a prompt whose models stay.
    """
    available, least = psutil.virtual_memory().available, registry().least_available_bytes()
    shortage = shared("shortage_of_kept_models", idle.Shortage)
    if not shortage.is_new(available, least):
        return
    shortage.armed = False
    owned = registry().kept_bytes()
    if registry().yield_ram(
        lambda: owned - registry().kept_bytes() < least - available,
        f"less than {size_text(least)} of RAM are free",
        running,
    ):
        gc.collect()
        trim()


def load_models_gpu(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    thread = state().thread
    if thread.loading:
        return original(*arguments, **keywords)
    stopped = attempt("predicting a load", lambda: limits.refusal(*arguments[:2], **_named(keywords)))
    if stopped is not None:
        raise stopped
    thread.loading = True
    try:
        if registry().keeps_anything:
            attempt("repair of entries", repair)
            attempt("noting use", lambda: registry().used(arguments[0] if arguments else keywords["models"]))
        return original(*arguments, **keywords)
    except BaseException:
        if registry().keeps_anything:
            attempt("putting models back after an error", relist)
        raise
    finally:
        thread.loading = False
        attempt("looking at models", look)


def _named(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: keywords[name] for name in ("models", "memory_required") if name in keywords}


def throw_if_interrupted(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    result = original(*arguments, **keywords)
    stopped = attempt("reading a phase's peak", limits.exceeded)
    if stopped is not None:
        raise stopped
    return result


def relist() -> None:
    """Lists kept models again that ComfyUI lost in the middle of a load, each with a living patcher."""
    repair()
    list_again(patcher for entry in registry().owned() for patcher in entry.patchers)


def prompt_runs(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    attempt("reading a prompt's wishes", lambda: _prompt_begins(*arguments, **keywords))
    try:
        return original(*arguments, **keywords)
    finally:
        attempt("ending a prompt", _prompt_ends)


def _prompt_begins(executor: Any, nodes: dict[str, Any], prompt_id: str, *_: Any, **__: Any) -> None:
    prompt.worker_is_here()
    install()  # a pack may have replaced a function since
    registry().prompt_begins(prompt.RunningPrompt(prompt_id, "", nodes))
    look()


def _prompt_ends() -> None:
    for loaded in registry().listed():
        loaded.currently_used = False
    registry().settle()
    look()


def between_nodes(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    """Before a node executes, and again before one that has waited for others."""
    attempt("what waits for the end of a node", _node_ended)
    return original(*arguments, **keywords)  # a coroutine


def _node_ended() -> None:
    prompt.worker_is_here()
    registry().settle()
    if registry().keeps_anything:
        yield_ram(prompt.queued())
    look()


def reset(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    result = original(*arguments, **keywords)
    if (press := presses.open_press()) is not None:
        attempt("snapshot", press.was_reset)
    return result


def get(original: chain.Original, queue: Any, *arguments: Any, **keywords: Any) -> Any:
    prompt.worker_is_here()
    # A flag that is set while the worker collects garbage wakes nobody: without this it waits for the next prompt.
    with idle.lock_of(queue, original.function):
        timeout = keywords.get("timeout", arguments[0] if arguments else None)
        if timeout is not None and attempt("hearing a press", lambda: bool(queue.flags and not queue.queue), False):
            return None  # as if the time were up: the worker then asks for flags
        if keywords.get("timeout") is not None:
            keywords["timeout"] = min(keywords["timeout"], idle.LOOK_SECONDS)
        return original(queue, *arguments, **keywords)


def get_flags(original: chain.Original, *arguments: Any, **keywords: Any) -> Any:
    flags = original(*arguments, **keywords)
    prompt.worker_is_here()
    attempt("snapshot", presses.end_open)
    attempt("giving up models", registry().settle)
    idle.run_waiting()
    attempt("looking at models", look)
    return attempt("RAM relief", lambda: idle.relief().flags(arguments[0], flags), flags)


STAY = "kept models stay"
HOOKS = {
    hook.name: hook
    for hook in (
        Hook("unload_all_models", unload_all_models, f"{STAY} through Unload Models and at the end of prompts"),
        Hook(
            "free_memory",
            free_memory,
            f"{STAY} on their device when others need little room, and pinned ones always",
            ("memory_required", "device", "keep_loaded"),
        ),
        Hook("soft_empty_cache", soft_empty_cache, f"{STAY} usable when a copy of them is gone, and yield RAM"),
        Hook(
            "load_models_gpu",
            load_models_gpu,
            f"{STAY} in ComfyUI's books after a load has failed, and what will not fit is said before",
            ("models",),
            raises=(limits.PhaseLimitExceeded,),
        ),
        Hook(
            "throw_exception_if_processing_interrupted",
            throw_if_interrupted,
            "a phase that takes more than its gate allows is stopped at its gate, not before",
            raises=(limits.PhaseLimitExceeded,),
        ),
        Hook(
            "unload_model_and_clones",
            unload_model_and_clones,
            "ComfyUI can take a pinned model off its device by name",
            required=False,
        ),
        Hook(
            "PromptExecutor.execute",
            prompt_runs,
            "a loader's keep_loaded holds also where ComfyUI has cached the loader",
            ("self", "prompt", "prompt_id"),
        ),
        Hook("execution.execute", between_nodes, "kept models yield RAM, and are released, while a prompt runs"),
        Hook("PromptExecutor.reset", reset, "a press tells what dropping the node cache did", ("self",)),
        Hook(
            "PromptQueue.get",
            get,
            "a press during a garbage collection is heard before the next prompt",
            ("self", "timeout"),
        ),
        Hook("PromptQueue.get_flags", get_flags, "the panel's buttons act between prompts", ("self",)),
    )
}


def install() -> None:
    """Puts the wrappers in place where they are not in the chain of calls; calling it again changes nothing."""
    chain.install(HOOKS.values())


def uninstall() -> None:
    """Takes wrappers away where they are on top; those that others have wrapped stay and do nothing more."""
    chain.uninstall(HOOKS.values())


def status() -> dict[str, str]:
    """For each function where its wrapper stands (`chain.status_of`), without what only other versions have."""
    found = {name: chain.status_of(hook) for name, hook in HOOKS.items()}
    return {name: status for name, status in found.items() if HOOKS[name].required or status != "missing"}


def promises_off() -> list[str]:
    """What cannot be promised in this ComfyUI, in words.

    "replaced" is not among it: another pack's wrapper may well call ours, and the next prompt puts ours back on top.
    """
    off = [HOOKS[name].promise for name, where in status().items() if where in ("missing", "does not fit", "off")]
    if versions.dynamic_vram_is_on():
        off.append("pinned models stay on the card: with dynamic VRAM the driver takes and brings back their pages")
    return off
