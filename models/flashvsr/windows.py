"""Window order: tokens grouped in blocks of 2 frames × 8 rows × 8 columns, the unit of sparse attention.

Blocks are ordered (frame pair, row block, column block); inside a block, tokens are ordered (frame, row, column). The
transformer stays in this order from the first layer to the last: everything but attention treats tokens one by one.
"""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor

WINDOW = (2, 8, 8)
BLOCK_TOKENS = 128


class Grid(NamedTuple):
    """Tokens of one process step: latent frames × rows × columns."""

    frames: int
    rows: int
    columns: int

    @property
    def groups(self) -> int:
        """Pairs of latent frames."""
        return self.frames // WINDOW[0]

    @property
    def block_rows(self) -> int:
        return self.rows // WINDOW[1]

    @property
    def block_columns(self) -> int:
        return self.columns // WINDOW[2]

    @property
    def blocks(self) -> int:
        """Blocks of one pair of latent frames."""
        return self.block_rows * self.block_columns

    @property
    def axes(self) -> dict[str, int]:
        """Sizes that the patterns below need: blocks g × r × c, tokens of one block f × hp × wp."""
        frames, rows, columns = WINDOW
        return {"g": self.groups, "r": self.block_rows, "c": self.block_columns, "f": frames, "hp": rows, "wp": columns}


def to_windows(tokens: Tensor, grid: Grid) -> Tensor:
    """BLD in (frame, row, column) order → BLD in window order."""
    return rearrange(tokens, "b (g f r hp c wp) d -> b (g r c f hp wp) d", **grid.axes)


def patchify(latent: Tensor, grid: Grid) -> Tensor:
    """Latent NCTHW → patches BLD in window order; D = (c·2 + y)·2 + x, as a (1,2,2) convolution reads them."""
    pattern = "b ch (g f) (r hp y) (c wp x) -> b (g r c f hp wp) (ch y x)"
    return rearrange(latent, pattern, y=2, x=2, **grid.axes)


def unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Patches BLD in window order, D = (y·2 + x)·C + c → latent NCTHW."""
    pattern = "b (g r c f hp wp) (y x ch) -> b ch (g f) (r hp y) (c wp x)"
    return rearrange(patches, pattern, y=2, x=2, **grid.axes)
