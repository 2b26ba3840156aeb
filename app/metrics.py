"""PSNR and SSIM of clips, in float64 accumulation."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two equally shaped tensors with values in 0..1; inf where they are equal."""
    error = (clip.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity of two THWC clips with values in 0..1: the mean over frames, channels and positions.

    11 × 11 Gaussian window of sigma 1.5 without padding, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13).

    Raises:
        ValueError: a side is smaller than the window.
    """
    _, height, width, _ = clip.shape
    if min(height, width) < _WINDOW:
        raise ValueError(f"ssim: expected sides of at least {_WINDOW} px; got {height}x{width}.")
    position = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    taps = torch.exp(-position.square() / (2 * _SIGMA**2))
    taps = taps / taps.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))

    total = 0.0
    for frame, other in zip(clip, reference, strict=True):
        a, b = (x.double().permute(2, 0, 1).unsqueeze(1) for x in (frame, other))
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        score = (2 * mean_a * mean_b + _K1**2) * (2 * covariance + _K2**2)
        score = score / ((mean_a**2 + mean_b**2 + _K1**2) * (var_a + var_b + _K2**2))
        total += score.mean().item()
    return total / len(clip)
