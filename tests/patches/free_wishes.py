"""What loaders wish, what the panel changes and what a short RAM takes, over prompts whose loaders ComfyUI has cached.

    python tests/patches/free_wishes.py PACK_FOLDER double|comfyui

The last line of its output is JSON: scenario → what was seen. Models are those of free_worlds.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(PACK / "tests" / "session"))
    importlib.import_module("comfyui_place").prepare(sys.argv[2], PACK)

from free_worlds import ERRORS, B, C, CurrentNodeContext, D, World, hooks, kept, mm, owned, presses, ram  # noqa: E402


def played(world: World, *loaders: tuple[str, str, str, bool], load: Any = ()) -> None:
    """A prompt of loader nodes: (id, file, wish, whether ComfyUI executes it), which then loads patchers."""
    world.prompts += 1
    prompt_id = f"p{world.prompts}"
    nodes = {
        id: {"class_type": "Load", "inputs": {"file": file, "keep_loaded": wish, "of": id}}
        for id, file, wish, _ in loaders
    }

    def work() -> None:
        for id, file, wish, executes in loaders:
            if executes:

                def loader(id: str = id, file: str = file, wish: str = wish) -> None:
                    with CurrentNodeContext(prompt_id, id):
                        key = kept.Key.of("model", [world.path(file)])
                        value = kept.registry().obtain(key, wish, lambda: world.read(file), lambda p: [p], file)
                        world.cache.outputs[file, "owner"] = value

                world.executed(loader)
        world.executed(lambda: mm.load_models_gpu(list(load)) if load else None)

    world.queue.currently_running[0] = (0, prompt_id, nodes)
    world.executor.work = work
    try:
        world.executor.execute(nodes, prompt_id)
    finally:
        world.queue.currently_running.clear()


def policies() -> dict[str, str]:
    return {entry.name: entry.policy for entry in kept.registry().entries()}


def cached(world: World) -> dict:
    """One workflow keeps a file, another does not, and the first runs again from ComfyUI's cache; then released."""
    seen = []
    played(world, ("1", "B", "keep", True))
    seen.append(policies())
    played(world, ("1", "B", "no", True))
    seen.append(policies())
    played(world, ("1", "B", "keep", False), ("2", "B", "no", True))
    seen.append(policies())
    played(world, ("2", "B", "no", True))
    played(world, ("1", "B", "keep", False))
    seen.append(policies())
    return {"policies": seen}


def released(world: World) -> dict:
    """Released in the panel, then the same workflow again: its loader is cached and never asks."""
    played(world, ("1", "B", "keep", True))
    kept.registry().release()
    seen = [policies()]
    world.tail(free_memory=False)
    played(world, ("1", "B", "keep", False))
    seen.append(policies())
    world.tail(unload_models=True, free_memory=True)
    (entry,) = kept.registry().entries()
    return {"policies": seen, "alive": world.state(), "intact": entry.intact()}


def used(world: World) -> dict:
    """B is older, but every prompt uses it; then RAM for one."""
    world.prompt(B)
    world.prompt(C)
    before = time.time()
    b = world.node(*B)
    played(world, load=[b])
    (entry,) = (entry for entry in kept.registry().owned() if entry.name == "B")
    with ram(0.09):
        kept.registry().ram_budget_bytes = 1 << 20
        kept.registry().keep_within_budget()
    return {"moved": entry.last_used >= before, "owned": owned()}


def in_use(world: World) -> dict:
    """Which models ComfyUI believes to be in use: after a prompt with B, and in a prompt with X."""

    def marked() -> str:
        return "".join(sorted(type(x.model.model).__name__ for x in mm.current_loaded_models if x.currently_used))

    world.prompt(B)
    seen = {"after": marked()}
    mm.current_loaded_models[0].currently_used = True  # as after a prompt that ended without our part
    x = world.node("X", False)
    played(world, load=[x])
    within: list[str] = []
    mm.current_loaded_models[-1].currently_used = True
    y = world.node("Y", False)
    world.executor.work = lambda: (mm.load_models_gpu([y]), within.append(marked()))
    world.executor.execute({}, "p")
    return seen | {"within": within[0], "end": marked()}


def short_of_ram(world: World) -> dict:
    """RAM gets short between two nodes of a prompt with B and D, while C is kept from an earlier one."""
    world.prompt(B, C)
    world.prompt(D)
    seen: list[str] = []
    nodes = {name: {"class_type": "Load", "inputs": {"name": name, "keep": True}} for name in "BD"}
    world.queue.currently_running[0] = (0, "px", nodes)

    def work() -> None:
        world.executed(lambda: seen.append(owned()))
        with ram(0.09):
            world.executed(lambda: seen.append(owned()))

    world.cache.outputs.clear()
    world.executor.work = work
    world.executor.execute(nodes, "px")
    world.queue.currently_running.clear()
    return {"owned": seen, "end": owned(), "alive": world.state()}


def dying(world: World) -> dict:
    """A value that dies between two reads, while the panel asks for its policy."""
    seen = {}
    for policy in kept.POLICIES:
        world.__init__(world.column)
        world.prompt(("B", True))
        kept.registry().release()
        kept.registry().settle() if hasattr(kept.Registry, "settle") else None
        (entry,) = kept.registry().entries()
        values = iter([entry.value])
        entry._weak = lambda values=values: next(values, None)
        try:
            kept.registry().set_policy(entry.id, policy)
            world.tail()
            world.tail()
            seen[policy] = owned()
        except Exception as error:
            seen[policy] = repr(error)
    return seen


def healed(world: World) -> dict:
    """Another pack replaces a function between two prompts, neither of which has a loader of ours."""
    world.prompt(B)
    original = mm.unload_all_models
    mm.unload_all_models = original.__wrapped__
    try:
        seen = [hooks.status()["unload_all_models"]]
        played(world)
        seen.append(hooks.status()["unload_all_models"])
        return {"status": seen, "after": world.tail(unload_models=True)["end"]}
    finally:
        hooks.uninstall()
        mm.unload_all_models = original.__wrapped__
        hooks.install()


def pages(world: World) -> dict:
    """Dynamic VRAM: the driver takes pages of a pinned model during a press."""
    world.prompt(B)
    (entry,) = kept.registry().owned()
    entry.value.is_dynamic = lambda: True
    module = entry.value.model
    size, seen = module.model_loaded_weight_memory, {}
    for what, dynamic in (("dynamic", True), ("not dynamic", False)):
        entry.value.is_dynamic = lambda dynamic=dynamic: dynamic
        unload = mm.unload_all_models
        mm.unload_all_models()
        module.model_loaded_weight_memory = size // 2
        world.executor.reset()
        gc.collect()
        mm.soft_empty_cache()
        module.model_loaded_weight_memory = size
        seen[what] = len(presses.last_press().lost)
        del unload
    ERRORS.lines.clear()
    stand_in = types.SimpleNamespace(aimdo_enabled=True)
    found, sys.modules["comfy.memory_management"] = sys.modules.get("comfy.memory_management"), stand_in  # type: ignore
    try:
        seen["off"] = [promise for promise in hooks.promises_off() if "dynamic VRAM" in promise]
    finally:
        if found is None:
            del sys.modules["comfy.memory_management"]
        else:
            sys.modules["comfy.memory_management"] = found
    return seen


SCENARIOS: dict[str, Callable[[World], dict]] = {
    "cached": cached, "released": released, "used": used, "in use": in_use, "short of RAM": short_of_ram,
    "dying": dying, "healed": healed, "pages": pages,
}  # fmt: skip


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.disable()
    seen = {}
    for name, scenario in SCENARIOS.items():
        world = World("keep")
        try:
            seen[name] = {"seen": scenario(world), "errors": list(ERRORS.lines)}
        except Exception as error:
            seen[name] = {"seen": repr(error), "errors": list(ERRORS.lines)}
    sys.stdout.write(json.dumps(seen))
