"""Window order: tokens grouped in blocks of 2 frames × 8 rows × 8 columns, the unit of sparse attention.

Blocks are ordered (frame pair, row block, column block); inside a block tokens are row-major. The transformer works in
this order from the first layer to the last, since every other operation treats tokens one by one.
"""

from __future__ import annotations

from typing import NamedTuple

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


def to_windows(tokens: Tensor, grid: Grid) -> Tensor:
    """BLD in (frame, row, column) order → BLD in window order."""
    (ft, hp, wp), (batch, _, dim) = WINDOW, tokens.shape
    blocks = tokens.view(batch, grid.groups, ft, grid.block_rows, hp, grid.block_columns, wp, dim)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(tokens.shape)


def patchify(latent: Tensor, grid: Grid) -> Tensor:
    """Latent NCTHW → patches BLD in window order; D = (c·2 + y)·2 + x, as a (1,2,2) convolution reads them."""
    (ft, hp, wp), (batch, channels, *_) = WINDOW, latent.shape
    x = latent.view(batch, channels, grid.groups, ft, grid.block_rows, hp, 2, grid.block_columns, wp, 2)
    return x.permute(0, 2, 4, 7, 3, 5, 8, 1, 6, 9).reshape(batch, -1, channels * 4)


def unpatchify(patches: Tensor, grid: Grid) -> Tensor:
    """Patches BLD in window order, D = (y·2 + x)·C + c → latent NCTHW."""
    (ft, hp, wp), (batch, _, features) = WINDOW, patches.shape
    x = patches.view(batch, grid.groups, grid.block_rows, grid.block_columns, ft, hp, wp, 2, 2, features // 4)
    return x.permute(0, 9, 1, 4, 2, 5, 7, 3, 6, 8).reshape(
        batch, features // 4, grid.frames, 2 * grid.rows, 2 * grid.columns
    )
