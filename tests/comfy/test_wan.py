"""ComfyUI's Wan 2.1 VAE in exact tiles: against its own encode and decode of the whole frame, in a real ComfyUI."""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("wan_session.py",)


@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-10), ("fp32", 1e-4)])
def test_tiles_give_what_the_whole_frame_gives(observed, dtype, limit):
    clips = scenario(observed, "clips")[dtype]
    assert {clip["latents"] for clip in clips} == set(range(1, 14))
    assert sum(clip["units"] > 5 for clip in clips) >= 8  # many tiles, not one that holds the frame
    assert max(clip["decode"] for clip in clips) <= limit and max(clip["encode"] for clip in clips) <= limit


@pytest.mark.parametrize("name", ["stride", "norm", "levels", "class", "numbers"])
def test_a_network_that_computes_something_else_is_refused_with_the_reason(observed, name):
    seen = scenario(observed, "others")[name]
    assert seen["taken"] is False
    words = {"stride": "upsamples.0.residual.2", "norm": "encoder.middle.0.residual.0", "levels": "time_conv",
             "class": "Linear is not", "numbers": "decoding a trial clip differs by 9.9e-03"}  # fmt: skip
    assert words[name] in seen["why"]


def test_a_network_is_tried_once_and_its_weights_are_looked_up_at_each_use(observed):
    seen = scenario(observed, "once")
    assert seen["second"] and seen["trials"] == 1 and seen["changed"] and seen["same"] < 1e-4


def test_half_precision_is_as_near_to_the_truth_as_comfyuis_own(observed):
    seen = scenario(observed, "half")
    assert 1e-4 < seen["ours"] <= 1.05 * seen["theirs"]


def test_a_card_that_rounds_convolutions_to_tf32_is_allowed_what_that_costs(observed):
    seen = observed["tf32"]
    assert 20 * seen["fp32"] < seen["tf32"], "rounded, it was further apart"
    assert 5 * seen["tf32"] < seen["cuda"] and seen["cpu"] <= 1e-3
