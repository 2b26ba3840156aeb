"""Tiles cover everything, and their weights add up to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steadyvsr.models.tiling import axis_spans, axis_weights, blend_weights, even_spans, feather, grid_tiles, ramp


@given(st.integers(1, 400), st.integers(2, 128), st.data())
def test_spans_cover_the_axis_and_overlap_as_asked(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    spans = axis_spans(length, tile, overlap)
    assert spans[0].start == 0 and spans[-1].stop == length
    for left, right in zip(spans, spans[1:], strict=False):
        assert left.start < right.start and left.stop < right.stop
        assert left.stop - right.start == left.after == right.before >= overlap
    assert spans[0].before == spans[-1].after == 0


@given(st.integers(1, 90), st.integers(1, 90), st.integers(4, 40), st.data())
def test_weights_add_up_to_one_everywhere(height: int, width: int, tile: int, data: st.DataObject) -> None:
    tiles = grid_tiles(height, width, tile, data.draw(st.integers(0, tile - 1)))
    total = torch.zeros(height, width)
    for item, weight in zip(tiles, blend_weights(tiles, height, width), strict=True):
        assert (weight > 0).all()
        total[item.rows.start : item.rows.stop, item.columns.start : item.columns.stop] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


def test_ramps_are_on_inner_edges_only() -> None:
    first, second = axis_spans(12, 8, 3)
    assert ramp(first).tolist() == pytest.approx([1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert ramp(second).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_an_overlap_as_wide_as_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        axis_spans(10, 4, 4)


def test_feathers_discard_the_outer_quarter_and_rise_over_the_middle_half() -> None:
    first, second = axis_spans(24, 16, 8)
    rising = [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1]
    assert feather(second).tolist() == pytest.approx([*rising, *[1] * 8])
    assert feather(first).tolist() == pytest.approx([*[1] * 8, *rising[::-1]])


@given(st.integers(1, 120), st.integers(2, 40), st.integers(1, 8), st.data())
def test_axis_weights_add_up_to_one_at_every_scale(length: int, tile: int, factor: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    spans = [span.scaled(factor) for span in even_spans(length, tile, overlap)]
    total = torch.zeros(length * factor)
    for span, weight in zip(spans, axis_weights(spans), strict=True):
        assert (weight >= 0).all()
        total[span.start : span.stop] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


@given(st.integers(1, 400), st.integers(2, 64), st.integers(0, 32))
def test_tiles_are_of_one_size_and_the_last_is_no_sliver(length: int, tile: int, overlap: int) -> None:
    spans = even_spans(length, tile, min(overlap, tile // 2))
    assert {span.stop - span.start for span in spans} == {min(tile, length)}
    assert all(span.scaled(8).start % 8 == 0 for span in spans)


@given(st.integers(1, 400), st.integers(2, 128), st.data())
def test_evenly_spread_tiles_are_as_many_and_overlap_as_asked_or_more(
    length: int, tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    spans = even_spans(length, tile, overlap)
    assert len(spans) == len(axis_spans(length, tile, overlap))
    assert spans[0].start == 0 and spans[-1].stop == length and spans[0].before == spans[-1].after == 0
    shared = [left.after for left in spans[:-1]]
    assert shared == [right.before for right in spans[1:]]
    assert all(overlap <= amount for amount in shared) and max(shared, default=0) - min(shared, default=0) <= 1
