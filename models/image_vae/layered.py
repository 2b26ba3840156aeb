"""An image through a chain of layers, one layer after another, each in tiles.

Between two layers the whole image is on the CPU. A layer reads a tile of it with as many positions around it as its
kernel reaches, so nothing is blended and every position is computed once. A GroupNorm takes its statistics from the
whole image, gathered from the tiles of the layer before it. So the result is that of the whole image, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..tiling.areas import Area
from ..tiling.job import NotFinite, OnStep

PIECES = 8
"""Channels are converted to fp32 in this many pieces, to bound the memory that takes."""
ATTENTION_SCORES = 1 << 24
"""Attention scores computed at a time."""

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One layer, with what comes between it and the layer before.

    Attributes:
        name: for errors.
        compute: maps an area NCHW, with the positions read around it, to the layer's output there.
        channels: of its input and of its output.
        pixels: pixels of the image along a side of one position of the input.
        before, after: positions read above and to the left of an area, and below and to the right.
        up, down: positions of the output per position of the input along a side, and the reverse.
        norm: a GroupNorm of the input, followed by a SiLU.
        keeps: whether its input is kept for a later layer's sum.
        adds: whether the kept image is added to its output.
        shortcut: maps the kept image for the sum; None adds it as it is.
        whole: whether it sees the whole image at once, at the resolution of the latents.
    """

    name: str
    compute: Callable[[Tensor], Tensor]
    channels: tuple[int, int]
    pixels: int
    before: int = 0
    after: int = 0
    up: int = 1
    down: int = 1
    norm: nn.GroupNorm | None = None
    keeps: bool = False
    adds: bool = False
    shortcut: Callable[[Tensor], Tensor] | None = None
    whole: bool = False


class LayeredJob:
    """Encodes or decodes images: a `models.tiling.TileJob` whose units are tiles of single layers.

    Args:
        steps: the chain, made by `encoder_steps` or `decoder_steps`.
        source: NCHW on the CPU; its height and width are multiples of what the chain divides them by.
        tile: side of the tiles in pixels; at lower resolutions they have fewer positions.
        device, dtype: of the computation; images between the layers are kept in that dtype.
        prepare: applied to each piece of the source in its own dtype, on the device.
        finish: applied to each piece of the result in fp32 (fp64 stays fp64), on the device.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        source: Tensor,
        tile: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Elementwise = lambda x: x,
        finish: Elementwise = lambda x: x,
    ) -> None:
        if source.ndim != 4 or 0 in source.shape:
            raise ValueError(f"layers: expected NCHW without an empty axis; got {tuple(source.shape)}.")
        self.device, self.dtype, self.tile = device, dtype, tile
        self.result = torch.empty(0)
        self._steps, self._source, self._prepare, self._finish = list(steps), source, prepare, finish
        self._sample = self.done = 0
        self._begin_sample()

    @property
    def total(self) -> int:
        left = self._source.shape[0] - self._sample
        if not left:
            return self.done
        (height, width), counts = self._source.shape[-2:], []
        for step in self._steps:
            counts.append(len(self._areas(step, (height, width))))
            height, width = height * step.up // step.down, width * step.up // step.down
        return self.done + len(self._left) + sum(counts[self._index + 1 :]) + (left - 1) * sum(counts)

    def cut(self, tile: int) -> None:
        """Goes on in tiles of this side; finished ones are kept."""
        self.tile = tile
        step = self._steps[self._index]
        if not step.whole:
            self._left = [part for area in self._left for part in area.parts(self._side(step), step.down)]

    @torch.no_grad()
    def advance(self, on_step: OnStep) -> None:
        """Computes one tile of one layer.

        Raises:
            NotFinite: NaN or infinity came out.
        """
        on_step()
        step, area = self._steps[self._index], self._left[0]
        read = area.grown(step.before, step.after)
        x = read.of(self._map).to(self.device)
        if self._index == 0:
            x = self._prepare(x.clone())
        x = x.to(self.dtype)
        if step.norm is not None:
            x = F.silu(_normalised(x, step.norm, *self._statistics(step.norm)), inplace=True)
        y = step.compute(x)
        del x
        out = area.scaled(step.up, step.down)
        y = out.inside(y, read.scaled(step.up, step.down))
        if step.adds:
            kept = area.of(self._kept).to(self.device, self.dtype)
            y = (kept if step.shortcut is None else step.shortcut(kept)) + y
        if not torch.isfinite(y).all():
            dtype = str(y.dtype).removeprefix("torch.")
            raise NotFinite(
                f"layers: expected finite numbers; got NaN or infinity in {step.name}, {area}, computed in {dtype}."
            )
        last = self._index == len(self._steps) - 1
        following = None if last else self._steps[self._index + 1].norm
        moments = None if following is None else _moments(y, following.num_groups)
        self._store(self._finish(y.to(_wide(y.dtype))) if last else y, step, out)
        if moments is not None:
            self._moments.append(moments)
        self._left.pop(0)
        self.done += 1
        if not self._left:
            self._next_step(step)

    def _store(self, y: Tensor, step: Step, out: Area) -> None:
        made = self._out
        if made is None:
            height, width = (size * step.up // step.down for size in self._map.shape[-2:])
            made = torch.empty(1, y.shape[1], height, width, dtype=y.dtype)
        elif made.dtype.itemsize < y.dtype.itemsize:
            # A tile that overflowed in half precision was computed again in fp32.
            made = made.to(y.dtype)
        out.of(made)[:] = y.cpu()
        self._out = made

    def _next_step(self, step: Step) -> None:
        assert self._out is not None
        if step.keeps:
            self._kept = self._map
        if step.adds:
            self._kept = torch.empty(0)
        self._map, self._out = self._out, None
        self._known, self._moments = self._moments, []
        self._index += 1
        if self._index < len(self._steps):
            self._left = self._areas(self._steps[self._index], self._map.shape[-2:])
            return
        if self._sample == 0:
            self.result = torch.empty(self._source.shape[0], *self._map.shape[1:], dtype=self._map.dtype)
        self.result[self._sample] = self._map[0]
        self._sample += 1
        if self._sample < self._source.shape[0]:
            self._begin_sample()
        else:
            self._map, self._known, self._left = torch.empty(0), [], []

    def _begin_sample(self) -> None:
        self._index = 0
        self._map = self._source[self._sample : self._sample + 1]
        self._kept = torch.empty(0)
        self._out: Tensor | None = None
        self._known: list[Tensor] = []
        self._moments: list[Tensor] = []
        self._left = self._areas(self._steps[0], self._map.shape[-2:])

    def _areas(self, step: Step, size: Sequence[int]) -> list[Area]:
        whole = Area.whole(*size)
        return [whole] if step.whole else whole.parts(self._side(step), step.down)

    def _side(self, step: Step) -> int:
        return max(1, self.tile // step.pixels)

    def _statistics(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Mean and variance of the groups of the layer's whole input."""
        count, mean, squares = torch.stack(self._known).unbind(1)
        whole = count.sum(0)
        middle = (count * mean).sum(0) / whole
        # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        variance = (squares + count * (mean - middle).square()).sum(0) / whole
        return middle, variance


def predicted_bytes(steps: Sequence[Step], size: tuple[int, int], tile: int, itemsize: int) -> int:
    """Bytes that the largest unit takes on the device beside the weights; `size` is (height, width) in pixels."""
    most = 0
    for step in steps:
        height, width = size[0] // step.pixels, size[1] // step.pixels
        side = max(height, width) if step.whole else max(1, tile // step.pixels)
        reach = 0 if step.whole else step.before + step.after
        inside = min(height, side + reach) * min(width, side + reach)
        scale = (step.up / step.down) ** 2
        # Input, what is made of it, output, and what is added; in an attention also q, k, v and the scores, twice.
        elements = inside * (step.channels[0] * (5 if step.whole else 2) + step.channels[1] * scale * 2)
        elements += 2 * min(ATTENTION_SCORES, inside**2) if step.whole else inside * step.channels[0] * step.up**2
        most = max(most, int(elements * itemsize))
    return most


def map_bytes(steps: Sequence[Step], size: tuple[int, int], itemsize: int) -> int:
    """The most bytes in RAM that the images between the layers take; `size` is (height, width) in pixels."""
    most, kept = 0, 0
    for step in steps:
        height, width = size[0] // step.pixels, size[1] // step.pixels
        given = step.channels[0] * height * width
        made = step.channels[1] * height * width * step.up**2 // step.down**2
        most = max(most, given + made + (kept if step.adds else 0))
        kept = given if step.keeps else kept
    return most * itemsize


def attend(norm: nn.Module, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module, proj: nn.Module, x: Tensor) -> Tensor:
    """x NCHW plus its single-head self-attention over all positions, computed for blocks of queries."""
    n, c, h, w = x.shape
    hidden = norm(x)
    q, k, v = (rearrange(layer(hidden), "n c h w -> n 1 (h w) c") for layer in (to_q, to_k, to_v))
    del hidden
    blocks = [F.scaled_dot_product_attention(block, k, v) for block in q.split(max(1, ATTENTION_SCORES // (h * w)), 2)]
    return x + proj(torch.cat(blocks, dim=2).transpose(2, 3).reshape(n, c, h, w))


def _moments(x: Tensor, groups: int) -> Tensor:
    """Count, mean and sum of squared deviations of each group of NCHW: 3 × groups, fp64 on the CPU."""
    flat = x.reshape(groups, -1)
    pieces = flat.split(max(1, groups // PIECES))
    found = [torch.var_mean(piece.to(_wide(x.dtype)), dim=1, correction=0) for piece in pieces]
    # fp64 on the CPU only: not every accelerator has it.
    variance, mean = (torch.cat(parts).cpu().double() for parts in zip(*found, strict=True))
    count = torch.full_like(mean, flat.shape[1])
    return torch.stack([count, mean, variance * count])


def _normalised(x: Tensor, norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> Tensor:
    """GroupNorm of NCHW with given statistics of its groups."""
    wide, per_group = _wide(x.dtype), x.shape[1] // norm.num_groups
    scale = torch.rsqrt(variance + norm.eps).repeat_interleave(per_group).to(x.device, wide)
    scale = scale * norm.weight.to(scale)
    shift = norm.bias.to(scale) - mean.repeat_interleave(per_group).to(x.device, wide) * scale
    result = torch.empty_like(x)
    for part in torch.arange(x.shape[1]).chunk(PIECES):
        of = slice(int(part[0]), int(part[-1]) + 1)
        result[:, of] = torch.addcmul(shift[of, None, None], x[:, of].to(wide), scale[of, None, None])
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(dtype, torch.float32)
