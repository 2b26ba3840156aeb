"""What to try when a tile does not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...models.tiling import TileJob
from ...patches.versions import empty_caches, is_out_of_memory, memory_errors
from ..attempts import UNLOAD_OTHERS, Attempts

ATTEMPT_COLUMNS = {
    "unit": "tiles done", "tile": "tile", "dtype": "dtype", "device": "device", "free": "free", "tried": "then",
}  # fmt: skip
MIN_TILE, TILE_STEP = 64, 32
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8)


def smaller_tiles(tile: int, longest: int, floor: int) -> list[int]:
    """Sides below `tile`, largest first: ×0.75, ×0.5, … in steps of 32 pixels, down to `floor`.

    Args:
        longest: the longer side of the image; no tile needs to be larger.
    """
    start = min(tile, -(-longest // TILE_STEP) * TILE_STEP)
    sides = dict.fromkeys([*(int(start * share) // TILE_STEP * TILE_STEP for share in SHARES), floor])
    return [side for side in sides if floor <= side < start]


@dataclass
class TileLadder:
    """Computes the tiles of a job and takes one rung down each time memory runs out.

    Attributes:
        node: display name, which errors begin with.
        job: the tiles.
        around: runs a computation with the weights that it needs.
        tiles: smaller sides to try, largest first.
        dtype: to try after the last of them, or None.
        allow_cpu: whether the CPU is the last rung.
        shrink: False: the first failure is the end.
        unload_others: makes room; returns whether it could.
        prepare: gets the weights ready for a device and dtype.
        free: bytes that are free on the device, or None.
        attempts: what has been tried.
        prepared: whether the weights are ready for the device and dtype of the job.
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
    attempts: Attempts
    prepared: bool = True
    _too_large: str = ""

    def advance(self, on_step: Callable[[], None]) -> None:
        """Computes one tile, as far down the ladder as that takes.

        Raises:
            mm.OOM_EXCEPTION: nothing is left to try; the message holds the table of attempts.
        """
        while True:
            words = None
            try:
                if not self.prepared:
                    self.prepare(self.job.device, self.job.dtype)
                    self.prepared = True
                self.around(lambda: self.job.advance(on_step))
            except memory_errors() as error:
                if not is_out_of_memory(error):
                    raise
                # Only the words: the traceback holds every tensor of the failed tile.
                words = str(error)
            if words is None:
                return
            gc.collect()
            empty_caches()
            self._descend(words)

    def without_own_weights(self, words: str) -> None:
        """Goes on where the weights themselves did not fit, which smaller tiles do not change.

        Args:
            words: what was expected, and what there was.

        Raises:
            mm.OOM_EXCEPTION: as `advance`.
        """
        self._too_large = words
        self.tiles.clear()
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
            job.dtype, self.dtype, self.prepared = self.dtype, None, False
        elif self.allow_cpu and job.device.type != "cpu":
            tried("the CPU")
            job.device, job.dtype, self.prepared = torch.device("cpu"), torch.float32, False
        else:
            tried("")
            advice = "Unload other models" if self._too_large else "Choose a smaller image"
            raise self.attempts.exhausted(
                self._too_large or words, advice + ("." if self.allow_cpu else ", or allow_cpu.")
            )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
