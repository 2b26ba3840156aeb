"""What a press says against what the allocators of two simulated cards count: freed, held by somebody, kept in RAM.

    python tests/patches/free_card.py PACK_FOLDER double          anywhere with a C++ compiler and ninja
    python tests/patches/free_card.py PACK_FOLDER comfyui         in ComfyUI's folder, by ComfyUI's Python

The last line of its output is JSON: scenario → what was seen; {"absent": …} where the cards cannot be built.
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
    if absent := importlib.import_module("steadyvsr.tests.simcard.toolchain").missing():
        sys.stdout.write(json.dumps({"absent": absent}))
        sys.exit()

simcard: Any = importlib.import_module("steadyvsr.tests.simcard.simcard")

import torch  # noqa: E402
from free_worlds import EVERYTHING, MIB, World, kept, mm, presses  # noqa: E402

CARDS = (torch.device("simcard", 0), torch.device("simcard", 1))
FOREIGN: list[Any] = []
"""What a foreign node holds."""
residency: Any = importlib.import_module("steadyvsr.patches.residency")


def fresh(column: str = "keep") -> World:
    """A world of its own, and both cards empty."""
    FOREIGN.clear()
    mm.soft_empty_cache = simcard.empty_cache
    world = World(column, devices=CARDS)
    gc.collect()
    simcard.empty_cache()
    return world


def live() -> list[int]:
    """MiB of live tensors by each allocator."""
    return [simcard.statistics(card)["live"] // MIB for card in CARDS]


def pressed(world: World, **flags: bool) -> dict[str, Any]:
    """What a press said, with MiB of live tensors before and after it."""
    before = live()
    world.tail(**(flags or EVERYTHING))
    press = presses.last_press()
    told = press.to_json()
    return {
        "before": before, "after": live(), "line": press.line, "left": told["left_bytes"],
        "by model": {item.name: press.bytes_after(item) for item in press.before.residents},
        "verdict": told.get("verdict"), "lost": told["lost"], "receipts": told.get("receipts"),
        "devices": [[reading["device"] for reading in look["devices"]] for look in told["snapshots"]],
        "ram": [reading["process"]["bytes"] for reading in told["snapshots"][-1]["devices"]][-1],
    }  # fmt: skip


def freed() -> dict:
    """Nobody holds what is not kept."""
    world = fresh()
    world.prompt(("A", False), mib=40, device=CARDS[0])
    world.prompt(("B", True), mib=8, device=CARDS[0])
    return pressed(world)


def held() -> dict:
    """A foreign node holds the weights that are not kept."""
    world = fresh()
    world.prompt(("A", False), mib=40, device=CARDS[0])
    FOREIGN.extend(weight.data for weight in world.node("A", False).model.parameters())
    seen = pressed(world)
    FOREIGN.clear()
    gc.collect()
    return seen


def in_ram() -> dict:
    """Kept models that rest in RAM: one as a whole, one beside another that is on the card."""
    world = fresh()
    world.prompt(("B", True), mib=8, device=CARDS[0])
    residency.offload_model(kept.registry().owned()[0].value)
    world.prompt(("C", True), mib=4, device=CARDS[1])
    world.prompt(("A", False), mib=2, device=CARDS[0])
    return pressed(world)


def second_card() -> dict:
    """A ComfyUI that unloads its current card only, as 0.3.64 does, with models on both."""
    unload_all, mm.unload_all_models = mm.unload_all_models, lambda: mm.free_memory(1e30, mm.get_torch_device())
    try:
        world = fresh()
        for name, keep, mib, card in (("A", False, 2, 0), ("B", True, 4, 0), ("C", False, 8, 1), ("D", True, 16, 1)):
            world.prompt((name, keep), mib=mib, device=CARDS[card])
        return pressed(world, unload_models=True) | {"state": world.state()}
    finally:
        importlib.import_module("steadyvsr.patches.hooks").uninstall()
        mm.unload_all_models = unload_all


def nothing() -> dict:
    """A press with nothing on the cards."""
    return pressed(fresh())


def results() -> dict:
    """No model, but the result of a node on a card."""
    world = fresh()
    world.cache.outputs["latent", False] = torch.zeros(16 * MIB, dtype=torch.uint8, device=CARDS[0])
    return pressed(world)


SCENARIOS = {
    "freed": freed, "held": held, "in RAM": in_ram, "second card": second_card, "nothing": nothing, "results": results,
}  # fmt: skip


if __name__ == "__main__":
    for card in CARDS:
        simcard.set_up(card, 1 << 30)
    importlib.import_module("steadyvsr.memory.probe").current()
    state = vars(sys.modules["steadyvsr_state"])
    state["probe"] = simcard.CardProbe(state["probe"])
    gc.collect()
    gc.disable()
    sys.stdout.write(json.dumps({name: scenario() for name, scenario in SCENARIOS.items()}))
