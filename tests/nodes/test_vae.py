"""The tiled VAE nodes on the double of ComfyUI and in each real one, with tiny VAEs of the kinds of Wan 2.1 and SD."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import scenario

SUBJECT = "vae"
KINDS, METHODS = ["wan", "sd"], ["encode", "decode"]
SHAPES = {
    "wan": {"encode": [1, 16, 2, 12, 17], "decode": [5, 96, 136, 3]},
    "sd": {"encode": [2, 4, 12, 17], "decode": [1, 96, 136, 3]},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_gives_the_result_of_the_whole_frame(observed, kind, method):
    seen = scenario(observed, f"vae whole {kind}")[f"{method} auto"]
    assert seen["mode"] == "exact", seen["why"]
    assert seen["shape"] == SHAPES[kind][method] and seen["tiles"] > 5
    assert seen["error"] < 1e-4 and seen["attempts"] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_blended_tiles_have_the_shape_and_are_not_far_off(observed, kind, method):
    seen = scenario(observed, f"vae whole {kind}")[f"{method} blend"]
    assert (seen["mode"], seen["why"]) == ("blend", "chosen")
    assert seen["shape"] == SHAPES[kind][method] and 1e-3 < seen["error"] < 0.5


@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_runs_out_of_memory_costs_a_smaller_tile_and_no_precision(observed, kind, at):
    seen = scenario(observed, f"vae out of memory {kind}")[at]
    assert seen["tried"] == ["tile 64"] and seen["apart"] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_fits_the_error_holds_the_table_of_what_was_tried(observed, kind):
    said = scenario(observed, f"vae out of memory {kind}")["all"]
    assert "VAE Decode (Tiled, Verified): the device is out of memory, and nothing is left to try (planted)" in said
    assert "96" in said and "tile 64" in said and "allow_cpu" in said


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_go_to_the_device_once_other_models_have_left_it(observed, kind):
    seen = scenario(observed, f"vae weights do not fit {kind}")["beside"]
    assert seen["tried"] == ["unload others"] and seen["mode"] == "exact" and seen["apart"] < 1e-4


@pytest.mark.parametrize("case", ["auto", "exact", "stopped"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_at_all_end_in_the_table(observed, kind, case):
    said = scenario(observed, f"vae weights do not fit {kind}")[case]
    assert "VAE Decode (Tiled, Verified): the device is out of memory, and nothing is left to try (expected " in said
    assert "MiB for the weights; got" in said and "tiles done" in said and "other models" in said


REFUSED = {
    "channels": ("expected latents of 4 channels", "got 16"), "no weights": ("expected a VAE with weights", "got an"),
    "empty batch": ("expected at least 1 image", "got shape (0"), "grey": ("expected images of 3 channels", "got 1"),
    "too small": ("expected images of at least 8×8", "got 64×7"),
    "video in image VAE": ("expected images BHWC", "got a video of shape"),
    "negative overlap": ("expected overlap of at least 0", "got -8"),
    "small tile": ("expected a tile_size of 0 or at least 64", "got 32"),
    "mode": ("expected mode of auto, exact, blend", "got 'fast'"), "nan": ("expected finite numbers", "got NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_in_words(observed, case):
    said = scenario(observed, "vae refused")[case]
    assert said.startswith("ValueError: VAE ") and all(words in said for words in REFUSED[case]), said


def test_the_page_is_told_of_the_memory_by_the_node_s_id(observed):
    seen = scenario(observed, "vae told")
    assert seen == {"nodes": ["7"], "memory": ["advice", "budget", "measured", "predicted"]}


def test_an_object_without_a_network_is_asked_as_a_whole(observed):
    seen = scenario(observed, "vae delegated")
    assert (seen["shape"], seen["mode"]) == ([1, 8, 8, 3], "whole")
    assert "expected a VAE with an exact path for mode exact" in seen["exact"]


def comparable(seen: Any) -> Any:
    """Without what depends on the weights of a network, and on the memory of the machine at that moment."""
    if isinstance(seen, dict):
        return {name: comparable(item) for name, item in seen.items() if name not in ("error", "apart", "all")}
    if isinstance(seen, str):
        return re.sub(r"[\d.]+ [GMK]iB", "…", seen)
    return seen


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(observe, comfyui_path: Path):
    assert comparable(observe(None)) == comparable(observe(comfyui_path))
