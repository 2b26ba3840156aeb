"""ComfyUI's own route /free on a real server with kept and other models: flags, caches, a running prompt, the worker.

The diffusion model is kept (B), the text encoder is not (A), the VAE is kept by a second workflow (D).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.comfy.server import ROOT, Server, base_folder
from steadyvsr.tests.simcard.toolchain import missing

pytestmark = pytest.mark.comfy

A, B, D = "WanTEModel", "WAN21", "WanVAE"
SETTLE_SECONDS = 40
HAMMERED_PROMPTS = 24
FIXTURE = """
import os
import sys
import time
from pathlib import Path

sys.path.append({folder!r})  # last: ComfyUI has a `server` of its own
import phases_card

phases_card.take_small_models()
phases_card.write_models(Path({base!r}))
if "STEADYVSR_CARD" not in os.environ:
    phases_card.SimulatedCard(int(os.environ.get("STEADYVSR_CAPACITY") or 1 << 34)).install()

import comfy.model_management as mm
import comfy.model_patcher

detach = comfy.model_patcher.ModelPatcher.detach


def slow_detach(*arguments, **keywords):
    time.sleep(float(os.environ.get("STEADYVSR_UNLOAD_SECONDS") or 0))
    return detach(*arguments, **keywords)


comfy.model_patcher.ModelPatcher.detach = slow_detach


class Use:
    @classmethod
    def INPUT_TYPES(cls):
        return {{
            "required": {{"seconds": ("FLOAT", {{"default": 0.0}}), "turn": ("INT", {{"default": 0}})}},
            "optional": {{"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}},
        }}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "use", "test", True

    def use(self, seconds, turn, model=None, clip=None, vae=None):
        for value in (model, getattr(clip, "patcher", None), getattr(vae, "patcher", None)):
            if value is not None:
                mm.load_models_gpu([value])
        time.sleep(seconds)
        if turn < 0:
            raise mm.OOM_EXCEPTION("planted")
        return {{}}


NODE_CLASS_MAPPINGS = {{"Test_Use": Use}}
"""
MODEL_FILE, CLIP_FILE, VAE_FILE = "tiny_wan.safetensors", "tiny_umt5.safetensors", "tiny_wan_vae.safetensors"


class Turns:
    """A server, and prompts that ComfyUI takes for new ones."""

    def __init__(self, server: Server) -> None:
        self.server, self.turn = server, 0
        self.info = server.get("/object_info")

    def node(self, name: str, **given: Any) -> dict:
        """A node with its defaults but for what is given."""
        inputs = {}
        for id, (kind, *more) in self.info[name]["input"]["required"].items():
            options = more[0] if more else {}
            choices = kind if isinstance(kind, list) else options.get("options") or [None]
            inputs[id] = given.get(id, options.get("default", choices[0]))
        return {"class_type": name, "inputs": inputs | given}

    def workflow(self, *kinds: str, keep: str = "keep", seconds: float = 0.0, fails: bool = False) -> dict:
        self.turn += 1
        nodes = {
            "model": self.node("SteadyVSR_LoadDiffusionModel", unet_name=MODEL_FILE, keep_loaded=keep),
            "clip": self.node("SteadyVSR_LoadCLIP", clip_name1=CLIP_FILE, type="wan", keep_loaded="no"),
            "vae": self.node("SteadyVSR_LoadVAE", vae_name=VAE_FILE, keep_loaded=keep),
        }
        used = {kind: [kind, 0] for kind in kinds}
        turn = -self.turn if fails else self.turn
        use = {"class_type": "Test_Use", "inputs": {"seconds": seconds, "turn": turn, **used}}
        return {**{kind: nodes[kind] for kind in kinds}, "use": use}

    def run(self, *kinds: str, **options: Any) -> None:
        entry = self.server.run(self.workflow(*kinds, **options))
        assert entry["status"]["status_str"] == ("error" if options.get("fails") else "success"), entry["status"]

    def queue(self, workflow: dict) -> None:
        """Queues a workflow and does not wait for it."""
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(self.server.url + "/prompt", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()

    def free(self, **flags: bool) -> None:
        assert self.server.post("/free", flags)[0] == 200

    def press(self, **flags: bool) -> None:
        """Posts the flags and waits until a press was looked at for the last time."""
        before = self.presses()
        self.free(**flags)
        self.until(lambda: self.presses() > before, "the last look at a press")

    def presses(self) -> int:
        looks = self.server.get("/steadyvsr/snapshots")["snapshots"]
        return max([look["press"] for look in looks if look["stage"] == "post-collect"], default=0)

    def listed(self) -> list[str]:
        """What is on the card; the state names kept models in RAM, too."""
        return sorted(m["name"] for m in self.server.get("/steadyvsr/state")["residents"] if m["bytes"])

    def kept(self) -> dict[str, dict]:
        looks = self.server.get("/steadyvsr/snapshots")["snapshots"]
        return {entry["networks"][0]: entry for entry in looks[-1]["kept"]}

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while not condition():
            log = self.server.log.read_text()[-2000:]
            assert time.monotonic() < deadline, f"never came: {what}; {self.listed()}\n{log}"
            time.sleep(0.1)


@pytest.fixture(params=["books", "simcard:2"])
def any_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The servers of a test have this card: ComfyUI's books, or one or two with memory of their own."""
    if request.param != "books":
        if absent := missing():
            pytest.skip(f"the simulated card needs {absent} to be built; found none")
        monkeypatch.setenv("STEADYVSR_CARD", request.param)
    return request.param


@pytest.fixture
def started() -> Iterator[list[Server]]:
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.stop()


def start(started: list[Server], checkout: Path, folder: Path, *options: str) -> Turns:
    base = base_folder(folder)
    here = ROOT / "tests" / "comfy"
    (base / "custom_nodes" / "fixture.py").write_text(FIXTURE.format(folder=str(here), base=str(base)))
    script = here / "simcard_main.py" if "STEADYVSR_CARD" in os.environ else "main.py"
    started.append(Server(checkout, base, *options, script=script))
    started[-1].wait()
    return Turns(started[-1])


@pytest.mark.parametrize("any_card", ["books", "simcard"], indirect=True)
def test_a_kept_model_is_read_once_through_every_button(comfyui_path, any_card, started, tmp_path):
    turns = start(started, comfyui_path, tmp_path)
    turns.run("model", "clip")
    assert turns.listed() == sorted([A, B])
    turns.press(unload_models=True)
    assert turns.listed() == [B]
    turns.run("model", "clip")
    assert turns.listed() == sorted([A, B])
    turns.press(unload_models=True, free_memory=True)
    assert turns.listed() == [B]
    turns.run("model", "clip")
    turns.press(free_memory=True)
    assert turns.listed() == [B]
    turns.run("model", "vae")
    assert turns.listed() == sorted([B, D])
    turns.press(unload_models=True, free_memory=True)
    assert turns.listed() == sorted([B, D]), "all are kept"
    flags = {"unload_models": True, "free_memory": True}
    before = turns.presses()
    turns.queue(turns.workflow("model", "clip", "vae", seconds=3.0))
    turns.until(lambda: turns.listed() == sorted([A, B, D]), "the running prompt's models")
    turns.free(**flags)
    assert turns.listed() == sorted([A, B, D]) and turns.presses() == before, "not while the prompt runs"
    turns.until(lambda: turns.presses() > before, "the press after the prompt")
    assert turns.listed() == sorted([B, D])
    turns.run("model", "clip", "vae", fails=True)
    assert turns.listed() == [], "out of memory: kept models yield"
    turns.run("model", "vae")
    turns.press(**flags)
    assert turns.listed() == sorted([B, D])
    entry = turns.kept()[B]
    assert entry["loads"] == 1 and entry["hits"] >= 4, entry
    assert "a kept model was lost" not in turns.server.log.read_text()
    turns.server.post("/steadyvsr/release", {})
    turns.press(**flags)
    assert turns.listed() == []
    turns.run("model", "clip")  # the worker is alive


@pytest.mark.parametrize("options", [("--cache-none",), ("--cache-lru", "1"), ("--disable-smart-memory",)])
def test_a_kept_model_is_read_once_with_every_kind_of_cache(comfyui_path, started, tmp_path, options):
    turns = start(started, comfyui_path, tmp_path, *options)
    for others in ("clip", "vae"):
        turns.run("model", others, keep="keep")
        turns.run("clip")
        turns.press(unload_models=True, free_memory=True)
        assert B in turns.listed() and A not in turns.listed()
    turns.run("model")
    turns.press(unload_models=True)
    entry = turns.kept()[B]
    assert entry["loads"] == 1 and entry["hits"] >= 2, entry
    assert turns.listed() == sorted([B, D])
    turns.run("clip")  # the worker is alive


def test_the_report_shows_what_a_press_did_and_release_gives_everything_back(comfyui_path, any_card, started, tmp_path):
    turns = start(started, comfyui_path, tmp_path)
    asked = {"value": ["model", 0], "unload_models": True, "free_memory": True, "reason": "between two clips"}
    workflow = turns.workflow("model", "clip") | {"free": turns.node("SteadyVSR_FreeMemory", **asked)}
    assert turns.server.run(workflow)["status"]["status_str"] == "success"
    turns.until(lambda: turns.presses() > 0, "the press that the node asked for")
    report = {"report": turns.node("SteadyVSR_MemoryReport", value=["vae", 0], label="second workflow")}
    entry = turns.server.run(turns.workflow("vae") | report)
    told = json.loads(entry["outputs"]["report"]["text"][0])
    press = told["last_press"]
    assert (press["caller"], press["reason"], press["lost"]) == ("button", "between two clips", [])
    assert [look["stage"] for look in press["snapshots"]] == ["pre-unload", "post-unload", "post-reset", "post-collect"]
    before, *_, after = ({m["name"]: m["bytes"] for m in look["residents"]} for look in press["snapshots"])
    assert set(before) == {A, B} and set(after) == {B}
    assert before[B] == after[B] > 0 and before[A] > 0
    first, *_, last = (
        sum(device["allocated"]["bytes"] for device in look["devices"] if device["device"] != "cpu")
        for look in press["snapshots"]
    )
    assert press["left_bytes"] == first - last >= before[A]
    assert any_card != "books" or press["left_bytes"] == before[A]
    kept = [next(entry for entry in look["kept"] if entry["networks"] == [B]) for look in press["snapshots"]]
    assert [(entry["resident"], entry["listed"], entry["dead"]) for entry in kept] == [(before[B], 1, 0)] * 4
    lines = [line for line in told["text"] if line.startswith("last press")]
    assert len(lines) == 5 and A in lines[0] and MODEL_FILE in lines[0] and "between two clips" in lines[0]
    assert all(MODEL_FILE in line for line in lines[1:])
    release = {"release": turns.node("SteadyVSR_ReleaseKept", value=["vae", 0])}
    entry = turns.server.run(turns.workflow("vae") | release)
    given_up = json.loads(entry["outputs"]["release"]["text"][0])["released"]
    assert sorted(item["name"] for item in given_up) == sorted([MODEL_FILE, VAE_FILE])
    assert sum(item["bytes"] for item in given_up) > before[B]
    turns.press(unload_models=True, free_memory=True)
    assert turns.listed() == [] and turns.server.get("/steadyvsr/snapshots")["snapshots"][-1]["kept"] == []


def hammered(turns: Turns, workflows: list[dict]) -> dict[str, Any]:
    """Three threads release, change policies and read the state while the worker goes through the workflows."""
    server, over, failures = turns.server, threading.Event(), []
    answers: dict[str, list[int]] = {"release": [], "policy": [], "state": []}
    residents: list[list[dict]] = []

    def repeat(what: str, request: Callable[[random.Random], int]) -> None:
        chance = random.Random(what)
        while not over.is_set():
            try:
                answers[what].append(request(chance))
            except Exception:
                failures.append(traceback.format_exc()[-600:])
            time.sleep(0.02 + 0.1 * chance.random())

    def policy(chance: random.Random) -> int:
        known = [id for item in residents[-1:] for id in {model["id"] for model in item} if id]
        wish = {"id": chance.choice(known or ["none"]), "policy": chance.choice(["no", "keep", "pin"])}
        return server.post("/steadyvsr/policy", wish)[0]

    def state(_: random.Random) -> int:
        residents.append(server.get("/steadyvsr/state")["residents"])
        return 200

    requests = {"release": lambda _: server.post("/steadyvsr/release", {})[0], "policy": policy, "state": state}
    threads = [threading.Thread(target=repeat, args=item) for item in requests.items()]
    for thread in threads:
        thread.start()
    try:
        for workflow in workflows:
            assert server.run(workflow)["status"]["status_str"] == "success"
    finally:
        over.set()
        for thread in threads:
            thread.join()
    doubled = [seen for seen in residents if len({model["handle"] for model in seen}) < len(seen)]
    return {"answers": answers, "failures": failures, "doubled": doubled}


def test_requests_from_three_threads_while_models_are_unloaded_slowly_break_nothing(
    comfyui_path, started, tmp_path, monkeypatch
):
    monkeypatch.setenv("STEADYVSR_UNLOAD_SECONDS", "0.2")
    monkeypatch.setenv("STEADYVSR_CAPACITY", "6000000")  # no two of the three models, whose sizes are 2.3 to 3.7 MB
    turns = start(started, comfyui_path, tmp_path)
    kinds, policies = itertools.cycle(("model", "clip", "vae")), itertools.cycle(("keep", "no", "pin", "keep"))
    workflows = [turns.workflow(next(kinds), keep=next(policies)) for _ in range(HAMMERED_PROMPTS)]
    seen = hammered(turns, workflows)
    assert seen["failures"] == [] and seen["doubled"] == []
    assert min(len(given) for given in seen["answers"].values()) >= HAMMERED_PROMPTS
    assert set(seen["answers"]["release"]) == {200}
    assert set(seen["answers"]["policy"]) <= {200, 404}, "404: gone since"
    assert "Traceback" not in turns.server.log.read_text()
    turns.server.post("/steadyvsr/release", {})
    turns.press(unload_models=True, free_memory=True)
    assert turns.listed() == [] and turns.kept() == {}
    turns.run("model")
    turns.press(unload_models=True, free_memory=True)
    assert turns.listed() == [B] and turns.kept()[B]["listed"] == 1
    turns.run("clip")  # the worker is alive
