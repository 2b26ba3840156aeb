"""The FlashVSR nodes in a workflow through a real ComfyUI's server.

COMFYUI_PATH names one checkout or several; COMFYUI_PYTHON the interpreter that has ComfyUI's requirements (default: the
one that runs the tests). The nodes by themselves: tests/nodes.
"""

from __future__ import annotations

import json
from fractions import Fraction

import av
import pytest
from steadyvsr.tests.comfy.server import (
    CLIP_FRAMES,
    CLIP_HEIGHT,
    CLIP_RATE,
    CLIP_WIDTH,
    ROOT,
    SAMPLE_RATE,
    Server,
    base_folder,
)

pytestmark = pytest.mark.comfy

AAC_FRAME_SAMPLES = 1024
SCHEMAS = json.loads((ROOT / "tests" / "node_schemas.json").read_text(encoding="utf-8"))


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
        assert set(SCHEMAS) <= set(server.get("/object_info"))
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
