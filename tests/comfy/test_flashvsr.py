"""The nodes inside a real ComfyUI: what is loaded when, what is left behind, and a workflow through its server.

COMFYUI_PATH names one checkout or several; COMFYUI_PYTHON the interpreter that has ComfyUI's requirements (default: the
one that runs the tests). The states are observed by flashvsr_session.py, which runs in ComfyUI's own process.
"""

from __future__ import annotations

import json
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import pytest
from steadyvsr.tests.comfy.server import (
    CLIP_FRAMES,
    CLIP_HEIGHT,
    CLIP_RATE,
    CLIP_WIDTH,
    PYTHON,
    ROOT,
    SAMPLE_RATE,
    Server,
    base_folder,
)

pytestmark = pytest.mark.comfy

SESSION_SECONDS = 300
NODES = [
    "SteadyVSR_ApplyLoRA",
    "SteadyVSR_Doctor",
    "SteadyVSR_FreeMemory",
    "SteadyVSR_GuidanceMemory",
    "SteadyVSR_LeanSampling",
    "SteadyVSR_LoadCLIP",
    "SteadyVSR_LoadCheckpoint",
    "SteadyVSR_LoadDiffusionModel",
    "SteadyVSR_LoadFlashVSR",
    "SteadyVSR_LoadVAE",
    "SteadyVSR_MemoryReport",
    "SteadyVSR_PhaseGate",
    "SteadyVSR_ReleaseKept",
    "SteadyVSR_Upscale",
    "SteadyVSR_UpscaleVideo",
    "SteadyVSR_VAEDecodeTiled",
    "SteadyVSR_VAEEncodeTiled",
]
AAC_FRAME_SAMPLES = 1024
OPTIONAL = {"vae", "download", "keep_loaded", "budget_gb", "tile", "clean", "log_steps"}


SESSIONS: dict[Path, dict] = {}


@pytest.fixture
def observed(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What flashvsr_session.py saw in this ComfyUI; one process for all tests."""
    if comfyui_path not in SESSIONS:
        base = base_folder(tmp_path_factory.mktemp("comfyui"))
        script = ROOT / "tests" / "comfy" / "flashvsr_session.py"
        result = subprocess.run(
            [PYTHON, str(script), str(base / "custom_nodes" / "steadyvsr"), str(base)],
            cwd=comfyui_path,
            capture_output=True,
            text=True,
            timeout=SESSION_SECONDS,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        SESSIONS[comfyui_path] = json.loads(result.stdout.splitlines()[-1])
    return SESSIONS[comfyui_path]


def scenario(observed: dict, name: str) -> dict:
    assert "error" not in observed[name], observed[name]["error"]
    return observed[name]


def test_the_pack_loads_with_all_its_nodes(observed):
    assert observed["loaded"] == {"ok": True, "nodes": NODES}


@pytest.mark.parametrize("name", ["LoadFlashVSR", "Upscale", "UpscaleVideo"])
def test_schema_ids_are_the_parameters_of_execute_and_each_has_a_tooltip(observed, name):
    schema = scenario(observed, "schema")[name]
    assert schema["inputs"] == schema["parameters"]
    assert schema["without_tooltip"] == []
    assert schema["category"].startswith("SteadyVSR/")
    assert set(schema["info"]) == set(schema["inputs"]) - OPTIONAL


def test_registering_the_model_folder_twice_leaves_one_entry(observed):
    seen = scenario(observed, "model_folder")
    assert seen["before"] == seen["after"]
    assert len(seen["after"]) == 1 and Path(seen["after"][0]).name == "flashvsr"
    assert seen["choices"] == ["nano (embedded)", "broken", "tiny.safetensors", "FlashVSR-v1.1", "FlashVSR"]


def test_weights_are_loaded_for_a_run_and_gone_after_free_memory(observed):
    seen = scenario(observed, "residency")
    networks = dict(zip(("Transformer", "CausalLQ4xProjection", "TCDecoder"), seen["model_sizes"], strict=True))
    assert seen["before"] == {} and seen["loaded_sizes_before"] == [0, 0, 0]
    assert seen["during"] and all(state == networks for state in seen["during"])
    assert seen["after"] == networks
    assert seen["freed"] == {} and seen["loaded_sizes_freed"] == [0, 0, 0]
    assert seen["again"] == networks


def test_a_kept_model_is_read_once_and_outlives_its_users_until_a_loader_says_no(observed):
    seen = scenario(observed, "kept")
    assert seen["reads"] == {"first": 1, "again": 1, "after_no": 1, "anew": 2}
    assert seen["alive"] == {"kept": True, "after_no": False}
    assert seen["policies"] == ["keep", "no"]
    assert seen["same_frames"] is True


def test_the_run_after_free_memory_gives_the_same_frames(observed):
    seen = scenario(observed, "residency")
    assert seen["shape"] == [10, 128, 192, 3]
    assert seen["first"] == seen["second"]


def test_the_report_tells_what_was_done(observed):
    report = scenario(observed, "residency")["report"]
    assert report["frames"] == 10 and report["input_size"] == [48, 32] and report["output_size"] == [192, 128]
    assert report["weights_loaded_bytes"] == sum(scenario(observed, "residency")["model_sizes"])
    assert report["version"] == "v1.1" and report["dtype"] == "float32" and report["seconds"] > 0


def test_a_partial_load_gives_the_same_frames_as_a_full_one(observed):
    seen = scenario(observed, "partial_load")
    assert all(part["lowvram"] and part["loaded"] < part["size"] / 10 for part in seen["state"])
    assert seen["partial"] == seen["full"]


def test_an_interrupt_releases_the_run_and_the_next_one_works(observed):
    seen = scenario(observed, "interrupted")
    assert seen["raised"] == "InterruptProcessingException"
    assert 13 <= max(done for done, _, _ in seen["calls"]) < 30
    # While it ran, the run held its caches and the output batch; afterwards nothing is left of them.
    assert seen["during"][0] > seen["before"] + 1_000_000
    assert seen["after"] == seen["before"]
    assert seen["again"] == seen["wanted"]


def test_the_newest_frame_is_shown_while_the_run_goes_on(observed):
    previews = [preview for _, _, preview in scenario(observed, "interrupted")["calls"] if preview]
    assert previews and all(preview == ["JPEG", [192, 128], 512] for preview in previews)


def test_alpha_is_dropped_and_grey_repeated_with_a_note(observed):
    seen = scenario(observed, "images")
    assert seen["alpha"] == seen["plain"] and "alpha" in seen["alpha_notes"][0]
    assert seen["grey"] == seen["grey_as_rgb"] != seen["plain"] and "grey" in seen["grey_notes"][0]


def test_the_output_size_is_round_of_each_side_times_the_scale(observed):
    assert scenario(observed, "images")["odd"] == [3, round(32 * 1.3), round(48 * 1.3), 3]


def test_a_longer_batch_needs_more_memory_for_its_output_only(observed):
    short, long = scenario(observed, "growth").values()
    assert long["output"] - short["output"] == 64 * 192 * 128 * 3 * 4
    assert abs((long["peak"] - long["output"]) - (short["peak"] - short["output"])) <= 1024


def test_the_memory_asked_for_is_what_the_run_needs(observed):
    for seen in scenario(observed, "growth").values():
        assert 0.8 <= seen["estimate"] / (seen["peak"] - seen["output"]) <= 1.5


@pytest.mark.parametrize(
    ("case", "words"),
    [("nan", "frame 1"), ("empty", "empty batch"), ("five_channels", "got 5"), ("small", "got 48 × 8")],
)
def test_a_bad_image_is_refused_by_name(observed, case, words):
    message = scenario(observed, "images")[case]
    assert message.startswith("ValueError: FlashVSR Upscale: expected") and words in message


def test_a_model_set_that_is_not_there_is_refused_by_name(observed):
    seen = scenario(observed, "loader_errors")
    assert "got '../../secret'" in seen["unknown"] and "Load FlashVSR: expected" in seen["unknown"]
    assert "Turn on download" in seen["official"]
    assert "model.safetensors" in seen["broken"] and "0 bytes" in seen["broken"]


def test_a_streamed_wan_vae_equals_comfyuis_own_decode(observed):
    seen = scenario(observed, "vae_decoder")
    assert seen["size"] > 0.1
    assert "2 tiles" in seen["streamed"] and max(seen["streamed"].values()) <= 1e-5


def test_the_vae_decoder_replaces_the_tc_decoder(observed):
    seen = scenario(observed, "vae_decoder")
    assert seen["decoder"] == "vae" and seen["shape"] == [10, 128, 192, 3] and seen["differs"]
    assert set(seen["listed"]) == {"Transformer", "CausalLQ4xProjection", "WanVAE"}


def test_a_missing_or_foreign_vae_is_refused(observed):
    seen = scenario(observed, "vae_decoder")
    assert "expected a Wan 2.1 VAE" in seen["none"] and "got none" in seen["none"]
    assert "expected a Wan 2.1 VAE" in seen["other"] and "TAESD" in seen["other"]


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_a_video_keeps_frames_times_and_sound(observed, kind):
    seen = scenario(observed, "videos")
    source, result = seen["source"], seen[kind]
    assert source["frames"] == CLIP_FRAMES and source["samples"] > 0
    assert result["folder"] == seen["temp"]
    assert result["size"] == [4 * CLIP_WIDTH, 4 * CLIP_HEIGHT] and result["pixels"] == "yuv420p"
    assert result["frames"] == source["frames"] and result["samples"] == source["samples"]
    assert result["times"] == pytest.approx(source["times"], abs=1e-4)


def test_a_video_of_tensors_keeps_its_frames_and_its_sound_until_the_picture_ends(observed):
    result = scenario(observed, "videos")["components"]
    assert result["frames"] == 10 and result["size"] == [192, 128]
    assert result["times"] == pytest.approx([index / 10 for index in range(10)], abs=1e-4)
    assert abs(result["samples"] - 16_000) <= 2 * AAC_FRAME_SAMPLES


def test_a_trimmed_video_is_upscaled_trimmed(observed):
    seen = scenario(observed, "videos")
    if "trimmed" not in seen:
        pytest.skip("this ComfyUI has no trimmed videos")
    assert seen["trimmed"]["frames"] == round(0.25 * CLIP_RATE)


def test_an_odd_size_is_written_whole_with_a_note(observed):
    result = scenario(observed, "videos")["odd"]
    assert result["size"] == [round(48 * 1.4), round(32 * 1.4)] == [67, 45] and result["frames"] == CLIP_FRAMES
    assert result["pixels"] == "yuv444p" and "67x45" in result["notes"][0]


@pytest.mark.parametrize(("name", "words"), [("cut.mp4", "cut off"), ("empty.mp4", "0 bytes"), ("text.mp4", "text")])
def test_a_damaged_video_is_refused_by_its_file_name(observed, name, words):
    message = scenario(observed, "videos")[name]
    assert f"{name}: expected" in message and words in message


def test_damage_met_on_the_way_is_an_error_that_names_the_file_with_the_frames_before_it(observed):
    seen = scenario(observed, "videos")
    message, ((name, rescued),) = seen["spoiled.mkv"], seen["rescued"].items()
    count = rescued["frames"]
    assert f"FlashVSR Upscale Video: spoiled.mkv: expected 12 frames; got {count} frames" in message and name in message
    assert 4 <= count <= 9 and rescued["size"] == [192, 128]


def test_freed_heap_pages_go_back_to_the_system_once_in_eight_frames_of_a_video(observed):
    assert scenario(observed, "videos")["trims"] == -(-CLIP_FRAMES // 8)


def test_an_interrupted_video_leaves_no_file(observed):
    seen = scenario(observed, "videos")["interrupt"]
    assert seen["raised"] == "InterruptProcessingException"
    assert len(seen["during"]) == 1 and seen["during"][0].endswith(".part")
    assert seen["left"] == []


WORKFLOW = {
    "1": {"class_type": "LoadVideo", "inputs": {"file": "clip.mp4"}},
    "2": {
        "class_type": "SteadyVSR_LoadFlashVSR",
        "inputs": {
            "model_set": "nano (embedded)",
            "version": "auto",
            "precision": "auto",
            "device": "auto",
            "attention": "auto",
            "lq_cache_order": "fixed",
        },
    },
    "3": {
        "class_type": "SteadyVSR_UpscaleVideo",
        "inputs": {
            "flashvsr": ["2", 0],
            "video": ["1", 0],
            "scale": 4.0,
            "seed": 0,
            "sparse_ratio": 2.0,
            "kv_ratio": 3.0,
            "local_range": 11,
            "colour": "adain",
            "decoder": "tc",
        },
    },
    # format.codec is how newer versions call the codec of a format; 0.3.64 reads codec.
    "4": {
        "class_type": "SaveVideo",
        "inputs": {
            "video": ["3", 0],
            "filename_prefix": "upscaled",
            "format": "auto",
            "codec": "auto",
            "format.codec": "auto",
        },
    },
}


@pytest.mark.skipif(not (ROOT / "assets" / "nano.safetensors").is_file(), reason="the embedded network is not there")
def test_a_video_goes_through_a_workflow_of_the_server(comfyui_path, tmp_path):
    base = base_folder(tmp_path)
    server = Server(comfyui_path, base)
    try:
        server.wait()
        assert set(NODES) <= set(server.get("/object_info"))
        entry = server.run(WORKFLOW)
        assert entry["status"]["status_str"] == "success", entry["status"]
        (saved,) = (base / "output").glob("upscaled*.mp4")
        report = json.loads(entry["outputs"]["3"]["text"][0])
    finally:
        server.stop()
    assert report["frames"] == CLIP_FRAMES and report["model"] == "nano (embedded)"
    with av.open(str(saved)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (4 * CLIP_WIDTH, 4 * CLIP_HEIGHT)
        assert stream.average_rate == Fraction(CLIP_RATE)
        assert sum(1 for _ in container.decode(stream)) == CLIP_FRAMES
    with av.open(str(saved)) as container:
        sound = sum(frame.samples for frame in container.decode(container.streams.audio[0]))
    assert abs(sound - SAMPLE_RATE * CLIP_FRAMES / CLIP_RATE) <= 2 * AAC_FRAME_SAMPLES
