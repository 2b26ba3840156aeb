"""Rotary position embedding over (frame, row, column), with angles computed on demand.

There is no table, hence no last position: process step 510 and beyond work like any other. Angles (position ·
10000^(-2m/d)) and their sines are float64, the rotation itself is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operations import uploaded
from .windows import WINDOW, Grid

BASE = 10000.0


def rotation(
    grid: Grid, first_frame: int, head_dim: int, device: torch.device, corner: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the tokens of one process step.

    Args:
        grid: tokens of the step.
        first_frame: position of its first latent frame in the whole video.
        corner: row and column of its first token in the whole frame.

    Returns:
        Two fp32 tensors, L × 1 × head_dim/2, in window order.
    """
    third = head_dim // 3
    # Channels of one head that turn with the frame, the row and the column (Wan 2.1: 44, 42, 42 of 128).
    dims = (head_dim - 2 * third, third, third)
    angles = []
    for start, count, dim in zip((first_frame, *corner), grid, dims, strict=True):
        frequencies = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.arange(start, start + count, dtype=torch.float64)[:, None] * frequencies)
    flat = torch.cat([angle.flatten() for angle in angles])
    # One small upload: an angle belongs to one axis alone, and the device repeats it along the others.
    table = uploaded(torch.stack([flat.cos(), flat.sin()]).float(), device)
    blocks = [count // side for count, side in zip(grid, WINDOW, strict=True)]
    parts = []
    for axis, values in enumerate(table.split([angle.numel() for angle in angles], 1)):
        # [cos and sin, frame blocks, row blocks, column blocks, 2, 8, 8, pairs]
        shape = [2] + [1] * 6 + [-1]
        shape[axis + 1], shape[axis + 4] = blocks[axis], WINDOW[axis]
        parts.append(values.reshape(shape).expand(2, *blocks, *WINDOW, -1))
    cos, sin = torch.cat(parts, -1).reshape(2, -1, 1, head_dim // 2)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channel pairs (2m, 2m+1) of x (L × heads × head_dim) in fp32; returns x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
