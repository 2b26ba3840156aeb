"""The free-memory scenarios beside ComfyUI-MultiGPU: `SCRIPT PACK MULTIGPU_CHECKOUT before|after` in ComfyUI's folder.

"before": MultiGPU is imported, with its replacement for load_models_gpu in place, and our wrappers come after it;
"after": ours are there first. Every loader puts our wrappers in place again where they are gone, as the pack's do. The
last line of the output is JSON: what an import raised, where the wrappers stood, and what free_worlds.py saw.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

PACK, CHECKOUT, ORDER = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.path[:0] = [str(PACK / "tests" / name) for name in ("patches", "session")]
importlib.import_module("comfyui_place").prepare("comfyui", PACK)

from free_worlds import ERRORS, EVERYTHING, SCENARIOS, A, B, C, PromptQueue, World, hooks, mm  # noqa: E402

SERVER: Any = types.ModuleType("server")
SERVER.PromptServer = types.SimpleNamespace(instance=types.SimpleNamespace(prompt_queue=PromptQueue()))


class Beside(World):
    """A world in which both packs' patches stay as they were put."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        SERVER.PromptServer.instance.prompt_queue = self.queue  # MultiGPU knows the server of its import

    def place_wrappers(self) -> None:
        vars(sys.modules["steadyvsr_state"]).pop("shortage_of_kept_models", None)

    def load(self, *arguments: Any, **options: Any) -> Any:
        hooks.install()
        return super().load(*arguments, **options)


def import_multigpu() -> str:
    """Imports it and has it replace load_models_gpu, which its own loaders do; returns what that raised."""
    asyncio.run(importlib.import_module("nodes").init_builtin_extra_nodes())  # it wraps some of them
    sys.modules["server"] = SERVER
    spec = importlib.util.spec_from_file_location(
        "multigpu", CHECKOUT / "__init__.py", submodule_search_locations=[str(CHECKOUT)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{CHECKOUT}: expected a checkout of ComfyUI-MultiGPU; got nothing that can be imported.")
    pack = sys.modules["multigpu"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(pack)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    importlib.import_module("multigpu.distorch_2").register_patched_safetensor_modelpatcher()
    return ""


def flagged(world: World) -> dict:
    """A carries the mark by which MultiGPU's 1ca3daf unloads a model itself and puts another list in place."""
    world.prompt(A, B, C)
    world.node(*A).model._mgpu_unload_distorch_model = True
    first = world.tail(**EVERYTHING)
    world.prompt(A, B, C)
    return {"first": first, "again": world.state(), "second": world.tail(**EVERYTHING)}


def forced(world: World) -> dict:
    """ComfyUI's attention empties caches with `force`, which sets MultiGPU's newest a flag; the worker acts on it."""
    world.prompt(A, B, C)
    mm.soft_empty_cache(True)
    flags = list(world.queue.flags)
    return {"flags": flags, "first": world.tail(free_memory="free_memory" in flags)}


def run(column: str) -> dict[str, dict]:
    seen: dict[str, dict] = {}
    for name, scenario in {**SCENARIOS, "flagged": flagged, "forced": forced}.items():
        world = Beside(column)
        found = {"seen": scenario(world)}
        seen[name] = {**found, "reads": world.reads, "errors": list(ERRORS.lines)}
    return seen


def main() -> dict[str, Any]:
    if ORDER == "after":
        hooks.install()
    refused = import_multigpu()
    if refused:
        return {"refused": refused}
    theirs = {name: getattr(mm, name).__module__.startswith("multigpu") for name in hooks.NAMES}
    if ORDER == "before":
        hooks.install()
    found: dict[str, Any] = {"refused": "", "theirs": theirs, "status": {"start": hooks.status()}}
    gc.collect()
    gc.freeze()
    gc.disable()
    found |= {column: run(column) for column in ("keep", "pin")}
    found["status"]["end"] = hooks.status()
    hooks.uninstall()
    found["status"]["uninstalled"] = hooks.status()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()))
