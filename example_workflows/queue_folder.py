"""Sends every video of a folder to a running ComfyUI, one prompt for each, and waits for the results.

    python queue_folder.py FOLDER [--server http://127.0.0.1:8188] [--model "nano (embedded)"] [--scale 4]

Needs Python alone. ComfyUI saves the results in its output folder, under upscaled/. One clip is one prompt, so memory
is the same before each of them; the model stays loaded between them (keep_loaded), and is released at the end.

A clip that fails is named with the reason, and the next one follows. Exit status 1 where one failed, 2 where nothing
could be sent.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

SUFFIXES = {".mp4", ".mkv", ".mov", ".webm"}
LOADER = "SteadyVSR_LoadFlashVSR"


class Refused(Exception):
    """ComfyUI did not do what it was asked; the message is for people."""


def call(url: str, body: bytes | None = None, content: str = "application/json") -> dict:
    # The pack's own routes take a POST only with this header, which no foreign page can send.
    headers = {"Content-Type": content, "X-SteadyVSR": "1"} if body else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise Refused(refusal(error.code, error.read())) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Refused(f"no ComfyUI answers at {url}: {reason}. Start it, or give --server.") from error
    return json.loads(text) if text else {}


def refusal(code: int, body: bytes) -> str:
    """Why a request was refused, in the words of ComfyUI's answer."""
    try:
        answer = json.loads(body)
        said = [answer["error"]["message"] if isinstance(answer["error"], dict) else str(answer["error"])]
        for node in answer.get("node_errors", {}).values():
            said += [f"{node['class_type']}: {error['message']}: {error['details']}" for error in node["errors"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = [body.decode(errors="replace").strip()[:200]]
    return f"ComfyUI refused it ({code}): " + "; ".join(text for text in said if text)


def check_model(server: str, model: str) -> None:
    """Asks before anything is uploaded."""
    node = call(f"{server}/object_info/{LOADER}").get(LOADER)
    if node is None:
        raise Refused(f"the ComfyUI at {server} has no SteadyVSR nodes. Install the pack there and restart it.")
    kind, *more = node["input"]["required"]["model_set"]
    choices = kind if isinstance(kind, list) else more[0]["options"]
    if model not in choices:
        raise Refused(f"there is no model {model!r} there. Choose one of: {', '.join(choices)}.")


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
    """The history of a prompt once it has ended."""
    while True:
        queue = call(f"{server}/queue")  # read first: a prompt that ends in between is in the history
        history = call(f"{server}/history/{prompt}")
        if prompt in history:
            return history[prompt]
        if all(prompt != item[1] for item in [*queue["queue_running"], *queue["queue_pending"]]):
            raise Refused("it was removed from ComfyUI's queue.")
        time.sleep(0.5)


def why_not(status: dict) -> str:
    """Why a prompt did not succeed; empty where it did."""
    if status["status_str"] == "success":
        return ""
    for event, said in reversed(status.get("messages", [])):
        if event == "execution_error":
            return f"{said['node_type']}: {said['exception_message'].strip()}"
        if event == "execution_interrupted":
            return f"interrupted in {said['node_type']}"
    return status["status_str"]


def upscaled(server: str, clip: Path, model: str, scale: float) -> str:
    """Sends one clip and waits for it; returns why it failed, or nothing."""
    try:
        prompt = workflow(upload(server, clip), model, scale)
        queued = call(f"{server}/prompt", json.dumps({"prompt": prompt}).encode())
        return why_not(finished(server, queued["prompt_id"])["status"])
    except (Refused, OSError) as error:
        return str(error)


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
    if not options.folder.is_dir():
        parser.error(f"expected a folder; got {options.folder}.")
    clips = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not clips:
        parser.error(f"expected {', '.join(sorted(SUFFIXES))} files in {options.folder}; there are none.")
    failed = 0
    try:
        check_model(options.server, options.model)
        for clip in clips:
            problem = upscaled(options.server, clip, options.model, options.scale)
            failed += bool(problem)
            held = process_bytes(options.server)
            memory = "what ComfyUI holds cannot be read" if held is None else f"ComfyUI holds {held >> 20} MiB"
            sys.stdout.write(f"{clip.name}: {f'failed: {problem}' if problem else 'success'}; {memory}\n")
        call(f"{options.server}/steadyvsr/release", b"{}")
        call(f"{options.server}/free", b'{"unload_models": true, "free_memory": true}')
    except Refused as error:
        sys.stderr.write(f"queue_folder: {error}\n")
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
