"""The example script that sends a folder of clips to a running ComfyUI, one prompt for each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from steadyvsr.tests.comfy.server import ROOT, Server, base_folder

pytestmark = pytest.mark.comfy

CLIPS = 6


def test_a_folder_goes_through_clip_by_clip_and_memory_stays_where_it_is(comfyui_path, tmp_path):
    (tmp_path / "base").mkdir()
    base = base_folder(tmp_path / "base")
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(CLIPS):
        shutil.copy(base / "input" / "clip.mp4", clips / f"shot {index}.mp4")
    server = Server(comfyui_path, base)
    try:
        server.wait()
        script = ROOT / "example_workflows" / "queue_folder.py"
        done = subprocess.run(
            [sys.executable, str(script), str(clips), "--server", server.url, "--scale", "2"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        kept = server.get("/steadyvsr/state")["ram"]["kept"]
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("success") == CLIPS
    assert len(list((base / "output" / "upscaled").glob("shot *.mp4"))) == CLIPS
    held = [int(amount) for amount in re.findall(r"holds (\d+) MiB", done.stdout)]
    assert max(held[2:]) - min(held[2:]) <= 32
    assert kept == 0  # released at the end
