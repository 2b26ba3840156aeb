"""The tiled VAE nodes in a real ComfyUI: what they give beside whole frames, what they try, what they refuse and say.

See test_flashvsr.py for COMFYUI_PATH and COMFYUI_PYTHON; the states are observed by vae_session.py
and vae_memory_session.py.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("vae_session.py", "vae_memory_session.py")
KINDS = ["wan", "sd", "flux"]
METHODS = ["encode", "decode"]
MIB = 1 << 20
NODE = {"encode": "VAE Encode (Tiled, Verified)", "decode": "VAE Decode (Tiled, Verified)"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_gives_the_result_of_the_whole_frame(observed, kind, method):
    seen = scenario(observed, f"whole {kind}")[f"{method} auto"]
    assert seen["report"]["mode"] == "exact", seen["report"]["mode_reason"]
    assert seen["error"] < 1e-4 and seen["psnr"] > 100
    assert seen["psnr"] > seen["stock_psnr"] + 80


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["auto", "blend"])
def test_shape_and_dtype_are_those_of_the_stock_nodes(observed, kind, method, mode):
    seen = scenario(observed, f"whole {kind}")[f"{method} {mode}"]
    assert seen["shape"] == seen["stock_shape"] and seen["dtype"]


@pytest.mark.parametrize("method", METHODS)
def test_blended_tiles_of_a_video_are_nearer_to_the_whole_frame_than_the_stock_nodes(observed, method):
    seen = scenario(observed, "whole wan")[f"{method} blend"]
    assert seen["report"]["mode"] == "blend" and seen["report"]["mode_reason"] == "chosen"
    assert seen["psnr"] > seen["stock_psnr"] + 1
    assert seen["report"]["spot_db"] > 10


def test_any_size_tile_and_overlap_gives_the_right_shape_or_a_documented_error(observed):
    seen = scenario(observed, "random")
    assert seen["cases"] >= 2000 and seen["wrong"] == []
    assert set(seen["refused"]) == {
        "a tile_size of 0 or at least 64", "overlap of at least 0", "images of at least 8×8 for this VAE",
    }  # fmt: skip
    assert 100 < sum(seen["refused"].values()) < 1000 and seen["clamped"] > 200 and seen["tiled"] > 300


def test_no_call_of_a_network_sees_more_than_a_tile(observed):
    seen = scenario(observed, "random")
    assert seen["seen_too_much"] == [] and seen["calls"] > 2000


@pytest.mark.parametrize("kind", KINDS)
def test_random_sizes_are_exact(observed, kind):
    seen = scenario(observed, f"random {kind}")
    assert seen["cases"] >= 20 and seen["worst"] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_at_any_tile_costs_that_tile_alone(observed, kind):
    seen = scenario(observed, f"oom {kind}")["at"]
    assert {item["mode"] for item in seen} == {"auto", "blend"}
    for item in seen:
        assert item["failed"] == 1 and item["tries"] == item["units"] + 1
        assert item["error"] == 0.0
        assert [(a["unit"], a["tried"]) for a in item["attempts"]] == [(item["at"], "unload others")]


@pytest.mark.parametrize("mode", ["auto", "blend"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rungs_are_taken_in_order_and_the_result_stays(observed, kind, mode):
    seen = scenario(observed, f"oom {kind}")
    small = seen[f"{mode} tile"]
    assert small["rungs"] == ["unload others", "tile 96", "tile 64"] and small["tile"] == 64
    assert small["error"] < 1e-5 and small["dtype"] == "float32"
    half = seen[f"{mode} dtype"]
    assert half["rungs"] == [*small["rungs"], "weights and tiles in bfloat16"] and half["dtype"] == "bfloat16"
    assert 0 < half["error"] < 0.05
    assert all(a["device"] == "cpu" and a["unit"] == 0 and a["free"] > 0 for a in half["attempts"])


@pytest.mark.parametrize("mode", ["auto", "blend"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_fits_the_error_holds_the_table_and_nothing_is_held(observed, kind, mode):
    seen = scenario(observed, f"oom {kind}")
    lines = seen[f"{mode} nothing"]["error"].splitlines()
    assert lines[0].startswith(f"OutOfMemoryError: {NODE['decode']}: the device is out of memory")
    assert [line.split("  ")[-1].strip() or line.split()[-1] for line in lines[1:-1]][-1] == "error"
    for rung in ("unload others", "tile 96", "tile 64", "weights and tiles in bfloat16"):
        assert any(line.rstrip().endswith(rung) for line in lines)
    assert abs(seen[f"{mode} held"]) < 64 << 10


def test_the_whole_ladder_in_order(observed):
    seen = scenario(observed, "ladder")
    tiles = [f"tile {side}" for side in (192, 128, 96, 64)]
    assert seen["rungs"] == ["unload others", *tiles, "weights and tiles in bfloat16", "the CPU", ""]
    assert seen["prepared"] == [["meta", "torch.bfloat16"], ["cpu", "torch.float32"]]
    assert seen["words"].count("\n") == len(seen["rungs"]) + 2
    assert seen["no_cpu"] == seen["rungs"][:-2] + [""] and "allow_cpu" in seen["no_cpu_words"]
    assert seen["stopped_rungs"] == [""] and "on_oom shrink" in seen["stopped"]
    assert seen["sides"] == {"64": [], "96": [64], "256": [192, 128, 96, 64], "512": [384, 256, 192, 128, 96, 64]}
    assert seen["small_image"] == [96, 64]


def test_an_error_that_is_no_lack_of_memory_passes(observed):
    seen = scenario(observed, "ladder")
    assert seen["other"] == "RuntimeError: shape" and seen["other_rungs"] == []


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_a_tile_with_nan_is_named_and_computed_again_in_fp32(observed, kind):
    seen = scenario(observed, f"nan {kind}")
    assert seen["dtypes"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32", "torch.bfloat16"]
    (note,) = seen["notes"]
    assert note.startswith("Computed again in float32") and "columns 48–112, in bfloat16" in note
    assert seen["finite"] and 0 < seen["error"] < 0.05
    assert seen["weights_after"] == ["torch.bfloat16"]


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_nan_in_fp32_too_is_an_error_that_names_tile_and_dtype(observed, kind):
    words = scenario(observed, f"nan {kind}")["words"]
    assert words.startswith(f"ValueError: {NODE['decode']}: tiles: expected finite numbers")
    assert "rows 0–64, columns 0–64, in float32" in words


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("channels", "expected latents of 4 channels for this VAE; got 16"),
        ("channels wan", "expected latents of 16 channels for this VAE; got 4"),
        ("audio", "expected a VAE for images or video; got AutoencoderKL"),
        ("audio_2", "expected a VAE for images or video; got AutoencoderKL"),
        ("no weights", "expected a VAE with weights; got an empty one"),
        ("empty batch", "expected at least 1 image, BHWC or BTHWC; got shape (0, 64, 64, 3)"),
        ("empty latents", "expected at least 1 latent, NCHW or NCTHW; got shape (0, 4, 8, 8)"),
        ("empty foreign", "expected at least 1 image or latent; got shape (0, 4, 8, 8)"),
        ("grey", "expected images of 3 channels; got 1"),
        ("too small", "expected images of at least 8×8 for this VAE; got 64×7"),
        ("video in image VAE", "expected images BHWC for an image VAE; got a video"),
        ("negative overlap", "expected overlap of at least 0; got -8"),
        ("negative budget", "expected memory_budget_gb of at least 0; got -1.0"),
        ("small tile", "expected a tile_size of 0 or at least 64; got 32"),
        ("mode", "expected mode of auto, exact, blend; got 'fast'"),
        ("exact", "expected a VAE with an exact path for mode exact; got one without: TAESD is neither"),
        ("exact owned", "expected a VAE with an exact path for mode exact; got one that tiles by itself"),
        ("nan pixels", "The values that go into it are not finite already"),
    ],
)
def test_bad_input_is_a_clear_error(observed, case, words):
    message = scenario(observed, "bad")[case]
    assert message.startswith("ValueError: VAE ") and words in message


def test_vaes_that_cannot_be_computed_here_are_asked_as_they_offer_it(observed):
    seen = scenario(observed, "bad")
    shape, report = seen["foreign"]
    assert shape == [1, 8, 8, 3] and report["mode"] == "whole" and "called as a whole" in report["notes"][0]
    arguments, report = seen["owned"]
    assert arguments == {"tile_x": 8, "tile_y": 8, "overlap": 4}
    assert report["mode"] == "its own tiling" and report["notes"] == ["overlap 400 was lowered to 32."]
    assert report["verified"] is False and report["verified_reason"].startswith("not measured")


def test_what_is_changed_in_the_input_is_said(observed):
    seen = scenario(observed, "bad")
    assert seen["clamped"] == [32, ["overlap 60 was lowered to 32, half of a tile."]]
    assert seen["large tile"] == [512, ["tile_size 1024 was lowered to 512, the largest."]]
    assert seen["nested"] == ["Of several latents in one the first was decoded."]
    assert seen["still"] == [[1, 96, 136, 3], ["The image latents were decoded as clips of one frame."]]
    assert seen["flat"] == [[1, 96, 136, 3], []]
    sizes = scenario(observed, "sizes")
    for frames, latents, used in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (5, 2, 5), (7, 2, 5), (10, 3, 9)):
        shape, counted, notes = sizes[f"frames {frames}"]
        assert (shape, counted) == ([1, 16, latents, 4, 4], used)
        assert [f"trimmed to {used}" in note for note in notes] == ([True] if used < frames else [])
    assert sizes["pad"] == [[1, 4, 8, 9], ["70×60 was continued to 72×64, right and below."]]
    difference, notes = sizes["alpha"]
    assert difference < 1e-5 and notes == ["The first 3 of 4 channels were encoded."]
    assert sizes["filled"] == [[1, 4, 8, 8], ["The images have 3 channels; the missing 1 of 4 were filled."], "exact"]
    assert sizes["formatted"] == [1, 4, 1, 8, 8]


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_replacing_the_types_of_the_stock_nodes_is_all_that_a_workflow_needs(observed, kind):
    seen = scenario(observed, "workflows")
    assert seen[f"{kind} SteadyVSR_"] == seen[f"{kind} "]
    (one,) = seen[f"{kind} "]
    frames = 5 if kind == "wan" else 6
    assert one[1:] == [[frames, 96, 136, 3], "torch.float32", "cpu"]


def test_clips_and_single_images_keep_their_batch(observed):
    sizes = scenario(observed, "sizes")
    assert sizes["clips"] == [[2, 16, 2, 4, 4], []]
    assert sizes["single images"] == [[3, 16, 1, 4, 4], 3]


@pytest.mark.parametrize("mode", ["auto", "blend"])
def test_comfyui_is_asked_for_the_need_of_a_tile_not_of_the_frame(observed, mode):
    seen = scenario(observed, "memory")[mode]
    assert len(seen["asked"]) == 2 and max(seen["asked"]) <= seen["tile"] < seen["whole"] / 8


@pytest.mark.parametrize("mode", ["auto", "blend"])
def test_the_report_s_peak_is_that_of_a_tracker_of_its_own(observed, mode):
    seen = scenario(observed, "memory")[mode]
    memory = seen["report"]["memory"]
    assert abs(memory["run_peak_bytes"] - memory["weights_bytes"] - seen["own_peak"]) <= 0.01 * seen["own_peak"]
    assert memory["peak"]["allocated"]["source"] == "tracker" and memory["weights_bytes"] > 15_000_000
    assert memory["predicted_bytes"] >= memory["measured_bytes"] > 0
    assert seen["report"]["verified"] is True


def test_verified_needs_the_budget_the_return_and_a_measurement(observed):
    seen = scenario(observed, "memory")
    assert seen["tight"]["verified"] is False and "above 17.41 MiB" in seen["tight"]["verified_reason"]
    assert seen["leak"]["verified"] is False and "did not come back" in seen["leak"]["verified_reason"]
    assert seen["leak"]["memory"]["grown_bytes"] >= 32 * MIB
    assert seen["unmeasured"]["verified"] is False
    assert seen["unmeasured"]["verified_reason"].startswith("not measurable on cpu")
    assert seen["unmeasured"]["memory"]["run_peak_bytes"] is None


def test_the_first_tile_corrects_the_size(observed):
    seen = scenario(observed, "memory")
    assert seen["roomy"]["tile_size"] == 512 and seen["roomy"]["units"] == 1
    assert seen["auto tile"]["tile_size"] > 64 and "by measurement" in seen["auto tile"]["notes"][0]
    shrunk = seen["shrunk"]
    assert shrunk["tile_size"] < 192 and "tiles of 192 px were changed" in shrunk["notes"][0]
    assert seen["auto tile"]["verified"] is True, seen["auto tile"]["verified_reason"]
    assert shrunk["verified"] is False and "above 25.60 MiB" in shrunk["verified_reason"]


def test_a_vae_with_four_positions_in_a_latent_is_exact_too(observed):
    seen = scenario(observed, "others")
    if "flux2" not in seen:
        pytest.skip("this ComfyUI has no such VAE")
    (latents, frames) = seen["flux2"]
    assert latents[0] < 1e-4 and latents[1:] == ["exact", [1, 32, 8, 10]]
    assert frames[0] < 1e-4 and frames[1:] == ["exact", [1, 128, 160, 3]]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("little RAM", "the exact path would keep"),
        ("trial", "a trial image differs by"),
        ("strange", "the layers of its decoder are not those of a known kind: conv_out"),
        ("channels", "the layers of its decoder are not those of a known kind: Given groups=1"),
        ("no encoder", "encoding a trial clip is not finite in torch.float32"),
        ("no memory", "its trial ran out of memory"),
    ],
)
def test_where_the_exact_path_cannot_be_taken_tiles_are_blended_and_the_reason_stands_there(observed, case, reason):
    report = scenario(observed, "others")[case]
    assert report["mode"] == "blend" and report["mode_reason"].startswith(reason)


@pytest.mark.parametrize("kind", ["sd", "wan"])
def test_a_vae_that_fits_no_fp16_is_tried_in_fp32_and_exact_in_it(observed, kind):
    seen = scenario(observed, "others")[f"overflow {kind}"]
    assert seen["report"]["mode"] == "exact" and seen["report"]["dtype"] == "float16"
    assert "in float16" in seen["report"]["notes"][0] and seen["error"] < 2e-2
    assert seen["weights"] == ["torch.float16"]


def test_a_trial_without_memory_makes_room_once_and_on_oom_error_stops(observed):
    seen = scenario(observed, "others")
    assert seen["room"] == "exact" and seen["unloaded"] == 1
    assert seen["stopped"] == "OutOfMemoryError: scripted"


@pytest.mark.parametrize("mode", ["auto", "blend"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_ends_a_run_and_nothing_stays(observed, kind, mode):
    seen = scenario(observed, "interrupts")[f"{kind} {mode}"]
    assert seen == {"error": "InterruptProcessingException", "held": seen["held"], "hooks": 0}
    assert abs(seen["held"]) < 64 << 10
