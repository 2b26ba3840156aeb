"""Other threads release kept models, change policies and read the panel's state while a worker loads and unloads.

    python tests/patches/hammer.py PACK_FOLDER double|comfyui [REQUESTS]

REQUESTS are those of all three threads together, 10,000 unless said otherwise. The last line of its output is JSON.
Models are those of free_worlds.py; each takes a moment to leave its device, so that a request often comes in between.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import random
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUESTS = int(sys.argv[3]) if len(sys.argv) > 3 else 10_000
PACK = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(PACK / "tests" / "session"))
    importlib.import_module("comfyui_place").prepare(sys.argv[2], PACK)

from free_worlds import ERRORS, ModelPatcher, NoProbe, World, kept, mm  # noqa: E402

# The state alone: the rest of the nodes needs a whole ComfyUI.
for name in ("nodes", "nodes.panel"):
    package = types.ModuleType(f"steadyvsr.{name}")
    package.__path__ = [str(PACK.joinpath(*name.split(".")))]
    sys.modules[f"steadyvsr.{name}"] = package
panel: Any = importlib.import_module("steadyvsr.nodes.panel.state")

UNLOAD_SECONDS = 0.0005
CAPACITY_MIB = 5
"""Of the simulated card: two or three of the models below."""
SIZES = {"B": 1, "C": 2, "D": 1, "E": 2}
WORKER = threading.get_ident()
detach = ModelPatcher.detach


def slow_detach(self: Any, *arguments: Any, **keywords: Any) -> Any:
    time.sleep(UNLOAD_SECONDS)
    return detach(self, *arguments, **keywords)


class Mortal(World):
    """Remembers in which thread each network died."""

    died: list[int]

    def read(self, name: str, mib: int = 1, *arguments: Any, **options: Any) -> Any:
        patcher = super().read(name, mib, *arguments, **options)
        weakref.finalize(patcher.model, lambda: self.died.append(threading.get_ident())).atexit = False
        return patcher


def hammered() -> dict:
    world = Mortal("keep", CAPACITY_MIB)
    world.died = []
    chance, failures, done = random.Random(0), [], dict.fromkeys(("release", "policy", "state"), 0)

    def repeat(what: str, request: Callable[[random.Random], None]) -> None:
        mine = random.Random(what)
        for _ in range(REQUESTS // len(done)):
            try:
                request(mine)
            except Exception:
                failures.append(f"{what}: {traceback.format_exc()[-600:]}")
            done[what] += 1
            time.sleep(0.001)

    def release(mine: random.Random) -> None:
        known = [entry.id for entry in kept.registry().entries()]
        kept.registry().release(None if mine.random() < 0.3 else mine.sample(known, min(1, len(known))))

    def policy(mine: random.Random) -> None:
        for entry_id in [entry.id for entry in kept.registry().entries()][:1]:
            with contextlib.suppress(KeyError):  # gone since
                kept.registry().set_policy(entry_id, mine.choice(kept.POLICIES))

    threads = [
        threading.Thread(target=repeat, args=("release", release)),
        threading.Thread(target=repeat, args=("policy", policy)),
        threading.Thread(target=repeat, args=("state", lambda _: json.dumps(panel.state()))),
    ]
    prompts = doubled = half = lost = 0
    ModelPatcher.detach = slow_detach
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            world.cache.outputs.clear()  # the registry alone owns what is kept
            try:
                name = chance.choice(list(SIZES))
                world.prompt((name, True), mib=SIZES[name])
                world.prompt(("X", False), mib=2)
                if chance.random() < 0.2:
                    world.tail(unload_models=True, free_memory=chance.random() < 0.5)
                else:
                    world.tail()
            except Exception:
                failures.append(f"worker: {traceback.format_exc()[-900:]}")
            prompts += 1
            modules = [id(loaded.real_model()) for loaded in list(mm.current_loaded_models) if loaded.real_model]
            doubled += len(modules) != len(set(modules))
            half += sum(loaded.real_model is None for loaded in list(mm.current_loaded_models))
    finally:
        ModelPatcher.detach = detach
        for thread in threads:
            thread.join()
    world.tail()
    listed = {id(loaded.real_model()) for loaded in mm.current_loaded_models}
    lost = sum(
        bool(patcher.loaded_size()) and id(patcher.model) not in listed
        for entry in kept.registry().owned()
        for patcher in entry.patchers
    )
    before = len(world.died)
    kept.registry().release()
    world.prompt(("B", False))
    world.tail(unload_models=True, free_memory=True)
    return {
        "requests": done, "failures": len(failures), "first": failures[:3], "prompts": prompts,
        "deaths": before, "died elsewhere": sum(thread != WORKER for thread in world.died),
        "doubled": doubled, "half unloaded": half, "lost": lost, "in the end": world.state(),
        "errors": list(ERRORS.lines)[:3],
    }  # fmt: skip


def between_two_unloads() -> dict:
    """A kept model that the running prompt does not use is released while two others are unloaded for a third."""
    world = Mortal("keep", CAPACITY_MIB)
    world.died = []
    world.prompt(("X", False), mib=2)
    world.prompt(("Y", False), mib=2)
    world.prompt(("B", True))
    del world.cache.outputs["B", True]
    pressed: list[threading.Thread] = []

    def detach_and_release(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = detach(self, *arguments, **keywords)
        if not pressed:
            pressed.append(threading.Thread(target=kept.registry().release))
            pressed[0].start()
            pressed[0].join()
        return result

    ModelPatcher.detach = detach_and_release
    try:
        world.prompt(("Z", False), mib=4)
        failure = ""
    except Exception as error:
        failure = repr(error)
    finally:
        ModelPatcher.detach = detach
    elsewhere = sum(thread != WORKER for thread in world.died)
    world.tail(unload_models=True)
    return {"pressed": len(pressed), "failure": failure, "died elsewhere": elsewhere, "in the end": world.state()}


if __name__ == "__main__":
    importlib.import_module("steadyvsr.memory.process").shared("probe", NoProbe)
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.0005)  # seconds: a tenth of Python's own, so that threads meet more often
    gc.disable()  # collections happen where the worker makes them, and nowhere else
    sys.stdout.write(json.dumps({"between two unloads": between_two_unloads(), "hammered": hammered()}))
