"""The memory panel's routes and the panel itself in a real ComfyUI: what the buttons do to real models."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from steadyvsr.tests.comfy.server import Server, base_folder
from steadyvsr.tests.comfy.test_flashvsr import WORKFLOW

pytestmark = pytest.mark.comfy

SLOW_COLLECTION = """
import gc
import sys
import time

collect = gc.collect


def slow(*arguments):
    # Once: the collection at the end of the first press.
    if sys._getframe(1).f_code.co_name == "prompt_worker":
        gc.collect = collect
        time.sleep(3)
    return collect(*arguments)


class SlowCollection:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "plan", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"turn": ("INT", {"default": 0})}}

    def plan(self, turn):
        gc.collect = slow
        return {}


NODE_CLASS_MAPPINGS = {"Test_SlowCollection": SlowCollection}
"""
NETWORKS = ["CausalLQ4xProjection", "TCDecoder", "Transformer"]
SETTLE_SECONDS = 30


def workflow(keep: str) -> dict:
    changed = json.loads(json.dumps(WORKFLOW))
    changed["2"]["inputs"]["keep_loaded"] = keep
    return changed


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Server]]:
    started: dict[Path, Server] = {}
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture
def server(servers, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    if comfyui_path not in servers:
        base = base_folder(tmp_path_factory.mktemp("panel"))
        (base / "custom_nodes" / "slow_collection.py").write_text(SLOW_COLLECTION)
        servers[comfyui_path] = Server(comfyui_path, base)
        servers[comfyui_path].wait()
    running = servers[comfyui_path]
    running.post("/steadyvsr/release", {})
    pressed(running)
    assert models(running) == {}
    return running


def pressed(server: Server) -> None:
    """Presses ComfyUI's button and waits until the worker has acted on both flags."""

    def stages(after: int = 0) -> list[tuple[int, str]]:
        looks = server.get("/steadyvsr/snapshots")["snapshots"]
        return [(look["press"], look["stage"]) for look in looks if look["press"] > after]

    before = max([number for number, _ in stages()], default=0)
    assert server.post("/free", {"unload_models": True, "free_memory": True})[0] == 200

    def heard() -> bool:
        # The two flags are set one after the other. The worker may wake between them: it acts twice then, or does not
        # hear the second; the reset belongs to that one.
        seen = [stage for _, stage in stages(before)]
        return "post-reset" in seen and seen[-1] == "post-collect"

    settled(heard, "the end of the press")
    time.sleep(0.5)
    settled(lambda: stages()[-1][1] == "post-collect", "the end of a second press")


def settled(condition, what: str) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.2)


def models(server: Server) -> dict[str, dict]:
    return {model["name"]: model for model in server.get("/steadyvsr/state")["residents"]}


def test_a_kept_model_stays_through_both_buttons_and_goes_after_release(server):
    assert server.run(workflow("keep"))["status"]["status_str"] == "success"
    loaded = models(server)
    assert sorted(loaded) == NETWORKS and all(m["bytes"] == m["size"] > 0 for m in loaded.values())
    assert {m["policy"] for m in loaded.values()} == {"keep"}
    pressed(server)
    assert {name: m["bytes"] for name, m in models(server).items()} == {n: m["bytes"] for n, m in loaded.items()}
    press = server.get("/steadyvsr/snapshots")["snapshots"][-4:]
    assert [look["stage"] for look in press] == ["pre-unload", "post-unload", "post-reset", "post-collect"]
    assert {look["caller"] for look in press} == {"button"}
    assert all(look["kept"][0]["listed"] == 3 and look["kept"][0]["dead"] == 0 for look in press)
    card = server.get("/steadyvsr/receipts")["receipts"][0]
    assert card["title"] == "Free memory" and [line["stayed"] for line in card["models"]] == [True] * 3
    status, answer = server.post("/steadyvsr/release", {})
    assert status == 200 and answer["receipt"]["verdict"] == "DONE"
    assert server.post("/steadyvsr/free", {"unload_models": True, "free_memory": True})[0] == 200
    settled(lambda: models(server) == {}, "the end of the released model")


def test_a_model_that_nobody_keeps_goes_with_the_button(server):
    server.run(workflow("no"))
    assert sorted(models(server)) == NETWORKS
    server.post("/steadyvsr/free", {"unload_models": True, "free_memory": True})
    settled(lambda: models(server) == {}, "the end of the models")


def test_offload_answers_with_a_receipt_that_becomes_the_measured_one(server):
    server.run(workflow("keep"))
    transformer = models(server)["Transformer"]
    status, answer = server.post("/steadyvsr/offload", {"handle": transformer["handle"]})
    assert status == 200 and answer["receipt"]["verdict"] == "PENDING"
    id = answer["receipt"]["id"]

    def card() -> dict:
        return next(card for card in server.get("/steadyvsr/receipts")["receipts"] if card["id"] == id)

    settled(lambda: card()["verdict"] != "PENDING", "the measured receipt")
    # On the CPU a network rests where it computes, and the receipt says so.
    assert card()["verdict"] == "CANNOT_OFFLOAD" and "also where it rests" in card()["line"]
    assert transformer["movable"] is False
    assert server.run(workflow("keep"))["status"]["status_str"] == "success"


def test_a_policy_can_be_changed_from_outside_the_graph(server):
    server.run(workflow("no"))
    entry = models(server)["Transformer"]
    assert entry["policy"] == "no"
    status, _ = server.post("/steadyvsr/policy", {"id": entry["id"], "policy": "pin"})
    assert status == 200 and models(server)["Transformer"]["policy"] == "pin"


def test_the_ram_card_holds_the_numbers_of_the_machine(server):
    (ram,) = [device for device in server.get("/steadyvsr/state")["devices"] if device["device"] == "RAM"]
    assert 0 < ram["used"] < ram["total"]
    parts = ram["parts"]
    assert sum(parts.values()) == pytest.approx(ram["total"], rel=1e-6)


def test_a_press_that_comes_while_comfyui_collects_garbage_is_heard_without_a_panel(server):
    def presses() -> int:
        looks = server.get("/steadyvsr/snapshots")["snapshots"]
        return max([look["press"] for look in looks if look["stage"] == "post-collect"], default=0)

    assert server.run({"1": {"class_type": "Test_SlowCollection", "inputs": {"turn": 1}}})["status"]["completed"]
    before = presses()
    server.post("/free", {"unload_models": True})
    time.sleep(1)
    assert presses() == before, "ComfyUI still collects"
    server.post("/free", {"unload_models": True})
    settled(lambda: presses() >= before + 2, "the second press")


REFUSED = [
    ("/steadyvsr/release", {"ids": ["nothing"]}, 404),
    ("/steadyvsr/release", {"ids": "all"}, 400),
    ("/steadyvsr/release", {"ids": [{"a": 1}]}, 400),
    ("/steadyvsr/release", {"ids": [None]}, 400),
    ("/steadyvsr/policy", {}, 400),
    ("/steadyvsr/policy", {"id": 3, "policy": "keep"}, 400),
    ("/steadyvsr/policy", {"id": "nothing", "policy": "keep"}, 404),
    ("/steadyvsr/policy", {"id": "x", "policy": "forever"}, 400),
    ("/steadyvsr/offload", {"handle": "../../etc/passwd"}, 404),
    ("/steadyvsr/offload", {}, 400),
    ("/steadyvsr/watch", {"client": 3, "open": True}, 400),
    ("/steadyvsr/free", {"unload_models": "yes"}, 400),
    ("/steadyvsr/free", {}, 400),
    ("/steadyvsr/settings", {"warn_percent": 300}, 400),
    ("/steadyvsr/settings", {"kept_ram_gib": -1}, 400),
    ("/steadyvsr/policy", b"{not json", 400),
    ("/steadyvsr/policy", b"[1, 2]", 400),
]


@pytest.mark.parametrize(("route", "body", "status"), REFUSED, ids=[f"{r[11:]} {b}"[:40] for r, b, _ in REFUSED])
def test_what_is_wrong_is_refused_in_words(server, route, body, status):
    got, answer = server.post(route, body)
    assert got == status and answer["error"]


@pytest.mark.parametrize("route", ["release", "policy", "offload", "free", "settings", "watch"])
def test_nothing_is_changed_by_reading(server, route):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}/steadyvsr/{route}", timeout=10)
    assert refused.value.code in (404, 405)


def test_the_need_of_a_run_is_predicted_before_it(server):
    asked = {"model_set": "nano (embedded)", "precision": "fp32", "width": 48, "height": 32, "scale": 4.0}
    small = server.post("/steadyvsr/predict", asked)[1]
    large = server.post("/steadyvsr/predict", {**asked, "width": 480, "height": 320, "budget_gb": 0.01})[1]
    assert 10_000_000 < small["predicted"] < large["predicted"]
    assert small["advice"] == "" and small["budget"] is None
    assert large["budget"] == int(0.01 * 2**30) and "kv_ratio" in large["advice"]
    assert server.post("/steadyvsr/predict", {**asked, "model_set": "never loaded"})[1]["predicted"] is None
    for wrong in ({"width": -3}, {"scale": 1e300}, {"precision": "fp1"}, {"width": "wide"}):
        assert server.post("/steadyvsr/predict", {**asked, **wrong})[0] == 400


def test_nothing_that_the_routes_say_names_a_path(server):
    server.run(workflow("keep"))
    for route in ("state", "receipts", "ledger"):
        assert os.sep + "flashvsr" not in json.dumps(server.get(f"/steadyvsr/{route}"))
        assert "assets" not in json.dumps(server.get(f"/steadyvsr/{route}"))
