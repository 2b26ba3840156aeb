"""Overlapping tiles and their weights. Plain integers, in whatever unit the caller counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """One tile on one axis.

    Attributes:
        start, stop: the positions that the tile covers; `stop` is exclusive.
        before, after: how many of them the neighbours also cover; 0 at the border of the image.
    """

    start: int
    stop: int
    before: int
    after: int

    def scaled(self, factor: int) -> Span:
        """The same stretch in units that are `factor` times as small."""
        return Span(*(factor * value for value in self))

    def shifted(self, by: int) -> Span:
        return self._replace(start=self.start + by, stop=self.stop + by)


class Tile(NamedTuple):
    rows: Span
    columns: Span

    def scaled(self, rows: int, columns: int | None = None) -> Tile:
        """The same tile in units that are smaller by these factors (`columns`: default `rows`)."""
        return Tile(self.rows.scaled(rows), self.columns.scaled(rows if columns is None else columns))

    def of(self, x: Tensor) -> Tensor:
        """This part of x (…HW), which holds the whole plane; a view."""
        return x[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def __str__(self) -> str:
        return f"rows {self.rows.start}–{self.rows.stop}, columns {self.columns.start}–{self.columns.stop}"


def axis_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Covers 0 … length with tiles of one size that overlap by at least `overlap`; the last one ends at the border.

        axis_spans(10, tile=6, overlap=2)  # [Span(0, 6, 0, 2), Span(4, 10, 2, 0)]

    Raises:
        ValueError: the overlap leaves the tiles no room to advance.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"axis_spans: expected an overlap from 0 to below the tile size {tile}; got {overlap}.")
    if tile >= length:
        return [Span(0, length, 0, 0)]
    count = -(-(length - overlap) // (tile - overlap))
    return _at([min(i * (tile - overlap), length - tile) for i in range(count)], tile)


def even_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """As many tiles as `axis_spans`, with the overlap spread evenly among them; raises like it."""
    count = len(axis_spans(length, tile, overlap))
    if count == 1:
        return [Span(0, length, 0, 0)]
    return _at([i * (length - tile) // (count - 1) for i in range(count)], tile)


def grid_tiles(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Tiles over a plane, row by row; see `axis_spans`."""
    columns = axis_spans(width, tile, overlap)
    return [Tile(row, column) for row in axis_spans(height, tile, overlap) for column in columns]


def ramp(span: Span) -> Tensor:
    """fp32 weights of one span: (k+1)/(n+1) at position k of an inner overlap of n, 1 elsewhere and at the border."""
    return _edged(span, _rise)


def feather(span: Span) -> Tensor:
    """fp32 weights of one span of a network's result: as `ramp`, but rising in the middle half of an overlap only.

    The outer quarter weighs nothing: the network saw its own padding there instead of the surroundings.
    """
    return _edged(span, _late_rise)


def axis_weights(spans: list[Span]) -> list[Tensor]:
    """The feathers of all spans of an axis, scaled to add up to 1 everywhere."""
    weights = [feather(span) for span in spans]
    total = torch.zeros(spans[-1].stop)
    for span, weight in zip(spans, weights, strict=True):
        total[span.start : span.stop] += weight
    return [weight / total[span.start : span.stop] for span, weight in zip(spans, weights, strict=True)]


def blend_weights(tiles: list[Tile], height: int, width: int) -> list[Tensor]:
    """The fp32 weights of each tile, rows × columns; over all tiles they add up to 1 everywhere."""
    ramps = [ramp(tile.rows)[:, None] * ramp(tile.columns) for tile in tiles]
    total = torch.zeros(height, width)
    for tile, weight in zip(tiles, ramps, strict=True):
        tile.of(total).add_(weight)
    return [weight / tile.of(total) for tile, weight in zip(tiles, ramps, strict=True)]


def _at(starts: list[int], tile: int) -> list[Span]:
    spans = []
    for i, start in enumerate(starts):
        before = starts[i - 1] + tile - start if i else 0
        after = start + tile - starts[i + 1] if i + 1 < len(starts) else 0
        spans.append(Span(start, start + tile, before, after))
    return spans


def _edged(span: Span, rise: Callable[[int], Tensor]) -> Tensor:
    weight = torch.ones(span.stop - span.start)
    weight[: span.before] = rise(span.before)
    inner_end = len(weight) - span.after
    weight[inner_end:] = torch.minimum(weight[inner_end:], rise(span.after).flip(0))
    return weight


def _rise(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float32) / (count + 1)


def _late_rise(count: int) -> Tensor:
    quarter = count // 4
    return torch.cat([torch.zeros(quarter), _rise(count - 2 * quarter), torch.ones(quarter)])
