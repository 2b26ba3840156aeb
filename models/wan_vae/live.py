"""Numbers alive at once while the Wan 2.1 VAE computes one tile: its local stages, walked through without computing.

Each function does what the `forward` of its layer does to memory, in the same order: what it makes is added, what it
lets go is taken away. Sizes come from the areas that the layers read, so a tile at the edge of a frame counts less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from ..tiling.areas import Area
from .layers import PIXEL_FRAMES, Downsample, ResidualBlock, Upsample
from .model import FRAMES_PER_LATENT, GLOBAL_UPSAMPLES, LOCAL_DOWNSAMPLES, PIXEL_DOWNSAMPLES, PIXEL_UPSAMPLES, WanVAE

REACH = 36
"""The most pixels that a tile reads to one side."""


class Live:
    """Numbers that are alive, and the most that were.

    Attributes:
        pasts: sizes of what the causal convolutions keep, in calling order.
        started: whether a chunk came before this one.
        last: whether none comes after it.
    """

    def __init__(self, itemsize: int) -> None:
        self.now = self.peak = 0
        self.pasts: deque[int] = deque()
        self.started = self.last = False
        self.itemsize, self.wide = itemsize, max(4, itemsize)

    def make(self, numbers: int) -> int:
        self.now += numbers
        self.peak = max(self.peak, self.now)
        return numbers

    def drop(self, *numbers: int) -> None:
        self.now -= sum(numbers)

    def normed(self, channels: int, pixels: int) -> int:
        """`rms_norm`: beside its result, the norm in fp32 and the scale."""
        beside = self.make(pixels * self.wide // self.itemsize + pixels)
        result = self.make(channels * pixels)
        self.drop(beside)
        return result

    def keep(self, numbers: int) -> None:
        if not self.last:
            self.pasts.append(self.make(numbers))

    def with_past(self, frame: int, frames: int) -> int:
        """`with_past`: what it makes of `frames` of that size; 0 where it hands on its input."""
        if not self.started:
            self.keep(2 * frame)
            return 0
        joined = self.make((frames + 2) * frame)
        self.drop(self.pasts.popleft())
        self.keep(2 * frame)
        return joined

    def convolved(self, x: int, frame: int, frames: int, made: int) -> int:
        """`with_past` and `causal` on x, which ends with them: `frames` of size `frame` to `frames` of size `made`."""
        if joined := self.with_past(frame, frames):
            self.drop(x)
        padded = self.make((frames + 2) * frame) if not joined and frames > 1 else 0
        result = self.make(frames * made)
        self.drop(padded, joined or x)
        return result


def residual(live: Live, block: Any, x: int, frames: int, area: Area) -> int:
    given, made = block.channels
    read, between = area.grown(2).pixels, area.grown(1).pixels
    h = live.normed(given, frames * read)
    h = live.convolved(h, given * read, frames, made * read)
    wide, h = h, live.normed(made, frames * between)
    live.drop(wide)
    h = live.convolved(h, made * between, frames, made * between)
    if block.shortcut is not None:
        live.drop(live.make(made * frames * area.pixels))
    live.drop(x)
    return h


def upsample(live: Live, block: Any, x: int, frames: int, area: Area) -> tuple[int, int]:
    """Returns what it makes, and how many frames."""
    channels, made = block.channels
    read, doubled = block.reads(area), 0
    if block.time_conv is not None and not live.started:
        zeros = live.make(2 * channels * read.pixels)
        if live.last:
            live.drop(zeros)
        else:
            live.pasts.append(zeros)
    elif block.time_conv is not None:
        joined = live.with_past(channels * read.pixels, frames)
        frames *= 2
        twice = live.make(channels * frames * read.pixels)
        live.drop(joined)
        doubled = live.make(twice)
        live.drop(twice)
    result, enlarged = live.make(made * frames * area.pixels), 4 * read.pixels
    frame = 0
    for _ in range(frames):
        pair = live.make(channels * enlarged), live.make(made * enlarged)
        live.drop(pair[0], frame)
        frame = pair[1]
    live.drop(frame, doubled, x)
    return result, frames


def downsample(live: Live, block: Any, x: int, frames: int, area: Area) -> tuple[int, int]:
    channels = block.channels[0]
    read, size = block.reads(area), channels * area.pixels
    height, width = read.shape
    result = live.make(frames * size)
    for _ in range(frames):
        padded = live.make(channels * (height + 1 - height % 2) * (width + 1 - width % 2))
        live.drop(padded, live.make(size))
    if block.time_conv is not None and not live.started:
        live.keep(size)
    elif block.time_conv is not None:
        past = live.pasts.popleft()
        live.keep(size)
        joined, frames = live.make((frames + 1) * size), frames // 2
        halved = live.make(frames * size)
        live.drop(joined, past, result)
        result = halved
    live.drop(x)
    return result, frames


def through(live: Live, blocks: Any, x: int, frames: int, areas: list[Area]) -> tuple[int, int]:
    """What is left of x after these blocks, whose results cover `areas`, and how many frames."""
    for block, area in zip(blocks, areas, strict=False):
        if isinstance(block, ResidualBlock):
            x = residual(live, block, x, frames, area)
        else:
            assert isinstance(block, Upsample | Downsample)
            x, frames = (upsample if isinstance(block, Upsample) else downsample)(live, block, x, frames, area)
    return x, frames


def tile_numbers(vae: WanVAE, area: Area, *, encodes: bool, latents: int, itemsize: int) -> int:
    """The most numbers alive while a `TiledDecode` or `TiledEncode` computes this area of the frames."""
    live, at_pixels = Live(itemsize), deque[int]()
    for index in range(latents):
        live.started, live.last = index > 0, index == latents - 1
        if encodes:
            left = _encoded(vae, live, at_pixels, area, FRAMES_PER_LATENT if index else 1)
        else:
            left = _decoded(vae, live, at_pixels, area)
        live.drop(left)
    return live.peak


def _pieces(live: Live, pasts: deque[int], frames: int) -> Iterator[int]:
    """Frames of each piece of a chunk, as of `CausalCache.pieces`, while the pasts of full resolution are in place."""
    own, started, last = live.pasts, live.started, live.last
    live.pasts = pasts
    for first in range(0, frames, PIXEL_FRAMES):
        live.last = last and first + PIXEL_FRAMES >= frames
        yield min(PIXEL_FRAMES, frames - first)
        live.started = True
    live.pasts, live.started, live.last = own, started, last


def _decoded(vae: WanVAE, live: Live, at_pixels: deque[int], area: Area) -> int:
    read, *areas = vae.decoder.local_areas(area)
    blocks: list[Any] = list(vae.decoder.upsamples[GLOBAL_UPSAMPLES:])
    inner = PIXEL_UPSAMPLES - GLOBAL_UPSAMPLES
    x = live.make(blocks[0].channels[0] * read.pixels)
    x, frames = through(live, blocks[:inner], x, 1, areas)
    made, widest = 0, areas[-1].pixels
    for piece in _pieces(live, at_pixels, frames):
        # A piece is a view: the chunk lives on, so the first block lets nothing go.
        wide, count = through(live, blocks[inner:], 0, piece, areas[inner:])
        h = live.normed(vae.dim, count * widest)
        live.drop(wide)
        made += live.convolved(h, vae.dim * widest, count, 3 * widest)
    live.drop(x)
    result = live.make(3 * frames * area.pixels)
    live.drop(made)
    return result


def _encoded(vae: WanVAE, live: Live, at_pixels: deque[int], area: Area, frames: int) -> int:
    encoder = vae.encoder
    assert encoder is not None
    read, *areas = encoder.local_areas(area.halved().halved().halved())
    blocks: list[Any] = list(encoder.downsamples[:LOCAL_DOWNSAMPLES])
    source = live.make(3 * frames * read.pixels * live.wide // live.itemsize)  # frames come in fp32
    x = live.make(3 * frames * read.pixels) if live.wide > live.itemsize else 0
    made = []
    for piece in _pieces(live, at_pixels, frames):
        joined = live.with_past(3 * read.pixels, piece)
        padded = live.make(3 * (piece + 2) * read.pixels) if not joined and piece > 1 else 0
        h = live.make(blocks[0].channels[0] * piece * read.pixels)
        live.drop(padded, joined)
        made.append(through(live, blocks[:PIXEL_DOWNSAMPLES], h, piece, areas[1:])[0])
    h = live.make(sum(made))
    live.drop(*made)
    h, _ = through(live, blocks[PIXEL_DOWNSAMPLES:], h, frames, areas[PIXEL_DOWNSAMPLES + 1 :])
    live.drop(source, x)
    return h
