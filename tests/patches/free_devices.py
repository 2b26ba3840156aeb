"""What a press gives back: bytes of this process with networks of 64 MiB and more, and the caches of two accelerators.

    python tests/patches/free_devices.py PACK_FOLDER double         anywhere
    python tests/patches/free_devices.py PACK_FOLDER comfyui        in ComfyUI's folder, by ComfyUI's Python

The last line of its output is JSON: column → "process", "mixed" and "all kept" → what was measured. Columns are those
of free_worlds.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "session"))
    importlib.import_module("comfyui_place").prepare(sys.argv[2], Path(sys.argv[1]))

import psutil  # noqa: E402
import torch  # noqa: E402
from free_worlds import EVERYTHING, FIRST, MIB, SECOND, STOCK, World, mm  # noqa: E402

trim: Any = importlib.import_module("steadyvsr.memory.host").trim
SIZES = {"A": 96, "B": 64, "C": 80}


def own_bytes() -> int:
    """Unique set size of this process."""
    gc.collect()
    if not trim():
        raise SystemExit("this C library has no malloc_trim: the bytes of the process say nothing.")
    return psutil.Process().memory_full_info().uss


def weights(world: World) -> dict[str, list]:
    """Where the weights of what is alive lie, and what is in them."""
    return {
        type(module).__name__: [module.linear.weight.data_ptr(), float(module.linear.weight.double().sum())]
        for module in world.alive()
    }


def process(column: str) -> dict[str, Any]:
    """Both buttons: bytes of the process with nothing, with A, B and C loaded, and after the press."""
    world = World(column)
    seen: dict[str, Any] = {"nothing": own_bytes()}
    for name, mib in SIZES.items():
        world.prompt((name, name != "A"), mib=mib)
    seen |= {"loaded": own_bytes(), "before": weights(world), "listed": world.state()}
    world.tail(**EVERYTHING)
    return seen | {"pressed": own_bytes(), "after": weights(world), "left": world.state()}


class Accelerators:
    """The allocator of two accelerators as torch has it: what is freed stays reserved until caches are emptied.

    `torch.cuda.empty_cache` empties the cache of every device, and ComfyUI calls it where it has an accelerator.

    Attributes:
        calls: of `torch.cuda.empty_cache`.
        emptied: by device, how often that gave something back.
        reserved: by device, bytes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls, self.emptied = 0, dict.fromkeys(map(str, world.devices), 0)
        self.reserved = dict.fromkeys(self.emptied, 0)
        torch.cuda.is_available = lambda: True
        torch.cuda.synchronize = torch.cuda.ipc_collect = lambda *_: None
        torch.cuda.empty_cache = self.empty
        if hasattr(mm, "CPUState"):
            mm.cpu_state = mm.CPUState.GPU

    def load(self, *step: Any, **options: Any) -> None:
        mm.load_models_gpu([self.world.node(*step, **options)])
        for device in self.world.devices:
            self.reserved[str(device)] = max(self.reserved[str(device)], self.world.used(device))

    def empty(self) -> None:
        self.calls += 1
        for device in self.world.devices:
            used = self.world.used(device)
            self.emptied[str(device)] += self.reserved[str(device)] > used
            self.reserved[str(device)] = used

    def press(self) -> dict[str, Any]:
        self.calls, self.emptied = 0, dict.fromkeys(self.emptied, 0)
        before = dict(self.reserved)
        end = self.world.tail(**EVERYTHING)["end"]
        in_mib = {name: [before[name] // MIB, self.reserved[name] // MIB] for name in before}
        return {"end": end, "calls": self.calls, "emptied": self.emptied, "reserved_mib": in_mib}


def caches(column: str) -> dict[str, Any]:
    """Both buttons with a kept and another model on each of two accelerators, and again with the kept ones only."""
    cards = Accelerators(World(column, devices=(FIRST, SECOND)))
    cards.load("A", False, device=FIRST, mib=3)
    cards.load("B", True, device=FIRST, mib=1)
    cards.load("C", True, device=SECOND, mib=2)
    cards.load("F", False, device=SECOND, mib=4)
    return {"mixed": cards.press(), "all kept": cards.press()}


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.disable()
    measured = {column: {"process": process(column)} for column in ("keep", "pin", STOCK)}
    for column, seen in measured.items():  # from here on torch answers as with accelerators
        seen |= caches(column)
    sys.stdout.write(json.dumps(measured))
