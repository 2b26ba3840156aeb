"""Low-quality projection: from video clips to one conditioning token per latent cell and transformer layer.

Two causal convolutions over time (kernel 4, stride 2) turn four video frames into one latent frame. Each clip is padded
in front with a cache of frames that the caller owns. The released versions differ in which frames those are:

* fixed / causal: the last two frames of the *previous* clip (use the cache, then update it).
* as trained (v1 as released): the last two frames of the *same* clip (update, then use); nothing passes between clips.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..operations import cast_on_use, owned, to_like, weight_and_bias
from .config import LQ_CACHE_ORDERS

PIXELS_PER_TOKEN = 16
PIXEL_CHANNELS = 3 * PIXELS_PER_TOKEN**2
"""Channels of the pixels of one token and frame."""
FRAMES_PER_CLIP = 4
KERNEL_FRAMES = 4
CACHE_FRAMES = 2


class LQCache(NamedTuple):
    """Inputs of the two convolutions at the end of the last clip; each tensor owns exactly its storage.

    Attributes:
        pixels: NCTHW, 768 × 2 × H/16 × W/16.
        features: NCTHW, hidden[0] × 2 × H/16 × W/16.
    """

    pixels: Tensor
    features: Tensor


class ChannelNorm(nn.Module):
    """Scales vectors over the channel axis to length sqrt(C), times gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: NCTHW."""
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * to_like(self.gamma, x)


def space_to_depth(clip: Tensor) -> Tensor:
    """NCTHW → a view N,3,16,16,T,H/16,W/16, whose axes 1 to 3 are the channel (c·16 + y)·16 + x."""
    return rearrange(clip, "n c t (h y) (w x) -> n c y x t h w", y=PIXELS_PER_TOKEN, x=PIXELS_PER_TOKEN)


class CausalLQ4xProjection(nn.Module):
    """The v1.1 projection. State-dict keys are the official ones.

    Args:
        hidden: widths after the two convolutions.
        dim: width of the transformer.
        layers: how many transformer layers get tokens of their own.
        operations: namespace with `Conv3d` and `Linear`; see `models.operations`.
    """

    cache_order = "fixed"

    def __init__(
        self, hidden: tuple[int, int] = (2048, 3072), dim: int = 1536, layers: int = 1, operations=cast_on_use
    ):
        super().__init__()
        kernel = {"kernel_size": (KERNEL_FRAMES, 3, 3), "stride": (2, 1, 1)}
        self.conv1 = operations.Conv3d(PIXEL_CHANNELS, hidden[0], **kernel)
        self.norm1 = ChannelNorm(hidden[0])
        self.conv2 = operations.Conv3d(hidden[0], hidden[1], **kernel)
        self.norm2 = ChannelNorm(hidden[1])
        self.linear_layers = nn.ModuleList([operations.Linear(hidden[1], dim) for _ in range(layers)])

    def forward(self, clip: Tensor, cache: LQCache | None = None) -> tuple[list[Tensor] | None, LQCache]:
        """Projects the next frames of a video.

        Args:
            clip: NCTHW in -1..1, H and W multiples of 16. At the start frame 0, alone or followed by whole clips of 4
                frames; whole clips of 4 frames after that.
            cache: left by the frames before; None at the start.

        Returns:
            One BLD token tensor per layer (L = latent frames · H/16 · W/16, ordered frame, row, column), or None if
            only frame 0 was given; and the cache for the next call.

        Raises:
            ValueError: the number of frames does not fit.
        """
        frames = clip.shape[2]
        if frames % FRAMES_PER_CLIP != (cache is None):
            raise ValueError(
                f"{type(self).__name__}: expected {'4k + 1 frames at the start' if cache is None else '4k frames'}; "
                f"got {frames}."
            )
        if cache is None:
            cache = self._start(clip[:, :, :1])
            clip = clip[:, :, 1:]
        if clip.shape[2] == 0:
            return None, LQCache(*(kept.detach() for kept in cache))
        padded = self._pad(space_to_depth(clip), cache.pixels)
        pixels = _tail(padded)
        hidden = F.silu(self.norm1(_convolve(self.conv1, padded)))
        padded = self._pad(hidden, cache.features)
        tokens = F.silu(self.norm2(_convolve(self.conv2, padded))).flatten(2).transpose(1, 2)
        return [linear(tokens) for linear in self.linear_layers], LQCache(pixels, _tail(padded))

    def _start(self, first: Tensor) -> LQCache:
        """The caches after frame 0, which counts as four copies of itself and yields no tokens."""
        frames = space_to_depth(first.expand(-1, -1, CACHE_FRAMES, -1, -1))
        pixels = owned(frames.flatten(1, 3))
        # Every window of the convolution sees the same frame, so one output stands for both.
        feature = F.silu(self.norm1(_convolve(self.conv1, self._pad(frames, pixels))))
        return LQCache(pixels, owned(feature.expand(-1, -1, CACHE_FRAMES, -1, -1)))

    def _pad(self, frames: Tensor, cache: Tensor) -> Tensor:
        """N,C,T,h,w (C may be several axes) → N,C,T+2,h+2,w+2: the cache in front, the outermost pixels replicated.

        Everything is copied once into one tensor, since this is the largest that a projection holds.
        """
        batch, *channels, time, height, width = frames.shape
        padded = frames.new_empty(batch, cache.shape[1], CACHE_FRAMES + time, height + 2, width + 2)
        inner = padded[..., 1:-1, 1:-1]
        inner[:, :, CACHE_FRAMES:].unflatten(1, channels).copy_(frames)
        inner[:, :, :CACHE_FRAMES] = cache if self.cache_order == "fixed" else inner[:, :, -CACHE_FRAMES:]
        for inside, border in ((1, 0), (-2, -1)):
            padded[..., border, 1:-1] = padded[..., inside, 1:-1]
        for inside, border in ((1, 0), (-2, -1)):
            padded[..., border] = padded[..., inside]
        return padded


def _tail(padded: Tensor) -> Tensor:
    """The last frames without their border: the next clip's cache, which remembers values and no graph."""
    return owned(padded.detach()[:, :, -CACHE_FRAMES:, 1:-1, 1:-1])


def _convolve(conv: nn.Conv3d, padded: Tensor) -> Tensor:
    """N,C,T+2,h+2,w+2 → N,C',T/2,h,w."""
    weight, bias = weight_and_bias(conv, padded)
    if padded.device.type == "cpu":
        return F.conv3d(padded, weight, bias, stride=(2, 1, 1))
    # A two-dimensional convolution over (channel, frame of the window) gives the same numbers without Conv3d, which is
    # slow in half precision on CUDA (pytorch #166643).
    windows = rearrange(padded.unfold(2, KERNEL_FRAMES, 2), "n c t h w k -> (n t) (c k) h w")
    outputs = F.conv2d(windows, weight.flatten(1, 2), bias)
    return rearrange(outputs, "(n t) c h w -> n c t h w", n=padded.shape[0])


class BufferLQ4xProjection(CausalLQ4xProjection):
    """The v1 projection. With `cache_order="fixed"` it equals `CausalLQ4xProjection` bit for bit.

    Args:
        cache_order: "fixed" (use the cache, then update it) or "as_trained" (update, then use: what the released v1
            weights were trained with; every clip is padded with its own last two frames).
    """

    def __init__(
        self,
        hidden: tuple[int, int] = (2048, 3072),
        dim: int = 1536,
        layers: int = 1,
        cache_order: str = "fixed",
        operations=cast_on_use,
    ):
        super().__init__(hidden, dim, layers, operations)
        if cache_order not in LQ_CACHE_ORDERS:
            raise ValueError(
                f"BufferLQ4xProjection.cache_order: expected one of {', '.join(LQ_CACHE_ORDERS)}; got {cache_order!r}."
            )
        self.cache_order = cache_order

    def forward(self, clip: Tensor, cache: LQCache | None = None) -> tuple[list[Tensor] | None, LQCache]:
        if self.cache_order == "fixed" or clip.shape[2] <= FRAMES_PER_CLIP:
            return super().forward(clip, cache)
        # Each clip is padded with its own frames, so clips are computed one by one.
        first = clip.shape[2] % FRAMES_PER_CLIP or FRAMES_PER_CLIP
        tokens, cache = super().forward(clip[:, :, :first], cache)
        layers = [] if tokens is None else [tokens]
        for part in clip[:, :, first:].split(FRAMES_PER_CLIP, 2):
            tokens, cache = super().forward(part, cache)
            layers += [] if tokens is None else [tokens]
        return [torch.cat(layer, 1) for layer in zip(*layers, strict=True)], cache
