"""Frames and sizes: what goes in comes out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyvsr.models.flashvsr import frame_plan, output_size, padded_size
from steadyvsr.models.flashvsr.plan import step_inputs, step_latents, step_outputs


@given(st.integers(1, 20_000))
def test_the_plan_is_the_rule_of_the_spec(frames: int) -> None:
    plan = frame_plan(frames)
    assert plan.padded_frames == max(25, 8 * -(-(frames + 3) // 8) + 1)
    assert plan.steps == (plan.padded_frames - 1) // 8 - 2
    assert plan.latent_frames == (plan.padded_frames - 1) // 4
    assert plan.padded_frames - 4 >= frames


@given(st.integers(0, 3000))
def test_steps_follow_each_other_without_gap_or_overlap(step: int) -> None:
    for ranges in (step_inputs, step_latents, step_outputs):
        assert ranges(step)[1] == ranges(step + 1)[0]
        assert ranges(0)[0] == 0
    (first, last), (out_first, out_last) = step_latents(step), step_outputs(step)
    assert (out_first, out_last) == (max(0, 4 * first - 3), 4 * last - 3)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 2.25, 3.0, 4.0, 7.9, 8.0])
def test_sizes_are_pythons_round_and_fit_the_padding(scale: float) -> None:
    for width, height in itertools.product((16, 51, 85, 127, 128, 129, 640, 1919), repeat=2):
        size = output_size(width, height, scale)
        assert size == (round(width * scale), round(height * scale))
        for side, padded in zip(size, padded_size(*size), strict=True):
            assert padded % 128 == 0 and 0 <= padded - side < 128


@pytest.mark.parametrize(("size", "scale"), [((15, 64), 2.0), ((64, 15), 2.0), ((64, 64), 0.0), ((64, 64), 8.01)])
def test_sizes_and_scales_out_of_range_are_refused(size: tuple[int, int], scale: float) -> None:
    with pytest.raises(ValueError, match="output_size: expected"):
        output_size(*size, scale)


def test_an_empty_clip_has_no_plan() -> None:
    with pytest.raises(ValueError, match="at least 1 frame"):
        frame_plan(0)
