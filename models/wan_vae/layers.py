"""The building blocks of the Wan 2.1 VAE: causal convolutions over time, and the cache they share.

Nothing here remembers a frame. A clip that arrives in chunks carries its past in a `CausalCache` owned by the caller.
All tensors are NCTHW.

Every layer computes one area of its output frame, possibly all of it. It is given the area of its input that `reads`
names, and crops what zero padding at a tile's inner edges has spoiled. So a tile equals the same part of the whole
frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..operations import owned, to_like
from ..tiling.areas import Area, Interval

ATTENTION_SCORES = 1 << 22
"""Scores computed at a time: an attention kernel without a fused path would hold tokens² of them."""

PIXEL_FRAMES = 2
"""Frames computed at once at full resolution."""


class CausalCache:
    """What the temporal convolutions of one network keep of one clip: the last input frames of each, in calling order.

    `frames` is a queue: in each chunk every convolution takes its past from the front and puts its new past at the end,
    so the order is the same after the chunk. It changes in place, so that a layer's old past is released as soon as the
    layer has run. Every tensor owns exactly its storage, on `device` (None: where it is made).

    `pixels` is a separate queue for the layers at full resolution, which see fewer frames at a time than a chunk has.
    """

    def __init__(self, device: torch.device | None = None, with_pixels: bool = True) -> None:
        self.frames: deque[Tensor] = deque()
        self.device = device
        self.pixels = CausalCache(device, with_pixels=False) if with_pixels else self
        self.started = False
        self._usable = True
        self._last = False

    def copy(self, device: torch.device | None = None) -> CausalCache:
        """An independent cache over the same tensors; with `device`, it rests there from now on."""
        copied = CausalCache(device or self.device, with_pixels=False)
        copied.pixels = copied if self.pixels is self else self.pixels.copy(device)
        copied.frames.extend(frames if device is None else frames.to(device) for frames in self.frames)
        copied.started, copied._usable, copied._last = self.started, self._usable, self._last
        return copied

    @contextmanager
    def chunk(self, last: bool = False) -> Iterator[None]:
        """Surrounds one pass of the network over a chunk. After the `last` one nothing is kept and the cache has ended.

        Raises:
            RuntimeError: the cache has ended, or an exception interrupted its last chunk.
        """
        if not self._usable:
            raise RuntimeError(
                "Wan VAE: expected the cache of a stream in progress; got one that has ended or was interrupted. "
                "Start again with cache=None."
            )
        self._usable = False
        self._last = last
        try:
            yield
        except BaseException:
            self.frames.clear()
            self.pixels.frames.clear()
            raise
        self._usable = not last
        self.started = True

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """The frames of one chunk, two at a time, each time with `pixels` ready for them."""
        pieces = x.split(PIXEL_FRAMES, dim=2)
        for i, piece in enumerate(pieces):
            with self.pixels.chunk(last=self._last and i == len(pieces) - 1):
                yield piece

    def take(self) -> Tensor | None:
        """The past of the current convolution; None in a clip's first chunk."""
        return self.frames.popleft() if self.started else None

    def put(self, past: Tensor, zeros: int = 0) -> None:
        """Keeps a copy, preceded by `zeros` frames of zeros."""
        if not self._last:
            kept = F.pad(past, (0, 0, 0, 0, zeros, 0)) if zeros else owned(past)
            self.frames.append(kept if self.device is None else kept.to(self.device))


def with_past(x: Tensor, cache: CausalCache) -> Tensor:
    """The two frames before `x`, then `x`: the input of a convolution that spans three frames.

    At the start of a clip nothing is prepended: `causal` accounts for the zeros there. Callers rebind their own `x` to
    the result before they convolve: at full resolution, a name that outlives its use costs hundreds of megabytes.
    """
    past = cache.take()
    if past is None:
        cache.put(x[:, :, -2:], zeros=max(0, 2 - x.shape[2]))
        return x
    x = torch.cat([past.to(x.device), x], dim=2)
    del past
    cache.put(x[:, :, -2:])
    return x


def causal(conv, x: Tensor, frames: int) -> Tensor:
    """Convolves over time and returns `frames` frames, the first of which may reach back to before the clip.

    For a first chunk of one frame, the taps of the kernel that would meet zeros are left out.
    """
    if x.shape[2] == frames:
        if frames == 1:
            return conv(x, autopad="causal_zero")
        x = F.pad(x, (0, 0, 0, 0, 2, 0))
    return conv(x)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Scales each pixel to root mean square `gamma` over its channels; the norm is computed in fp32 at least."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = x.shape[1] ** 0.5 / norm.clamp_min(1e-12)
    scale = scale.clamp_max(torch.finfo(x.dtype).max).to(x.dtype)  # a black pixel stays 0 in fp16: no 0 * inf
    return (x * scale).mul_(to_like(gamma, x))


class RMSNorm(nn.Module):
    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, operations) -> None:
        super().__init__()
        self.channels = channels_in, channels_out
        # Numbered like the official sequence, in which 1, 4 (SiLU) and 5 (dropout) have no weights.
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(channels_in, 3),
                "2": operations.Conv3d(channels_in, channels_out, 3, padding=(0, 1, 1)),
                "3": RMSNorm(channels_out, 3),
                "6": operations.Conv3d(channels_out, channels_out, 3, padding=(0, 1, 1)),
            }
        )
        self.shortcut = operations.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else None

    @staticmethod
    def reads(area: Area) -> Area:
        return area.grown(2)

    def forward(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        frames, read, between = x.shape[2], area.grown(2), area.grown(1)
        h = F.silu(self.residual["0"](x), inplace=True)
        h = with_past(h, cache)
        h = between.inside(causal(self.residual["2"], h, frames), read)
        h = F.silu(self.residual["3"](h), inplace=True)
        h = with_past(h, cache)
        h = area.inside(causal(self.residual["6"], h, frames), between)
        x = area.inside(x, read)
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention among the pixels of each frame, which must be whole."""

    def __init__(self, channels: int, operations) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = operations.Conv2d(channels, channels * 3, 1)
        self.proj = operations.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        return torch.stack([frame + self._attend(frame) for frame in x.unbind(2)], dim=2)

    def _attend(self, frame: Tensor) -> Tensor:
        n, c, h, w = frame.shape
        qkv = rearrange(self.to_qkv(self.norm(frame)), "n c h w -> n 1 (h w) c").contiguous()
        q, k, v = qkv.chunk(3, dim=-1)
        at_once = max(1, ATTENTION_SCORES // (h * w))
        blocks = [F.scaled_dot_product_attention(block, k, v) for block in q.split(at_once, dim=2)]
        return self.proj(torch.cat(blocks, dim=2).transpose(2, 3).reshape(n, c, h, w))


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `temporal`, doubles the frames except the first."""

    def __init__(self, channels: int, temporal: bool, operations) -> None:
        super().__init__()
        self.channels = channels, channels // 2
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = operations.Conv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    @staticmethod
    def reads(area: Area) -> Area:
        return area.grown(1).halved()

    def forward(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, cache)
        n, c, t, _, _ = x.shape
        out = x.new_empty(n, c // 2, t, *area.shape)
        enlarged = self.reads(area).scaled(2)
        for i in range(t):  # one frame at a time: the enlarged input has twice the elements of the output
            frame = self.resample["1"](F.interpolate(x[:, :, i], scale_factor=2, mode="nearest-exact"))
            out[:, :, i] = area.inside(frame, enlarged)
        return out

    @staticmethod
    def _double_frames(time_conv: nn.Module, x: Tensor, cache: CausalCache) -> Tensor:
        n, c, t, h, w = x.shape
        if not cache.started:
            # The first latent is one frame and is not doubled. It is also forgotten: in training, zeros came before the
            # second latent, not the first one (the marker "Rep" in the official cache).
            cache.put(x.new_zeros(n, c, 2, h, w))
            return x
        x = causal(time_conv, with_past(x, cache), t)
        return rearrange(x, "n (two c) t h w -> n c (t two) h w", two=2)


class Downsample(nn.Module):
    """Halves height and width; with `temporal`, halves the frames except the first."""

    def __init__(self, channels: int, temporal: bool, operations) -> None:
        super().__init__()
        self.channels = channels, channels
        self.resample = nn.ModuleDict({"1": operations.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = operations.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    @staticmethod
    def reads(area: Area) -> Area:
        """One pixel more to the right and below, if there is one: a kernel of 3 with a stride of 2."""
        return Area(*(Interval(2 * start, min(2 * stop + 1, 2 * n), 2 * n) for start, stop, n in area))

    def forward(self, x: Tensor, cache: CausalCache, area: Area) -> Tensor:
        n, c, t, h, w = x.shape
        out = x.new_empty(n, c, t, *area.shape)
        beyond = (0, 1 - w % 2, 0, 1 - h % 2)
        for i in range(t):
            out[:, :, i] = self.resample["1"](F.pad(x[:, :, i], beyond))
        if self.time_conv is None:
            return out
        past = cache.take()
        cache.put(out[:, :, -1:])
        return out if past is None else self.time_conv(torch.cat([past, out], dim=2))
