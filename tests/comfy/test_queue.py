"""The example script that sends a folder of clips to a running ComfyUI, one prompt for each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from steadyvsr.tests.comfy.server import ROOT, Server, base_folder

pytestmark = pytest.mark.comfy

CLIPS = 6


def queue(server: Server, clips: Path, *more: str) -> subprocess.CompletedProcess:
    script = ROOT / "example_workflows" / "queue_folder.py"
    return subprocess.run(
        [sys.executable, str(script), str(clips), "--server", server.url, "--scale", "2", *more],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


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
        done = queue(server, clips)
        kept = server.get("/steadyvsr/state")["ram"]["kept"]
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("success") == CLIPS
    assert len(list((base / "output" / "upscaled").glob("shot *.mp4"))) == CLIPS
    held = [int(amount) for amount in re.findall(r"holds (\d+) MiB", done.stdout)]
    assert max(held[2:]) - min(held[2:]) <= 32
    assert kept == 0  # released at the end


def test_a_wrong_model_and_a_damaged_clip_are_said_in_words(comfyui_path, tmp_path):
    (tmp_path / "base").mkdir()
    base = base_folder(tmp_path / "base")
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(base / "input" / "clip.mp4", clips / "b.mp4")
    (clips / "a.mp4").write_bytes(b"no video at all")
    server = Server(comfyui_path, base)
    try:
        server.wait()
        wrong, done = queue(server, clips, "--model", "flashvsr_v9"), queue(server, clips)
    finally:
        server.stop()
    assert wrong.returncode == 2 and "no model 'flashvsr_v9'" in wrong.stderr and "nano (embedded)" in wrong.stderr
    damaged, good = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert damaged.startswith("a.mp4: failed: ") and len(damaged) > 40 and good.startswith("b.mp4: success")
