"""Colour transfer from the low-quality frames to the result, in fp32 and always clamped.

Layout NCTHW in -1..1. Each frame is treated on its own, so a clip may be cut anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

VARIANCE_FLOOR = 1e-5
WAVELET_LEVELS = 5


def adain(frames: Tensor, reference: Tensor) -> Tensor:
    """Gives each channel of each frame the mean and variance of the reference (arXiv 1703.06868, eq. 8).

    Args:
        frames, reference: NCTHW of one shape, without padding.

    Returns:
        fp32, NCTHW, clamped to -1..1.
    """
    frames, reference = frames.float(), reference.float()
    variance, mean = torch.var_mean(frames, (-2, -1), correction=0, keepdim=True)
    wanted_variance, wanted_mean = torch.var_mean(reference, (-2, -1), correction=0, keepdim=True)
    gain = ((wanted_variance + VARIANCE_FLOOR) / (variance + VARIANCE_FLOOR)).sqrt()
    return frames.sub(mean).mul_(gain).add_(wanted_mean).clamp_(-1, 1)


def wavelet(frames: Tensor, reference: Tensor) -> Tensor:
    """Puts the high frequencies of the frames on the low ones of the reference (à-trous wavelet, five levels).

    Args:
        frames, reference: NCTHW of one shape, without padding.

    Returns:
        fp32, NCTHW, clamped to -1..1.
    """
    frames, reference = frames.float(), reference.float()
    return frames.sub(_low(frames)).add_(_low(reference)).clamp_(-1, 1)


def clamped(frames: Tensor, reference: Tensor) -> Tensor:
    """No transfer: the frames in fp32, clamped to -1..1."""
    return frames.float().clamp(-1, 1)


METHODS = {"adain": adain, "wavelet": wavelet, "none": clamped}


def _low(x: Tensor) -> Tensor:
    """Low frequencies of NCTHW: binomial [1 2 1]²/16 smoothing with radius 1, 2, 4, 8, 16 in turn, borders repeated."""
    batch = x.shape[0]
    x = rearrange(x, "n c t h w -> (n t) c h w")
    for level in range(WAVELET_LEVELS):
        r = 2**level
        y = F.pad(x, (r, r, 0, 0), mode="replicate")
        x = (y[..., : -2 * r] + 2 * y[..., r:-r] + y[..., 2 * r :]) / 4
        y = F.pad(x, (0, 0, r, r), mode="replicate")
        x = (y[..., : -2 * r, :] + 2 * y[..., r:-r, :] + y[..., 2 * r :, :]) / 4
    return rearrange(x, "(n t) c h w -> n c t h w", n=batch)
