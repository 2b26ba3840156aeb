"""What to try when a tile does not fit: the rungs, and the table of what was tried."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import torch

from ...memory.reading import size_text
from ...models.tiling import TileJob
from ..flashvsr.memory import is_out_of_memory, memory_errors

UNLOAD_OTHERS = "unload others"
MIN_TILE, TILE_STEP = 64, 32
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8)


@dataclass(frozen=True)
class Attempt:
    """A tile that did not fit, and what was then tried.

    Attributes:
        unit: how many tiles were done.
        tile, dtype, device: of the one that failed.
        free: bytes that were free after it; None where that cannot be read.
        tried: the rung that was taken next; "" at the bottom.
    """

    unit: int
    tile: int
    dtype: str
    device: str
    free: int | None
    tried: str


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
    attempts: list[Attempt] = field(default_factory=list)

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

    def table(self) -> str:
        """The attempts, one line each."""
        rows: list[tuple[str, ...]] = [("tiles done", "tile", "dtype", "device", "free", "then")]
        rows += [
            (str(item.unit), str(item.tile), item.dtype, item.device, size_text(item.free), item.tried or "error")
            for item in self.attempts
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def to_json(self) -> list[dict[str, Any]]:
        return [vars(item) for item in self.attempts]

    def _descend(self, words: str) -> None:
        job, failed = self.job, self._failed()
        if not self.shrink:
            self._end(failed, words, "Choose on_oom shrink, a smaller tile_size, or unload other models.")
        elif self.unload_others():
            self._tried(failed, UNLOAD_OTHERS)
        elif self.tiles:
            side = self.tiles.pop(0)
            self._tried(failed, f"tile {side}")
            job.cut(side)
        elif self.dtype is not None:
            self._tried(failed, f"weights and tiles in {_name(self.dtype)}")
            self.prepare(job.device, self.dtype)
            job.dtype, self.dtype = self.dtype, None
        elif self.allow_cpu and job.device.type != "cpu":
            self._tried(failed, "the CPU")
            cpu = torch.device("cpu")
            self.prepare(cpu, torch.float32)
            job.device, job.dtype = cpu, torch.float32
        else:
            advice = "Choose a smaller image" + ("." if self.allow_cpu else ", or allow_cpu.")
            self._end(failed, words, advice)

    def _failed(self) -> dict[str, Any]:
        job = self.job
        place = {"tile": job.tile, "dtype": _name(job.dtype), "device": str(job.device)}
        return {"unit": job.done, **place, "free": self.free()}

    def _tried(self, failed: dict[str, Any], rung: str) -> None:
        self.attempts.append(Attempt(**failed, tried=rung))

    def _end(self, failed: dict[str, Any], words: str, advice: str) -> None:
        self._tried(failed, "")
        raise mm.OOM_EXCEPTION(
            f"{self.node}: the device is out of memory, and nothing is left to try ({words}).\n{self.table()}\n{advice}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
