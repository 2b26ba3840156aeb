"""The wrappers themselves: what passes through them, how they are put in place and taken away, what they say.

    python tests/patches/free_wrappers.py PACK_FOLDER double        anywhere
    python tests/patches/free_wrappers.py PACK_FOLDER comfyui       in ComfyUI's folder, by ComfyUI's Python

The last line of its output is JSON: scenario → what was seen. Models are those of free_worlds.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "session"))
    importlib.import_module("comfyui_place").prepare(sys.argv[2], Path(sys.argv[1]))

import torch  # noqa: E402
from free_worlds import ERRORS, EVERYTHING, FIRST, A, B, C, D, E, World, hooks, kept, mm, owned, presses, ram  # noqa: E402

probe: Any = importlib.import_module("steadyvsr.memory.probe")
reading: Any = importlib.import_module("steadyvsr.memory.reading")
residency: Any = importlib.import_module("steadyvsr.patches.residency")


@contextmanager
def beneath(name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Puts a function in ComfyUI's place, under our wrappers."""
    hooks.uninstall()
    original = getattr(mm, name)
    setattr(mm, name, stand_in)
    hooks.install()
    try:
        yield
    finally:
        hooks.uninstall()
        setattr(mm, name, original)
        hooks.install()


def silently(original: Callable[..., Any]) -> Callable[..., Any]:
    """Another pack's wrapper that does not say what it wraps."""
    return lambda *arguments, **keywords: original(*arguments, **keywords)


def order() -> str:
    """ComfyUI's list as it is, not sorted."""
    return "".join(type(loaded.model.model).__name__ for loaded in mm.current_loaded_models if loaded.model is not None)


def explicit(world: World) -> dict:
    """An owner's own wish in one thread, while another thread asks without it. C is pinned."""
    world.prompt(A, B, C)
    kept.registry().set_policy(next(e.id for e in kept.registry().owned() if e.name == "C"), "pin")
    mm.free_memory(1e30, FIRST)
    seen = {"without": world.state()}
    world.prompt(B)
    with residency.explicit():
        other = threading.Thread(target=mm.unload_all_models)
        other.start()
        other.join()
        seen["other thread"] = world.state()
        mm.free_memory(1e30, FIRST)
        seen["within"] = world.state()
    world.prompt(B, C)
    mm.unload_all_models()
    press = presses.last_press()
    return seen | {"after": world.state(), "lost": press and len(press.lost)}


def meant(world: World) -> dict:
    """A call that asks for all of a device and spares all but a pinned model, our own, and 0.33's function for one."""
    world.prompt(A, B, C)
    kept.registry().set_policy(next(e.id for e in kept.registry().owned() if e.name == "C"), "pin")
    others = [loaded for loaded in mm.current_loaded_models if type(loaded.model.model).__name__ != "C"]
    mm.free_memory(1e30, FIRST, keep_loaded=others)
    seen = {"others": world.state()}
    del others
    world.prompt(A, B)
    a = world.node(*A)
    residency.unload_others(FIRST, [a])
    seen["the ladders"] = world.state()
    residency.unload_others(FIRST, [a])
    seen["again"] = world.state()
    del a
    if hasattr(mm, "unload_model_and_clones"):
        mm.unload_model_and_clones(world.node(*C))
        seen["by ComfyUI"] = world.state()
    return seen


def budget(world: World) -> dict:
    """RAM for two kept models: in a prompt of three, and in the next ones."""
    kept.registry().ram_budget_bytes = 2 << 20
    seen = {}
    for steps in ((B, C, D), (E,), (B,)):
        world.cache.outputs.clear()
        world.prompt(*steps)
        seen["".join(name for name, _ in steps)] = owned()
    return seen


def file(world: World) -> dict:
    """A kept model's loader runs again: with the same file, and with another one under its name."""
    seen = {}
    for name in ("first", "same file", "other file"):
        if name == "other file":
            world.path("B").write_text("another B")
        world.cache.outputs.clear()
        world.prompt(B)
        gc.collect()
        mm.soft_empty_cache()
        seen[name] = [world.reads["B"], world.state(), owned()]
    return seen


def passes_through(world: World) -> dict:
    """An interrupt and an error from within each of the four functions, with kept models listed."""
    seen = {}
    for name in hooks.NAMES:
        for error in (mm.InterruptProcessingException(), RuntimeError("planted")):
            world.__init__(world.column)
            world.prompt(B, C)

            def raising(*arguments: Any, planted: BaseException = error, **keywords: Any) -> Any:
                raise planted

            given = {"free_memory": (1e9, FIRST), "load_models_gpu": ([world.node(*B)],)}.get(name, ())
            with beneath(name, raising):
                try:
                    getattr(mm, name)(*given)
                    came = "nothing"
                except BaseException as caught:  # noqa: B036
                    came = "the same" if caught is error else repr(caught)
            seen[f"{name} {type(error).__name__}"] = [came, world.state()]
    return seen | {"thread": vars(sys.modules["steadyvsr_state"])["wrappers"].thread.depth}


def arguments(world: World) -> dict:
    """Parameters that a version or a fork has added, by place and by name."""
    world.prompt(B)
    calls: list = []

    def recorded(*arguments: Any, **keywords: Any) -> list:
        spared = keywords.get("keep_loaded", arguments[2] if len(arguments) > 2 else None)
        plain = {name: value for name, value in keywords.items() if name != "keep_loaded"}
        calls.append([arguments[0], len(arguments), [type(x.model.model).__name__ for x in spared or ()], plain])
        return ["gone"]

    with beneath("free_memory", recorded):
        results = [
            mm.free_memory(1, FIRST, for_dynamic=True),
            mm.free_memory(2, FIRST, [], True, pins_required=7),
            mm.free_memory(3, device=None, keep_loaded=[], ram_required=5),
        ]
    with beneath("soft_empty_cache", lambda *arguments, **keywords: (arguments, keywords)):
        results.append(mm.soft_empty_cache(True))
    with beneath("unload_all_models", lambda *arguments, **keywords: (arguments, keywords)):
        results.append(mm.unload_all_models("all", hard=True))
    return {"calls": calls, "results": results}


def places(world: World) -> dict:
    """Kept entries go back where they were, but for one that was loaded again in the meantime."""
    world.prompt(("X", False), B, ("Y", False), C, A)
    before = order()
    held: list[str] = []
    with beneath("unload_all_models", lambda: held.append(order())):
        mm.unload_all_models()
    seen = {"before": before, "hidden": held, "after": order()}
    with beneath("unload_all_models", lambda: mm.load_models_gpu([world.node(*B)])):
        mm.unload_all_models()
    return seen | {"loaded again": order()}


def dead(world: World) -> dict:
    """Another pack's function reads the patcher of every entry, and one has none; then that network dies meanwhile."""
    world.prompt(B)
    zombie = world.read("Z")
    mm.load_models_gpu([zombie])
    held = [zombie.model]
    del zombie
    found: list[str] = []

    def careless() -> None:
        found.extend(type(loaded.model.model).__name__ for loaded in mm.current_loaded_models)

    def dropping() -> None:
        held.clear()
        gc.collect()

    seen = {"before": world.state()}
    with beneath("unload_all_models", careless):
        mm.unload_all_models()
    seen |= {"found": found, "after": world.state()}
    with beneath("unload_all_models", dropping):
        mm.unload_all_models()
    mm.cleanup_models_gc()
    return seen | {"died": world.state(), "entries": len(mm.current_loaded_models)}


def installing(world: World) -> dict:
    """Twice, and taken away: alone, and beneath another pack's wrappers of either kind."""
    plain = {name: getattr(mm, name).__wrapped__ for name in hooks.NAMES}
    top = {name: getattr(mm, name) for name in hooks.NAMES}
    hooks.install()
    seen = {"twice": all(getattr(mm, name) is top[name] for name in hooks.NAMES)}
    hooks.uninstall()
    seen["gone"] = all(getattr(mm, name) is plain[name] for name in hooks.NAMES)
    for kind in ("telling", "silent"):
        hooks.install()
        wrapped = getattr(mm, "unload_all_models")  # noqa: B009
        called: list[str] = []

        def foreign(wrapped: Any = wrapped, called: list = called) -> Any:
            called.append("foreign")
            return wrapped()

        if kind == "telling":
            foreign.__wrapped__ = wrapped  # type: ignore[attr-defined]
        mm.unload_all_models = foreign
        found = [hooks.status()["unload_all_models"]]
        hooks.uninstall()
        found.append(hooks.status()["unload_all_models"])
        world.cache.outputs.clear()
        world.prompt(B)
        mm.unload_all_models()
        seen[kind] = {"status": found, "still_theirs": mm.unload_all_models is foreign, "called": called}
        seen[kind]["then"] = world.state()  # B goes: nobody acts any more
        mm.unload_all_models = plain["unload_all_models"]
    hooks.install()
    return seen


def doubled(world: World) -> dict:
    """Ours, another pack's that does not say what it wraps, and ours again on top, around each function."""
    plain = {name: getattr(mm, name).__wrapped__ for name in hooks.NAMES}
    for name in hooks.NAMES:
        setattr(mm, name, silently(getattr(mm, name)))
    hooks.install()
    world.prompt(A, (*B, "cycle"))
    seen = {"press": world.tail(**EVERYTHING), "stages": [look.stage for look in presses.latest()]}
    for name, original in plain.items():
        setattr(mm, name, original)
    return seen


def callers(world: World) -> dict:
    """Who is said to have asked."""
    seen = {}
    world.prompt(B)
    world.tail(unload_models=True)
    seen["tail"] = sorted({look.caller for look in presses.latest()})
    world.__init__(world.column)
    world.prompt(B)
    world.prompt(B, fails=mm.OOM_EXCEPTION("planted"))
    seen["error"] = sorted({look.caller for look in presses.latest()})
    world.__init__(world.column)
    world.prompt(B)
    world.queue.currently_running[0] = (0, "p", {})
    mm.unload_all_models()
    seen["in a prompt"] = sorted({look.caller for look in presses.latest()})
    return seen


def stages(world: World) -> dict:
    """How far each kind of press goes, and what it says of that."""

    def told() -> list:
        press = presses.last_press()
        return [[look.stage for look in press.looks], press.state, press.left_out]

    seen = {}
    for name, flags in (("both", EVERYTHING), ("unload", {"unload_models": True}), ("free", {"free_memory": True})):
        world.prompt(A, B)
        world.tail(**flags)
        seen[name] = told()
    world.prompt(A, B, fails=mm.OOM_EXCEPTION("planted"))
    seen["out of memory"] = told()
    world.prompt(A, B)
    mm.unload_all_models()
    mm.soft_empty_cache()
    seen["no collection"] = told()
    world.prompt(A, B)
    mm.unload_all_models()
    other = threading.Thread(target=mm.soft_empty_cache)
    other.start()
    other.join()
    gc.collect()
    mm.soft_empty_cache()
    seen["another thread between"] = told()
    world.prompt(A, B)
    mm.unload_all_models()
    world.executor.reset()
    world.queue.get_flags()
    seen["the worker's next turn"] = told()
    mm.unload_all_models()
    first = presses.open_press()
    mm.unload_all_models()
    return seen | {"another press": [first.state, presses.open_press().state]}


def garbage(world: World) -> dict:
    """Both buttons, while the result of a node is in the cache: bytes of live tensors at every stage."""
    with probe.tracking():
        world.cache.outputs["image", False] = torch.zeros(8 << 20, dtype=torch.uint8)
        world.tail(**EVERYTHING)
    return {look.stage: look.devices[0].allocated.bytes for look in presses.latest()}


def heard(world: World) -> dict:
    """How long the worker waits for a flag that was set while it did something else, and for prompts."""

    def timed(timeout: float | None) -> list:
        start = time.perf_counter()
        item = world.queue.get(timeout=timeout) if timeout is not None else world.queue.get()
        return [item and item[0], round(time.perf_counter() - start, 1)]

    seen = {"nothing": timed(0.3)}
    world.queue.set_flag("unload_models", True)
    seen["a flag"] = timed(3.0)
    world.queue.put("prompt")
    seen["a flag and a prompt"] = timed(3.0)
    later = threading.Timer(0.3, world.queue.put, ["prompt"])
    later.start()
    seen["a flag, without a limit"] = timed(None)
    seen["flags"] = world.queue.get_flags()
    threading.Timer(0.3, world.queue.set_flag, ["free_memory", True]).start()
    seen["a flag while it waits"] = timed(3.0)
    return seen


def relief(world: World) -> dict:
    """Turns of ComfyUI's worker while RAM is short and nothing is kept."""

    def turn() -> dict:
        """What ComfyUI's worker does between two prompts."""
        flags = world.queue.get_flags()
        if flags.get("unload_models", flags.get("free_memory", False)):
            mm.unload_all_models()
        if flags.get("free_memory", False):
            world.executor.reset()
        gc.collect()
        mm.soft_empty_cache()
        return flags

    world.prompt(A)
    held = world.node(*A)  # as a node in the middle of something would
    world.cache.outputs["image", False] = torch.zeros(1 << 20)
    seen: dict[str, Any] = {}
    with ram(0.05):
        world.queue.put("prompt")
        seen["a prompt waits"] = turn()
        world.queue.get()
        seen["idle"], seen["results"], seen["models"] = turn(), len(world.cache.outputs), world.state()
        seen["once"] = turn()
    with ram(0.3):
        seen["enough"] = turn()
    idle = importlib.import_module("steadyvsr.patches.idle")
    with ram(0.05):
        idle.relief().enabled = False
        seen["switched off"] = turn()
        idle.relief().enabled = True
        kept.registry().least_ram_bytes = 4 << 30  # of 100 GiB, 5 are free
        seen["above a threshold in bytes"] = turn()
        kept.registry().least_ram_bytes = 6 << 30
        world.queue.set_flag("unload_models", True)
        seen["below it, with a press"] = turn()
    return seen | {"held": type(held.model).__name__}


def missing(world: World) -> dict:
    """A ComfyUI without one of the functions, and without a worker."""
    gone, execution = mm.free_memory, sys.modules.pop("execution")
    hooks.uninstall()
    del mm.free_memory
    try:
        hooks.install()
        seen = {"status": hooks.status()}
    finally:
        hooks.uninstall()
        mm.free_memory = gone.__wrapped__
        sys.modules["execution"] = execution
    hooks.install()
    return seen | {"again": set(hooks.status().values()) == {"on top"}}


def ring(world: World) -> dict:
    """Twenty presses."""
    world.prompt(B)
    for _ in range(20):
        world.tail(**EVERYTHING)
    looks = presses.latest()
    return {"looks": len(looks), "presses": [looks[0].press, looks[-1].press], "last": presses.last_press().line}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@contextmanager
def card_by(world: World) -> Iterator[None]:
    """A probe that reads from the networks themselves what is on a device."""

    def read(device: str) -> Any:
        used = reading.exact(world.used(torch.device(device)), "planted")
        return reading.Reading(device, allocated=used, reserved=used)

    state = vars(sys.modules["steadyvsr_state"])
    own, state["probe"] = probe.current(), probe.ScriptedProbe(read)
    try:
        yield
    finally:
        state["probe"] = own


def log(world: World) -> dict:
    """The lines of a press that loses nothing, and of one in which another pack moves a kept model away by itself."""
    lines, logger = Lines(), logging.getLogger("steadyvsr.patches")
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    try:
        world.prompt(A, B)
        lines.lines.clear()
        presses.set_reason("said why")
        with card_by(world):
            world.tail(**EVERYTHING)
        seen: dict[str, Any] = {"plain": list(lines.lines)}
        world.prompt(A, B)
        lines.lines.clear()
        (entry,) = kept.registry().owned()
        with beneath("unload_all_models", lambda: entry.value.detach()):
            world.tail(**EVERYTHING)
        seen |= {"lost": list(lines.lines), "id": entry.id, "reported": len(presses.last_press().lost)}
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    ERRORS.lines.clear()
    return seen


def own_failure(world: World) -> dict:
    """Something of ours fails: ComfyUI's function runs all the same, and one line says so."""
    world.prompt(A, B)
    listed = kept.Registry.listed

    def failing(*_: Any) -> Any:
        raise KeyError("planted in the registry")

    kept.Registry.listed = failing
    try:
        mm.unload_all_models()
        mm.free_memory(1e30, FIRST)
        mm.unload_all_models()
    finally:
        kept.Registry.listed = listed
    lines = list(ERRORS.lines)
    ERRORS.lines.clear()
    return {"after": world.state(), "lines": lines}


SCENARIOS: dict[str, Callable[[World], dict]] = {
    "explicit": explicit, "meant": meant, "budget": budget, "file": file, "passes through": passes_through,
    "arguments": arguments, "places": places, "dead": dead, "installing": installing, "callers": callers, "ring": ring,
    "log": log, "doubled": doubled, "own failure": own_failure, "stages": stages, "garbage": garbage,
    "missing": missing, "heard": heard, "relief": relief,
}  # fmt: skip


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.disable()
    seen = {
        name: {"seen": scenario(World("keep")), "errors": list(ERRORS.lines)} for name, scenario in SCENARIOS.items()
    }
    sys.stdout.write(json.dumps(seen))
