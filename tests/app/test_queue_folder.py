"""The example script that sends a folder to a running ComfyUI, against a server that answers as ComfyUI does."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "example_workflows" / "queue_folder.py"
MODEL = "nano (embedded)"
RAM = {"devices": [{"device": "RAM", "parts": {"kept": 1 << 20, "models": 1 << 20, "own": 1 << 20}}]}
REFUSED = {
    "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
    "node_errors": {"2": {"class_type": "SteadyVSR_LoadFlashVSR", "errors": [
        {"message": "Value not in list", "details": "model_set: 'x' not in ['nano (embedded)']"}]}},
}  # fmt: skip
FAILED = ["execution_error", {"node_type": "SteadyVSR_UpscaleVideo", "exception_message": "the clip is damaged\n"}]
INTERRUPTED = ["execution_interrupted", {"node_type": "SteadyVSR_UpscaleVideo"}]


class Answers(BaseHTTPRequestHandler):
    """`server.prompts`: for each prompt what happens to it; `server.posted`: paths with their headers."""

    def log_message(self, *_) -> None: ...

    def say(self, value: object, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        place, server = self.path.split("/"), self.server
        if place[1] == "object_info":
            node = {"input": {"required": {"model_set": ["COMBO", {"options": [MODEL]}]}}}
            self.say({place[2]: node} if server.has_pack else {})
        elif place[1] == "history":
            fate = server.fates[int(place[2])]
            messages = fate if isinstance(fate, list) else []
            state = {"status_str": "success" if fate == "success" else "error", "messages": [messages] * bool(messages)}
            self.say({} if fate == "removed" else {place[2]: {"status": state}})
        else:
            self.say({"queue_running": [], "queue_pending": []} if place[1] == "queue" else RAM)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, self.headers.get("X-SteadyVSR")))
        sent = sum(path == "/prompt" for path, _ in self.server.posted) - 1
        if self.path == "/prompt" and self.server.fates[sent] == "refused":
            self.say(REFUSED, 400)
        else:
            self.say({"name": "clip.mp4", "prompt_id": str(sent)})


@pytest.fixture
def queue(tmp_path):
    """A function: what happens to each clip → exit status, output, errors and what was posted."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.has_pack, server.posted = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*fates, model=MODEL, url=f"http://127.0.0.1:{server.server_port}", has_pack=True):
        server.fates, server.has_pack = fates, has_pack
        for index in range(len(fates)):
            (tmp_path / f"shot {index}.mp4").write_bytes(b"clip")
        command = [sys.executable, str(SCRIPT), str(tmp_path), "--server", url, "--model", model]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.splitlines(), done.stderr, server.posted

    yield run
    server.shutdown()
    server.server_close()


def test_a_clip_that_fails_is_named_with_the_reason_and_the_next_one_follows(queue):
    code, lines, _, posted = queue(FAILED, "success", "refused", INTERRUPTED, "removed")
    assert code == 1 and [line.rpartition(";")[0] for line in lines] == [
        "shot 0.mp4: failed: SteadyVSR_UpscaleVideo: the clip is damaged",
        "shot 1.mp4: success",
        "shot 2.mp4: failed: ComfyUI refused it (400): Prompt outputs failed validation; SteadyVSR_LoadFlashVSR: "
        "Value not in list: model_set: 'x' not in ['nano (embedded)']",
        "shot 3.mp4: failed: interrupted in SteadyVSR_UpscaleVideo",
        "shot 4.mp4: failed: it was removed from ComfyUI's queue.",
    ]
    assert posted[-2:] == [("/steadyvsr/release", "1"), ("/free", "1")]


def test_a_model_that_is_not_there_is_said_before_anything_is_uploaded(queue):
    code, lines, said, posted = queue("success", model="flashvsr_v9")
    assert (code, lines, posted) == (2, [], [])
    assert "no model 'flashvsr_v9'" in said and MODEL in said


def test_a_server_without_the_pack_and_no_server_at_all_are_said(queue):
    code, _, said, _ = queue("success", has_pack=False)
    assert code == 2 and "no SteadyVSR nodes" in said
    code, _, said, _ = queue("success", url="http://127.0.0.1:9")
    assert code == 2 and "no ComfyUI answers at http://127.0.0.1:9" in said


def test_an_empty_folder_is_said(queue):
    code, _, said, _ = queue()
    assert code == 2 and "there are none" in said
