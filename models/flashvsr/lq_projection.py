"""Low-quality projection: video clips to one conditioning token per latent cell and transformer layer.

Two causal convolutions over time (kernel 4, stride 2) make one latent frame of four video frames. The front of each
clip is padded with a cache of frames that the caller owns. Which frames those are is the difference between the
released versions:

* fixed / causal: the last two frames of the *previous* clip (use the cache, then update it).
* as trained (v1 as released): the last two frames of the *same* clip (update, then use): no memory between clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operations import cast_on_use, to_like, weight_and_bias
from .config import LQ_CACHE_ORDERS

PIXELS_PER_TOKEN = 16
FRAMES_PER_CLIP = 4
KERNEL_FRAMES = 4
CACHE_FRAMES = 2


@dataclass(frozen=True)
class LQCache:
    """Inputs of the two convolutions at the end of the last clip; each tensor owns exactly its own storage.

    Attributes:
        pixels: NCTHW, 768 × 2 × H/16 × W/16.
        features: NCTHW, hidden[0] × 2 × H/16 × W/16.
    """

    pixels: Tensor
    features: Tensor


class ChannelNorm(nn.Module):
    """Vectors over the channel axis scaled to length sqrt(C), times gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: NCHW, one latent or half-latent frame per batch entry."""
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * to_like(self.gamma[..., 0], x)


def space_to_depth(clip: Tensor) -> Tensor:
    """NCTHW → N,768,T,H/16,W/16 with channel = (c·16 + y)·16 + x."""
    batch, channels, time, height, width = clip.shape
    p = PIXELS_PER_TOKEN
    cells = clip.reshape(batch, channels, time, height // p, p, width // p, p)
    return cells.permute(0, 1, 4, 6, 2, 3, 5).reshape(batch, channels * p * p, time, height // p, width // p)


def _owned(frames: Tensor) -> Tensor:
    return frames.clone(memory_format=torch.contiguous_format)


class CausalLQ4xProjection(nn.Module):
    """The v1.1 projection. State-dict keys are the official ones.

    Args:
        hidden: widths after the two convolutions.
        dim: width of the transformer.
        layers: transformer layers that get tokens of their own.
        operations: namespace with `Conv3d` and `Linear`; see `models.operations`.
    """

    cache_order = "fixed"

    def __init__(
        self, hidden: tuple[int, int] = (2048, 3072), dim: int = 1536, layers: int = 1, operations=cast_on_use
    ):
        super().__init__()
        pixels = 3 * PIXELS_PER_TOKEN**2
        kernel = {"kernel_size": (KERNEL_FRAMES, 3, 3), "stride": (2, 1, 1)}
        self.conv1 = operations.Conv3d(pixels, hidden[0], **kernel)
        self.norm1 = ChannelNorm(hidden[0])
        self.conv2 = operations.Conv3d(hidden[0], hidden[1], **kernel)
        self.norm2 = ChannelNorm(hidden[1])
        self.linear_layers = nn.ModuleList([operations.Linear(hidden[1], dim) for _ in range(layers)])

    def forward(self, clip: Tensor, cache: LQCache | None = None) -> tuple[list[Tensor] | None, LQCache]:
        """Projects the next frames of a video.

        Args:
            clip: NCTHW in -1..1, H and W multiples of 16. Frame 0 alone or followed by whole clips of 4 frames at the
                start; whole clips of 4 frames after that.
            cache: of the frames before; None at the start.

        Returns:
            One BLD token tensor per layer (L = latent frames · H/16 · W/16, in frame, row, column order), or None where
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
        pixels = space_to_depth(clip)
        if cache is None:
            cache = self._start(pixels[:, :, :1])
            pixels = pixels[:, :, 1:]
        if pixels.shape[2] == 0:
            return None, cache
        hidden = self._halve(self.conv1, self.norm1, pixels, cache.pixels)
        features = self._halve(self.conv2, self.norm2, hidden, cache.features)
        cache = LQCache(_owned(pixels[:, :, -CACHE_FRAMES:]), _owned(hidden[:, :, -CACHE_FRAMES:]))
        tokens = features.flatten(2).transpose(1, 2)
        return [linear(tokens) for linear in self.linear_layers], cache

    def _start(self, first: Tensor) -> LQCache:
        """The caches after frame 0, which counts as a clip of four copies of itself and yields no tokens."""
        still = first.expand(-1, -1, KERNEL_FRAMES, -1, -1)
        # Every window of the convolution sees the same frame, so one output stands for both.
        feature = F.silu(self.norm1(_convolve(self.conv1, _pad_border(still.flatten(1, 2))))).unsqueeze(2)
        return LQCache(
            _owned(first.expand(-1, -1, CACHE_FRAMES, -1, -1)), _owned(feature.expand(-1, -1, CACHE_FRAMES, -1, -1))
        )

    def _halve(self, conv: nn.Conv3d, norm: ChannelNorm, frames: Tensor, cache: Tensor) -> Tensor:
        """SiLU(norm(conv)) over time: N,C,T,h,w → N,C',T/2,h,w."""
        batch = frames.shape[0]
        frames = _pad_border(self._pad_front(frames, cache).flatten(0, 1)).unflatten(0, (batch, -1))
        # N,C,T/2,h,w,4 → a two-dimensional convolution whose channels are (channel, frame of the window): the same
        # numbers, and no slow half-precision Conv3d (pytorch #166643).
        windows = frames.unfold(2, KERNEL_FRAMES, 2).permute(0, 2, 1, 5, 3, 4)
        outputs = F.silu(norm(_convolve(conv, windows.flatten(0, 1).flatten(1, 2))))
        return outputs.unflatten(0, (batch, -1)).transpose(1, 2)

    def _pad_front(self, frames: Tensor, cache: Tensor) -> Tensor:
        return torch.cat([cache, frames], 2)


def _pad_border(frames: Tensor) -> Tensor:
    """Replicates the outermost rows and columns once: …,h,w → …,h+2,w+2."""
    return F.pad(frames, (1, 1, 1, 1), mode="replicate")


def _convolve(conv: nn.Module, window: Tensor) -> Tensor:
    """window: N,C·4,h+2,w+2 → N,C',h,w; the Conv3d kernel read as a Conv2d kernel."""
    weight, bias = weight_and_bias(conv, window)
    return F.conv2d(window, weight.flatten(1, 2), bias)


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
        # Each clip is padded from itself, so clips are computed one by one.
        head = clip.shape[2] % FRAMES_PER_CLIP or FRAMES_PER_CLIP
        tokens, cache = super().forward(clip[:, :, :head], cache)
        layers = [tokens] if tokens is not None else []
        for part in clip[:, :, head:].split(FRAMES_PER_CLIP, 2):
            tokens, cache = super().forward(part, cache)
            assert tokens is not None
            layers.append(tokens)
        return [torch.cat(layer, 1) for layer in zip(*layers, strict=True)], cache

    def _pad_front(self, frames: Tensor, cache: Tensor) -> Tensor:
        if self.cache_order == "fixed":
            return super()._pad_front(frames, cache)
        return torch.cat([frames[:, :, -CACHE_FRAMES:], frames], 2)
