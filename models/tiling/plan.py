"""Where tiles lie, and their weights. Plain integers; one unit is whatever the caller counts in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """One tile on one axis.

    Attributes:
        start, stop: what the tile covers.
        before, after: how much of it the neighbours cover too; 0 at the border of the image.
    """

    start: int
    stop: int
    before: int
    after: int

    def scaled(self, factor: int) -> Span:
        """The same stretch, counted in units that are `factor` times as small."""
        return Span(*(factor * value for value in self))


class Tile(NamedTuple):
    rows: Span
    columns: Span


def axis_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Covers 0 … length with tiles of one size that overlap by at least `overlap`; the last one ends at the border.

    Raises:
        ValueError: the overlap leaves a tile no room to advance.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"axis_spans: expected an overlap from 0 to below the tile size {tile}; got {overlap}.")
    if tile >= length:
        return [Span(0, length, 0, 0)]
    count = -(-(length - overlap) // (tile - overlap))
    return _at([min(i * (tile - overlap), length - tile) for i in range(count)], tile)


def even_spans(length: int, tile: int, overlap: int) -> list[Span]:
    """As `axis_spans`, with as many tiles, but what they overlap by is spread evenly over all of them.

    Raises:
        ValueError: the overlap leaves a tile no room to advance.
    """
    count = len(axis_spans(length, tile, overlap))
    if count == 1:
        return [Span(0, length, 0, 0)]
    return _at([i * (length - tile) // (count - 1) for i in range(count)], tile)


def grid_tiles(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Tiles over a plane, row by row; see `axis_spans`."""
    columns = axis_spans(width, tile, overlap)
    return [Tile(row, column) for row in axis_spans(height, tile, overlap) for column in columns]


def ramp(span: Span) -> Tensor:
    """fp32 weights of one span: rising (k+1)/(n+1) over an inner overlap of n, 1 elsewhere and at the border."""
    return _edged(span, _rise)


def feather(span: Span) -> Tensor:
    """fp32 weights of one span of a network's result: as `ramp`, but within the middle half of an overlap.

    The outer quarter weighs nothing: there the network saw its own padding in place of the neighbourhood.
    """
    return _edged(span, _late_rise)


def axis_weights(spans: list[Span]) -> list[Tensor]:
    """The feathers of all spans of one axis, scaled so that they add up to 1 everywhere."""
    weights = [feather(span) for span in spans]
    total = torch.zeros(spans[-1].stop)
    for span, weight in zip(spans, weights, strict=True):
        total[span.start : span.stop] += weight
    return [weight / total[span.start : span.stop] for span, weight in zip(spans, weights, strict=True)]


def blend_weights(tiles: list[Tile], height: int, width: int) -> list[Tensor]:
    """For each tile its fp32 weights, rows × columns; over all tiles they add up to 1 everywhere."""
    ramps = [ramp(tile.rows)[:, None] * ramp(tile.columns) for tile in tiles]
    total = torch.zeros(height, width)
    for tile, weight in zip(tiles, ramps, strict=True):
        total[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] += weight
    return [
        weight / total[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
        for tile, weight in zip(tiles, ramps, strict=True)
    ]


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
