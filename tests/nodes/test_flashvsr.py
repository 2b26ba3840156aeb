"""The FlashVSR nodes on the double of ComfyUI and in each real one: what is loaded when, what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.comfy.server import CLIP_FRAMES, CLIP_HEIGHT, CLIP_RATE, CLIP_WIDTH
from steadyvsr.tests.session.observed import scenario

SUBJECT = "flashvsr"
AAC_FRAME_SAMPLES = 1024
OPTIONAL = {"vae", "download", "keep_loaded", "budget_gb", "tile", "clean", "log_steps"}


@pytest.mark.parametrize("name", ["LoadFlashVSR", "Upscale", "UpscaleVideo"])
def test_schema_ids_are_the_parameters_of_execute_and_each_has_a_tooltip(observed, name):
    schema = scenario(observed, "flashvsr schema")[name]
    assert schema["inputs"] == schema["parameters"]
    assert schema["without_tooltip"] == []
    assert schema["category"].startswith("SteadyVSR/")
    assert set(schema["info"]) == set(schema["inputs"]) - OPTIONAL


def test_registering_the_model_folder_twice_leaves_one_entry(observed):
    seen = scenario(observed, "flashvsr model folder")
    assert seen["before"] == seen["after"]
    assert len(seen["after"]) == 1 and Path(seen["after"][0]).name == "flashvsr"
    assert seen["choices"] == ["nano (embedded)", "broken", "tiny.safetensors", "FlashVSR-v1.1", "FlashVSR"]


def test_weights_are_loaded_for_a_run_and_gone_after_free_memory(observed):
    seen = scenario(observed, "flashvsr residency")
    networks = dict(zip(("Transformer", "CausalLQ4xProjection", "TCDecoder"), seen["model_sizes"], strict=True))
    assert seen["before"] == {} and seen["loaded_sizes_before"] == [0, 0, 0]
    assert seen["during"] and all(state == networks for state in seen["during"])
    assert seen["after"] == networks
    assert seen["freed"] == {} and seen["loaded_sizes_freed"] == [0, 0, 0]
    assert seen["again"] == networks


def test_a_kept_model_is_read_once_and_outlives_its_users_until_a_loader_says_no(observed):
    seen = scenario(observed, "flashvsr kept")
    assert seen["reads"] == {"first": 1, "again": 1, "after_no": 1, "anew": 2}
    assert seen["alive"] == {"kept": True, "after_no": False}
    assert seen["policies"] == ["keep", "no"]
    assert seen["same_frames"] is True


def test_memory_that_runs_out_while_the_weights_are_loaded_is_answered_like_any_other(observed):
    seen = scenario(observed, "flashvsr short at the start")
    assert seen["same"] is True and [attempt["phase"] for attempt in seen["attempts"]] == ["set up"]
    assert "nothing is left to try" in seen["error"] and "did not fit" in seen["error"] and "set up" in seen["error"]


def test_the_run_after_free_memory_gives_the_same_frames(observed):
    seen = scenario(observed, "flashvsr residency")
    assert seen["shape"] == [10, 128, 192, 3]
    assert seen["first"] == seen["second"]


def test_the_report_tells_what_was_done(observed):
    report = scenario(observed, "flashvsr residency")["report"]
    assert report["frames"] == 10 and report["input_size"] == [48, 32] and report["output_size"] == [192, 128]
    assert report["weights_loaded_bytes"] == sum(scenario(observed, "flashvsr residency")["model_sizes"])
    assert report["version"] == "v1.1" and report["dtype"] == "float32" and report["seconds"] > 0


def test_a_partial_load_gives_the_same_frames_as_a_full_one(observed):
    seen = scenario(observed, "flashvsr partial load")
    if seen["state"] is None:
        pytest.skip("the double loads networks whole")
    assert all(part["lowvram"] and part["loaded"] < part["size"] / 10 for part in seen["state"])
    assert seen["partial"] == seen["full"]


def test_an_interrupt_releases_the_run_and_the_next_one_works(observed):
    seen = scenario(observed, "flashvsr interrupted")
    assert seen["raised"] == "InterruptProcessingException"
    assert 13 <= max(done for done, _, _ in seen["calls"]) < 30
    # While it ran, the run held its caches and the output batch; afterwards nothing is left of them.
    assert seen["during"][0] > seen["before"] + 1_000_000
    assert seen["after"] == seen["before"]
    assert seen["again"] == seen["wanted"]


def test_the_newest_frame_is_shown_while_the_run_goes_on(observed):
    previews = [preview for _, _, preview in scenario(observed, "flashvsr interrupted")["calls"] if preview]
    assert previews and all(preview == ["JPEG", [192, 128], 512] for preview in previews)


def test_alpha_is_dropped_and_grey_repeated_with_a_note(observed):
    seen = scenario(observed, "flashvsr images")
    assert seen["alpha"] == seen["plain"] and "alpha" in seen["alpha_notes"][0]
    assert seen["grey"] == seen["grey_as_rgb"] != seen["plain"] and "grey" in seen["grey_notes"][0]


def test_the_output_size_is_round_of_each_side_times_the_scale(observed):
    assert scenario(observed, "flashvsr images")["odd"] == [3, round(32 * 1.3), round(48 * 1.3), 3]


def test_a_longer_batch_needs_more_memory_for_its_output_only(observed):
    short, long = scenario(observed, "flashvsr growth").values()
    assert long["output"] - short["output"] == 64 * 192 * 128 * 3 * 4
    assert abs((long["peak"] - long["output"]) - (short["peak"] - short["output"])) <= 1024


def test_the_memory_asked_for_is_what_the_run_needs(observed):
    for seen in scenario(observed, "flashvsr growth").values():
        assert 0.8 <= seen["estimate"] / (seen["peak"] - seen["output"]) <= 1.5


@pytest.mark.parametrize(
    ("case", "words"),
    [("nan", "frame 1"), ("empty", "empty batch"), ("five_channels", "got 5"), ("small", "got 48 × 8")],
)
def test_a_bad_image_is_refused_by_name(observed, case, words):
    message = scenario(observed, "flashvsr images")[case]
    assert message.startswith("ValueError: FlashVSR Upscale: expected") and words in message


def test_a_model_set_that_is_not_there_is_refused_by_name(observed):
    seen = scenario(observed, "flashvsr loader errors")
    assert "got '../../secret'" in seen["unknown"] and "Load FlashVSR: expected" in seen["unknown"]
    assert "Turn on download" in seen["official"]
    assert "model.safetensors" in seen["broken"] and "0 bytes" in seen["broken"]


def test_a_streamed_wan_vae_equals_comfyuis_own_decode(observed):
    seen = scenario(observed, "flashvsr vae decoder")
    assert seen["size"] > 0.1
    assert "2 tiles" in seen["streamed"] and max(seen["streamed"].values()) <= 1e-5


def test_the_vae_decoder_replaces_the_tc_decoder(observed):
    seen = scenario(observed, "flashvsr vae decoder")
    assert seen["decoder"] == "vae" and seen["shape"] == [10, 128, 192, 3] and seen["differs"]
    assert set(seen["listed"]) == {"Transformer", "CausalLQ4xProjection", "WanVAE"}


def test_a_missing_or_foreign_vae_is_refused(observed):
    seen = scenario(observed, "flashvsr vae decoder")
    assert "expected a Wan 2.1 VAE" in seen["none"] and "got none" in seen["none"]
    assert "expected a Wan 2.1 VAE" in seen["other"] and "AutoencoderKL" in seen["other"]


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_a_video_keeps_frames_times_and_sound(observed, kind):
    seen = scenario(observed, "flashvsr videos")
    source, result = seen["source"], seen[kind]
    assert source["frames"] == CLIP_FRAMES and source["samples"] > 0
    assert result["folder"] == seen["temp"]
    assert result["size"] == [4 * CLIP_WIDTH, 4 * CLIP_HEIGHT] and result["pixels"] == "yuv420p"
    assert result["frames"] == source["frames"] and result["samples"] == source["samples"]
    assert result["times"] == pytest.approx(source["times"], abs=1e-4)


def test_a_video_of_tensors_keeps_its_frames_and_its_sound_until_the_picture_ends(observed):
    result = scenario(observed, "flashvsr videos")["components"]
    assert result["frames"] == 10 and result["size"] == [192, 128]
    assert result["times"] == pytest.approx([index / 10 for index in range(10)], abs=1e-4)
    assert abs(result["samples"] - 16_000) <= 2 * AAC_FRAME_SAMPLES


def test_a_trimmed_video_is_upscaled_trimmed(observed):
    seen = scenario(observed, "flashvsr videos")
    if "trimmed" not in seen:
        pytest.skip("this ComfyUI has no trimmed videos")
    assert seen["trimmed"]["frames"] == round(0.25 * CLIP_RATE)


def test_an_odd_size_is_written_whole_with_a_note(observed):
    result = scenario(observed, "flashvsr videos")["odd"]
    assert result["size"] == [round(48 * 1.4), round(32 * 1.4)] == [67, 45] and result["frames"] == CLIP_FRAMES
    assert result["pixels"] == "yuv444p" and "67x45" in result["notes"][0]


@pytest.mark.parametrize(("name", "words"), [("cut.mp4", "cut off"), ("empty.mp4", "0 bytes"), ("text.mp4", "text")])
def test_a_damaged_video_is_refused_by_its_file_name(observed, name, words):
    message = scenario(observed, "flashvsr videos")[name]
    assert f"{name}: expected" in message and words in message


def test_damage_met_on_the_way_is_an_error_that_names_the_file_with_the_frames_before_it(observed):
    seen = scenario(observed, "flashvsr videos")
    message, ((name, rescued),) = seen["spoiled.mkv"], seen["rescued"].items()
    count = rescued["frames"]
    assert f"FlashVSR Upscale Video: spoiled.mkv: expected 12 frames; got {count} frames" in message and name in message
    assert 4 <= count <= 9 and rescued["size"] == [192, 128]


def test_freed_heap_pages_go_back_to_the_system_once_in_eight_frames_of_a_video(observed):
    assert scenario(observed, "flashvsr videos")["trims"] == -(-CLIP_FRAMES // 8)


def test_an_interrupted_video_leaves_no_file(observed):
    seen = scenario(observed, "flashvsr videos")["interrupt"]
    assert seen["raised"] == "InterruptProcessingException"
    assert len(seen["during"]) == 1 and seen["during"][0].endswith(".part")
    assert seen["left"] == []


def test_the_node_gives_what_the_engine_gives(observed):
    assert scenario(observed, "flashvsr same as the engine")["equal"] is True


def test_the_page_is_told_of_the_run_by_the_node_s_id(observed):
    seen = scenario(observed, "flashvsr told")
    assert seen["nodes"] == ["7"] and seen["shows its report"] is True
    assert seen["phases"][0] == "project" and seen["phases"][-1] == "done"
    assert (seen["last"]["frames"], seen["last"]["total"], seen["last"]["eta"]) == (10, 10, 0)
    assert seen["memory"] == ["advice", "budget", "measured", "predicted"]


def comparable(observed: dict[str, Any]) -> dict[str, Any]:
    """What the run comes to: without clocks, folders and bytes of the machine, and what one version alone has."""
    seen = {name: scenario(observed, name) for name in observed}
    alike = ("nodes", "schema", "kept", "images", "same as the engine")
    residency, videos = seen["flashvsr residency"], seen["flashvsr videos"]
    during = residency["during"]
    told = {name: value for name, value in seen["flashvsr told"].items() if name != "last"}
    return {
        **{name: seen[f"flashvsr {name}"] for name in alike}, "told": told,
        "choices": seen["flashvsr model folder"]["choices"],
        "books": {name: value for name, value in residency.items() if name not in ("report", "during")},
        "books in a run": [state for i, state in enumerate(during) if state not in during[:i]],
        "report": sorted(residency["report"]), "raised": seen["flashvsr interrupted"]["raised"],
        "output": [run["output"] for run in seen["flashvsr growth"].values()],
        "videos": [{**videos[name], "folder": ""} for name in ("path", "memory", "components", "odd")],
        "vae": [seen["flashvsr vae decoder"][name] for name in ("shape", "decoder", "differs", "none", "other")],
    }  # fmt: skip


def test_the_file_of_a_video_goes_with_the_last_output_that_comes_from_it(observed):
    seen = scenario(observed, "flashvsr videos")
    assert seen["results of finished runs"] == 0
    held = {name: seen[f"held: {name}"] for name in ("the VIDEO", "what was cut from it", "nothing")}
    assert held == {"the VIDEO": 1, "what was cut from it": 1, "nothing": 0}


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(observe, comfyui_path: Path):
    assert comparable(observe(None)) == comparable(observe(comfyui_path))


def test_weights_that_comfyui_changes_on_use_are_changed_wherever_they_are_used(observed):
    """Reading `layer.weight` instead would miss them, and copy it to the card in every step of a dynamic VRAM."""
    seen = scenario(observed, "flashvsr weights changed on use")
    assert len(seen) == 4 and all(layer == {"seen": True, "equal": True} for layer in seen.values()), seen
