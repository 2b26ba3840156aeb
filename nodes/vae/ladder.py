"""What to try when a tile does not fit: the rungs, and the table of what was tried."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management as mm
import torch

from ...models.tiling import TileJob
from ...patches.versions import is_out_of_memory, memory_errors
from ..attempts import UNLOAD_OTHERS, Attempts

ATTEMPT_COLUMNS = {
    "unit": "tiles done", "tile": "tile", "dtype": "dtype", "device": "device", "free": "free", "tried": "then",
}  # fmt: skip
MIN_TILE, TILE_STEP = 64, 32
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8)


def smaller_tiles(tile: int, longest: int, floor: int) -> list[int]:
    """Sides below `tile`, larger first: ×0.75, ×0.5, … in steps of 32 pixels down to the floor.

    Args:
        longest: side of the image; a tile that holds all of it is no smaller than another that does.
    """
    start = min(tile, -(-longest // TILE_STEP) * TILE_STEP)
    sides = dict.fromkeys([*(int(start * share) // TILE_STEP * TILE_STEP for share in SHARES), floor])
    return [side for side in sides if floor <= side < start]


@dataclass
class TileLadder:
    """Carries a job to its end, one rung down for each time that memory runs out.

    Attributes:
        node: display name, which errors begin with.
        job: tiles left to compute.
        around: runs a computation with the weights that it needs.
        tiles: sides to go down to, larger first.
        dtype: to go down to after the last of them, or None.
        allow_cpu: whether the CPU stands at the end.
        shrink: False ends at the first failure.
        unload_others: makes room; says whether there was any to make.
        prepare: has the weights made ready for a device and dtype.
        free: bytes that are free on the device, or None.
    """

    node: str
    job: TileJob
    around: Callable[[Callable[[], None]], None]
    tiles: list[int]
    dtype: torch.dtype | None
    allow_cpu: bool
    shrink: bool
    unload_others: Callable[[], bool]
    prepare: Callable[[torch.device, torch.dtype], None]
    free: Callable[[], int | None]
    attempts: Attempts = field(init=False)

    def __post_init__(self) -> None:
        self.attempts = Attempts(self.node, ATTEMPT_COLUMNS)

    def advance(self, on_step: Callable[[], None]) -> None:
        """Computes one tile, however far down that takes it.

        Raises:
            mm.OOM_EXCEPTION: nothing is left to try; the message holds the table of attempts.
        """
        while True:
            words = None
            try:
                self.around(lambda: self.job.advance(on_step))
            except memory_errors() as error:
                if not is_out_of_memory(error):
                    raise
                # Only the words: the error's traceback holds every tensor of the tile that failed.
                words = str(error)
            if words is None:
                return
            gc.collect()
            mm.soft_empty_cache()
            self._descend(words)

    def _descend(self, words: str) -> None:
        job = self.job
        failed = {"unit": job.done, "tile": job.tile, "dtype": dtype_name(job.dtype), "device": str(job.device)}
        failed["free"] = self.free()

        def tried(rung: str) -> None:
            self.attempts.append({**failed, "tried": rung})

        if not self.shrink:
            tried("")
            raise self.attempts.exhausted(words, "Choose on_oom shrink, a smaller tile_size, or unload other models.")
        if self.unload_others():
            tried(UNLOAD_OTHERS)
        elif self.tiles:
            side = self.tiles.pop(0)
            tried(f"tile {side}")
            job.cut(side)
        elif self.dtype is not None:
            tried(f"weights and tiles in {dtype_name(self.dtype)}")
            self.prepare(job.device, self.dtype)
            job.dtype, self.dtype = self.dtype, None
        elif self.allow_cpu and job.device.type != "cpu":
            tried("the CPU")
            cpu = torch.device("cpu")
            self.prepare(cpu, torch.float32)
            job.device, job.dtype = cpu, torch.float32
        else:
            tried("")
            advice = "Choose a smaller image" + ("." if self.allow_cpu else ", or allow_cpu.")
            raise self.attempts.exhausted(words, advice)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
