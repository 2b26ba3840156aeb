"""Procedural clips: moving patterns, glyphs, edges and textures under a moving camera, and their degradation.

A clip is a pure function of its seed. It is drawn analytically at continuous coordinates (coverage of one output pixel
at every edge), so sub-pixel motion costs no resampling blur. A longer clip has the shorter one as its prefix.
The generator, the degradation and `HELD_OUT_SEEDS` were fixed before the first training run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional as F

SCALE = 4
HELD_OUT_SEEDS = (900_001, 900_002, 900_003, 900_004, 900_005, 900_007, 900_008, 900_009)
HELD_OUT_FRAMES, HELD_OUT_HEIGHT, HELD_OUT_WIDTH = 29, 256, 256
TRAINING_SEED_LIMIT = 900_000

_LATTICE = 128
_GLYPH_ROWS, _GLYPH_COLUMNS, _ALPHABET = 7, 5, 24

Field = np.ndarray
Pattern = Callable[[Field, Field, Field], Field]


def make_clip(seed: int, frames: int, height: int, width: int) -> torch.Tensor:
    """THWC float32 in 0..1 on the 8-bit grid; the same for the same arguments on every machine.

    Drawn with numpy's Philox generator; the rounding to 8 bit at the end absorbs differences of libm.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    camera = _Motion(rng, speed=1.6, turn=0.006, zoom=0.006)
    time = np.arange(frames, dtype=np.float64)[:, None, None]
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = camera(time, x[None] - width / 2, y[None] - height / 2)
    pixel = camera.scale(time).astype(np.float32)

    image = _backdrop(rng, u, v, pixel)
    for _ in range(int(rng.integers(1, 3))):
        _paint(image, _region(rng, u, v, pixel, width, height), _texture(rng), u, v, pixel)
    for _ in range(int(rng.integers(5, 11))):
        motion = _Motion(rng, speed=2.2, turn=0.02, zoom=0.0)
        centre = (rng.uniform(-0.6, 0.6) * width, rng.uniform(-0.6, 0.6) * height)
        a, b = motion(time, u - centre[0], v - centre[1])
        shape, texture = _shape(rng), _texture(rng)
        _paint(image, shape(a, b, pixel), texture, a, b, pixel)
    image = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, 0, -1))).float() / 255


def degrade(clip: torch.Tensor) -> torch.Tensor:
    """THWC → THWC at a quarter of the size: antialiased bicubic, clamped, rounded to 8 bit.

    Raises:
        ValueError: height or width is not a multiple of 4.
    """
    _, height, width, _ = clip.shape
    if height % SCALE or width % SCALE:
        raise ValueError(f"degrade: expected height and width in multiples of {SCALE}; got {height}x{width}.")
    return (_bicubic(clip, height // SCALE, width // SCALE) * 255).round().div(255)


def enlarge(clip: torch.Tensor) -> torch.Tensor:
    """THWC → THWC four times larger: clamped bicubic, the baseline and the network's condition."""
    _, height, width, _ = clip.shape
    return _bicubic(clip, height * SCALE, width * SCALE)


def _bicubic(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    frames = F.interpolate(rearrange(clip, "t h w c -> t c h w"), (height, width), mode="bicubic", antialias=True)
    return rearrange(frames.clamp(0, 1), "t c h w -> t h w c").contiguous()


class _Motion:
    """A similarity that changes smoothly with time: drift, sway, turn and zoom (world units are pixels)."""

    def __init__(self, rng: np.random.Generator, speed: float, turn: float, zoom: float):
        self.angle, self.turn = rng.uniform(-np.pi, np.pi) if rng.random() < 0.5 else 0.0, rng.uniform(-turn, turn)
        self.drift = rng.uniform(-speed, speed, 2)
        self.sway, self.rate, self.phase = rng.uniform(0, 2, 2), rng.uniform(0.1, 0.5), rng.uniform(0, 6.28, 2)
        self.zoom = rng.uniform(-zoom, zoom)

    def scale(self, time: Field) -> Field:
        """World units per output pixel."""
        return np.exp(self.zoom * time)

    def __call__(self, time: Field, x: Field, y: Field) -> tuple[Field, Field]:
        angle, scale = self.angle + self.turn * time, self.scale(time)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        dx, dy = (self.drift[i] * time + self.sway[i] * np.sin(self.rate * time + self.phase[i]) for i in (0, 1))
        return (cos * x - sin * y + dx).astype(np.float32), (sin * x + cos * y + dy).astype(np.float32)


def _paint(image: Field, cover: Field, texture: Pattern, u: Field, v: Field, pixel: Field) -> None:
    """Blends a CTHW texture over the image, in place, inside the box that the cover touches."""
    rows, columns = np.any(cover > 0, axis=(0, 2)), np.any(cover > 0, axis=(0, 1))
    if not rows.any():
        return
    top, bottom = np.flatnonzero(rows)[[0, -1]]
    left, right = np.flatnonzero(columns)[[0, -1]]
    box = np.s_[:, top : bottom + 1, left : right + 1]
    inside = (slice(None), *box)
    image[inside] += cover[box] * (texture(u[box], v[box], pixel) - image[inside])


def _backdrop(rng: np.random.Generator, u: Field, v: Field, pixel: Field) -> Field:
    """CTHW: two colours mixed by slow noise, a little fine noise on top, and sometimes a full-frame texture."""
    first, second = _colour(rng), _colour(rng)
    mix = _smooth_noise(rng, u, v, float(rng.uniform(24, 80)))
    fine = _smooth_noise(rng, u, v, float(rng.uniform(3, 7))) - 0.5
    image = first + (second - first) * mix + fine * np.float32(rng.uniform(0.02, 0.16))
    if rng.random() < 0.7:
        image += np.float32(rng.uniform(0.2, 0.6)) * (_texture(rng)(u, v, pixel) - image)
    return image.astype(np.float32)


def _texture(rng: np.random.Generator) -> Pattern:
    """A function (u, v, pixel) → CTHW: two shaded colours and a pattern that chooses between them."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng)
    low, high = _colour(rng), _colour(rng)
    if abs(float((low - high).mean())) < 0.2:
        high = np.clip(high + np.float32(0.35) * np.sign(np.float32(0.5) - low), 0, 1)
    slope = rng.uniform(-0.003, 0.003, 2).astype(np.float32)

    def texture(u: Field, v: Field, pixel: Field) -> Field:
        shade = np.clip(slope[0] * u + slope[1] * v, -0.25, 0.25)
        return low + (high - low) * pattern(u, v, pixel) + shade

    return texture


def _colour(rng: np.random.Generator) -> Field:
    """[3, 1, 1, 1], not very saturated, as in photographs."""
    colour = np.clip(rng.uniform(0.08, 0.92) + rng.normal(0, 0.09, 3), 0.02, 0.98)
    return colour.astype(np.float32).reshape(3, 1, 1, 1)


def _edge(distance: Field, pixel: Field) -> Field:
    """Coverage of a pixel by the half plane distance < 0 (distance in world units)."""
    return np.clip(np.float32(0.5) - distance / pixel, 0, 1)


def _wave(u: Field, period: float, duty: float, pixel: Field) -> Field:
    cycle = u / np.float32(period)
    offset = np.abs(cycle - np.floor(cycle) - np.float32(0.5)) - np.float32(duty / 2)
    return _edge(offset * np.float32(period), pixel)


def _lattice(grid: Field, u: Field, v: Field, cell: float, smooth: bool) -> Field:
    """Bilinear (or smoothstep) interpolation of a wrapped lattice of values, one per `cell` world units."""
    x, y = u / np.float32(cell), v / np.float32(cell)
    column, row = np.floor(x), np.floor(y)
    x, y = x - column, y - row
    if smooth:
        x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    rows, columns = grid.shape
    row, column = row.astype(np.int64), column.astype(np.int64)
    top, bottom, left, right = row % rows, (row + 1) % rows, column % columns, (column + 1) % columns
    upper = grid[top, left] * (1 - x) + grid[top, right] * x
    lower = grid[bottom, left] * (1 - x) + grid[bottom, right] * x
    return upper + (lower - upper) * y


def _smooth_noise(rng: np.random.Generator, u: Field, v: Field, cell: float) -> Field:
    return _lattice(rng.random((_LATTICE, _LATTICE), dtype=np.float32), u, v, cell, smooth=True)


def _plain(rng: np.random.Generator) -> Pattern:
    return lambda u, v, pixel: np.zeros_like(u)


def _stripes(rng: np.random.Generator) -> Pattern:
    period, duty = float(rng.uniform(7, 28)), float(rng.uniform(0.3, 0.7))
    return lambda u, v, pixel: _wave(u, period, duty, pixel)


def _checker(rng: np.random.Generator) -> Pattern:
    first, second = float(rng.uniform(10, 36)), float(rng.uniform(10, 36))

    def pattern(u: Field, v: Field, pixel: Field) -> Field:
        a, b = _wave(u, first, 0.5, pixel), _wave(v, second, 0.5, pixel)
        return a + b - 2 * a * b

    return pattern


def _rings(rng: np.random.Generator) -> Pattern:
    period, duty = float(rng.uniform(9, 30)), float(rng.uniform(0.3, 0.7))
    return lambda u, v, pixel: _wave(np.hypot(u, v), period, duty, pixel)


def _waves(rng: np.random.Generator) -> Pattern:
    period, bend, length = float(rng.uniform(8, 24)), float(rng.uniform(0, 8)), float(rng.uniform(20, 60))

    def pattern(u: Field, v: Field, pixel: Field) -> Field:
        phase = (u + np.float32(bend) * np.sin(v / np.float32(length))) * np.float32(2 * np.pi / period)
        return np.float32(0.5) + np.float32(0.5) * np.sin(phase)

    return pattern


def _bits(grid: Field, cell: float) -> Pattern:
    """A binary lattice drawn with sharp, rounded contours."""

    def pattern(u: Field, v: Field, pixel: Field) -> Field:
        return _edge((np.float32(0.5) - _lattice(grid, u, v, cell, smooth=False)) * np.float32(cell), pixel)

    return pattern


def _mosaic(rng: np.random.Generator) -> Pattern:
    grid = (rng.random((_LATTICE, _LATTICE)) < rng.uniform(0.3, 0.6)).astype(np.float32)
    return _bits(grid, float(rng.uniform(3.5, 12)))


def _blobs(rng: np.random.Generator) -> Pattern:
    cell = float(rng.uniform(6, 18))
    grid = rng.random((_LATTICE, _LATTICE), dtype=np.float32)

    def pattern(u: Field, v: Field, pixel: Field) -> Field:
        distance = np.float32(0.5) - _lattice(grid, u, v, cell, smooth=True)
        return _edge(distance * np.float32(cell * 1.6), pixel)

    return pattern


def _glyphs(rng: np.random.Generator) -> Pattern:
    """Lines of words in an invented alphabet of strokes on a 5 × 7 grid."""
    alphabet = np.zeros((_ALPHABET + 1, _GLYPH_ROWS + 3, _GLYPH_COLUMNS + 1), dtype=np.float32)
    for glyph in alphabet[1:]:
        for stroke in rng.choice(8, size=int(rng.integers(2, 5)), replace=False):
            row, column = np.arange(_GLYPH_ROWS), np.arange(_GLYPH_COLUMNS)
            if stroke < 3:
                glyph[row, (0, 2, 4)[stroke]] = 1
            elif stroke < 6:
                glyph[(0, 3, 6)[stroke - 3], column] = 1
            else:
                glyph[row, (row * 4 // 6) if stroke == 6 else (4 - row * 4 // 6)] = 1
    text = rng.integers(1, _ALPHABET + 1, (16, 24))
    text[rng.random(text.shape) < 0.18] = 0
    page = alphabet[text].transpose(0, 2, 1, 3).reshape(16 * (_GLYPH_ROWS + 3), 24 * (_GLYPH_COLUMNS + 1))
    return _bits(page, float(rng.uniform(1.8, 4.5)))


# Glyphs twice: their thin strokes are what is hardest to restore. The order is part of every seed's clip.
_PATTERNS = (_plain, _stripes, _checker, _rings, _glyphs, _glyphs, _blobs, _waves, _mosaic)


def _region(rng: np.random.Generator, u: Field, v: Field, pixel: Field, width: int, height: int) -> Field:
    """Coverage of a half plane or a band through the scene."""
    angle = rng.uniform(0, 2 * np.pi)
    across = u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))
    across = across - np.float32(rng.uniform(-0.35, 0.35) * min(width, height))
    if rng.random() < 0.5:
        return _edge(across, pixel)
    return _edge(np.abs(across) - np.float32(rng.uniform(0.05, 0.25) * min(width, height)), pixel)


def _shape(rng: np.random.Generator) -> Pattern:
    """Coverage of a disc, a ring, a rounded box, a line or a star, around the origin."""
    kind, size = int(rng.integers(5)), np.float32(rng.uniform(8, 40))
    ratio, corner = np.float32(rng.uniform(0.3, 1.0)), np.float32(rng.uniform(0, 5))
    width, points = np.float32(rng.uniform(1.0, 6.0)), int(rng.integers(3, 8))
    if kind == 0:
        return lambda u, v, pixel: _edge(np.hypot(u, v) - size, pixel)
    if kind == 1:
        return lambda u, v, pixel: _edge(np.abs(np.hypot(u, v) - size) - width, pixel)
    if kind == 2:

        def box(u: Field, v: Field, pixel: Field) -> Field:
            dx, dy = np.abs(u) - size + corner, np.abs(v) - size * ratio + corner
            outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
            return _edge(outside + np.minimum(np.maximum(dx, dy), 0) - corner, pixel)

        return box
    if kind == 3:
        return lambda u, v, pixel: _edge(np.hypot(np.maximum(np.abs(u) - 2 * size, 0), v) - width / 2, pixel)
    return lambda u, v, pixel: _edge(
        np.hypot(u, v) - size * (np.float32(0.75) + np.float32(0.25) * np.cos(points * np.arctan2(v, u))), pixel
    )
