"""The seven phases of a Wan workflow with our VAE nodes in a real ComfyUI: one model at a time, to a video file.

The run is observed by tiled_phases_session.py, which runs in ComfyUI's own process on a simulated card.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.comfy.phases_workflow import FRAMES, HEIGHT, PHASES, WIDTH

pytestmark = pytest.mark.comfy

SESSIONS = ("tiled_phases_session.py",)
WAN, TEXT, VAE = "WAN21", "WanTEModel", "WanVAE"
NEEDED = dict(zip(PHASES, (WAN, WAN, TEXT, WAN, VAE, WAN, VAE), strict=True))


def test_the_workflow_ends_with_a_video_of_all_frames_and_the_right_size(observed):
    assert (observed["error"], observed["failed"]) == (None, None)
    assert observed["videos"] == [{"frames": FRAMES, "size": [2 * WIDTH, HEIGHT + HEIGHT // 2]}]


def test_in_each_phase_its_model_and_no_other_was_resident_and_none_after_it(observed):
    assert [phase["phase"] for phase in observed["phases"]] == list(PHASES)
    for phase in observed["phases"]:
        needed = NEEDED[phase["phase"]]
        assert phase["loads"] and all(load.keys() == {needed} for load in phase["loads"])
        assert phase["before"].keys() == {needed} and phase["after"] == {}
    assert observed["resident_at_end"] == {}


def test_both_nodes_computed_exact_tiles(observed):
    encode, decode = observed["reports"]
    for report in (encode, decode):
        assert report["mode"] == "exact" and report["units"] == 5  # four tiles, and the stages of the whole frame
        assert report["memory"]["weights_bytes"] > 3_000_000 and report["attempts"] == []
