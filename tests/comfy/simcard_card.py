"""The simulated cards of tests/simcard as the accelerators of a real ComfyUI: an allocator, and not its books, is read.

Tensors really lie there, so a model that ComfyUI's books call gone may still take memory, and memory may run out. Where
the cards cannot be built, a session ends at once with {"skip": why} as its result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import phases_card
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "simcard"))  # last: ComfyUI has modules of its own
import toolchain  # noqa: E402

if absent := toolchain.missing():
    sys.stdout.write("\n" + json.dumps({"skip": f"the simulated card needs {absent} to be built; found none"}) + "\n")
    sys.stdout.flush()
    raise SystemExit(0)
import simcard  # noqa: E402


class AllocatorCards(phases_card.SimulatedCard):
    """One or two cards with memory of their own, and the probe that reads them.

    Attributes:
        device: the first card, which is ComfyUI's current one.
        devices: all that ComfyUI is told of.
        capacity: bytes of each.
    """

    def __init__(self, capacity: int, cards: int = 1) -> None:
        self.devices = [torch.device(simcard.NAME, index) for index in range(cards)]
        super().__init__(capacity, *self.devices)

    @property
    def capacity(self) -> int:
        return self._capacity

    @capacity.setter
    def capacity(self, value: int) -> None:
        self._capacity = value
        for device in self.devices:
            simcard.set_up(device, value)

    def used(self, device: torch.device | None = None) -> int:
        found = simcard.statistics(device or self.device)
        return found["live"] + found["context"]

    def sample(self, device: Any, *, settled: bool = False) -> Any:
        reader = next(module for name, module in list(sys.modules.items()) if name.endswith(".memory.probe"))
        return simcard.CardProbe(reader.DeviceProbe()).sample(device, settled=settled)

    def reset_peak(self, device: Any) -> None:
        if torch.device(device).type == simcard.NAME:
            simcard.reset_peak(device)

    def install(self) -> None:
        super().install()
        # With --cpu ComfyUI's own has nothing to empty.
        mm.soft_empty_cache = lambda force=False: simcard.empty_cache()
