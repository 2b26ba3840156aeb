"""A real ComfyUI server on the CPU with the pack in its custom nodes, for tests that speak to it over HTTP."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("COMFYUI_PYTHON") or sys.executable
SERVER_SECONDS = 300
ANSWER_SECONDS = 60
"""Of one request: a busy machine is no failure."""
CLIP_FRAMES, CLIP_WIDTH, CLIP_HEIGHT, CLIP_RATE, SAMPLE_RATE = 10, 48, 32, 12, 48_000


def write_clip(path: Path) -> None:
    """Ten frames of moving colours with a tone of the same length."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=CLIP_RATE)
        video.width, video.height, video.pix_fmt = CLIP_WIDTH, CLIP_HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        rows, columns = np.mgrid[:CLIP_HEIGHT, :CLIP_WIDTH]
        for index in range(CLIP_FRAMES):
            planes = [(columns * 4 + index * 9) % 256, rows * 6 % 256, np.full_like(rows, 40 + 10 * index)]
            picture = np.stack(planes, -1).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        samples = np.arange(SAMPLE_RATE * CLIP_FRAMES // CLIP_RATE) / SAMPLE_RATE
        tone = np.stack([0.4 * np.sin(2 * math.pi * 440 * samples)] * 2).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def base_folder(folder: Path) -> Path:
    """A base directory for ComfyUI with the pack as a custom node and a clip as input."""
    for name in ("custom_nodes", "input"):
        (folder / name).mkdir()
    (folder / "custom_nodes" / "steadyvsr").symlink_to(ROOT, target_is_directory=True)
    write_clip(folder / "input" / "clip.mp4")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A ComfyUI server on the CPU with the pack in its custom nodes.

    Args:
        script: what is started, in ComfyUI's folder.
    """

    def __init__(self, checkout: Path, base: Path, *options: str, script: str | Path = "main.py") -> None:
        self.url, self.log = f"http://127.0.0.1:{free_port()}", base / "server.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    PYTHON, str(script), "--cpu", "--listen", "127.0.0.1", "--port", self.url.rpartition(":")[2],
                    "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
                    *options,
                ],
                cwd=checkout, stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self) -> None:
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Posts JSON, or bytes as they are; gives the status and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-SteadyVSR": "1"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()

    def run(self, workflow: dict) -> dict:
        """Queues a workflow in API format and returns its entry in the history."""
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                prompt = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the workflow was refused: {error.read().decode()}") from error
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt}")
            if prompt in history:
                return history[prompt]
            time.sleep(0.2)
        raise AssertionError(f"the workflow did not end:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
