"""Sends every video of a folder to a running ComfyUI, one prompt for each, and waits for the results.

    python queue_folder.py FOLDER [--server http://127.0.0.1:8188] [--model "nano (embedded)"] [--scale 4]

Needs Python alone. ComfyUI saves the results in its output folder, under upscaled/. One clip is one prompt, so memory
is the same before each of them; the model stays loaded between them (keep_loaded), and is released at the end.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
import time
import urllib.request
import uuid
from pathlib import Path

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm"}


def call(url: str, body: bytes | None = None, content: str = "application/json") -> dict:
    # The second header is what the pack's own routes ask of scripts; ComfyUI does not look at it.
    headers = {"Content-Type": content, "X-SteadyVSR": "1"} if body else {}
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


def upload(server: str, clip: Path) -> str:
    """Puts a clip into ComfyUI's input folder and returns its name there."""
    mark, kind = uuid.uuid4().hex, mimetypes.guess_type(clip.name)[0] or "video/mp4"
    disposition = f'Content-Disposition: form-data; name="image"; filename="{clip.name}"'
    head = f"--{mark}\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n"
    body = head.encode() + clip.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    return call(f"{server}/upload/image", body, f"multipart/form-data; boundary={mark}")["name"]


def workflow(clip: str, model: str, scale: float) -> dict:
    """The API form of: Load Video → FlashVSR Upscale Video → Save Video."""
    return {
        "1": {"class_type": "LoadVideo", "inputs": {"file": clip}},
        "2": {"class_type": "SteadyVSR_LoadFlashVSR", "inputs": {
            "model_set": model, "version": "auto", "precision": "auto", "device": "auto", "attention": "auto",
            "lq_cache_order": "fixed", "keep_loaded": "keep"}},
        "3": {"class_type": "SteadyVSR_UpscaleVideo", "inputs": {
            "flashvsr": ["2", 0], "video": ["1", 0], "scale": scale, "seed": 0, "sparse_ratio": 2.0, "kv_ratio": 3.0,
            "local_range": 11, "colour": "adain", "decoder": "tc"}},
        "4": {"class_type": "SaveVideo", "inputs": {
            "video": ["3", 0], "filename_prefix": f"upscaled/{Path(clip).stem}", "format": "auto", "codec": "auto",
            "format.codec": "auto"}},
    }  # fmt: skip


def finished(server: str, prompt: str) -> dict:
    while True:
        history = call(f"{server}/history/{prompt}")
        if prompt in history:
            return history[prompt]
        time.sleep(0.5)


def process_bytes(server: str) -> int | None:
    """What ComfyUI's process holds in RAM, by the pack's own reading."""
    (ram,) = [device for device in call(f"{server}/steadyvsr/state")["devices"] if device["device"] == "RAM"]
    known = [ram["parts"][name] for name in ("kept", "models", "own")]
    return None if None in known else sum(known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--model", default="nano (embedded)")
    parser.add_argument("--scale", type=float, default=4.0)
    options = parser.parse_args()
    clips = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    failed = 0
    for clip in clips:
        prompt = workflow(upload(options.server, clip), options.model, options.scale)
        queued = call(f"{options.server}/prompt", json.dumps({"prompt": prompt}).encode())
        result = finished(options.server, queued["prompt_id"])
        state = result["status"]["status_str"]
        failed += state != "success"
        held = process_bytes(options.server)
        memory = "what ComfyUI holds cannot be read" if held is None else f"ComfyUI holds {held >> 20} MiB"
        sys.stdout.write(f"{clip.name}: {state}, {memory}\n")
    call(f"{options.server}/steadyvsr/release", b"{}")
    call(f"{options.server}/free", b'{"unload_models": true, "free_memory": true}')
    return 1 if failed or not clips else 0


if __name__ == "__main__":
    sys.exit(main())
