"""The example workflow with gates through a real ComfyUI's server, with small models on a simulated card.

The committed file is turned into a prompt here and, where Chromium and playwright are installed, by ComfyUI's own front
end; both must be the same. Then only file names, sizes and steps are replaced, and the server runs it.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
from steadyvsr.tests.comfy.server import ROOT, Server
from steadyvsr.tests.comfy.workflow_files import api_form

pytestmark = pytest.mark.comfy

EXAMPLE = ROOT / "example_workflows" / "seven_phases_with_gates.json"
TWO_KEPT = ROOT / "example_workflows" / "keep_two_models_and_free.json"
SETTLE_SECONDS = 30
GIB = 1 << 30
LARGE_CARD, SMALL_CARD = 24 * GIB, 5_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# phase → (budget_gb, needs_gb, peak_gb) as the file must have them
LIMITS = {
    "load": (1.0, 0.0, -1.0), "LoRA": (5.0, 0.0, -1.0), "text encode": (1.0, 0.0, -1.0),
    "sampling patch": (2.0, 5.0, -1.0), "VAE encode": (2.0, 0.0, 3.0), "sample": (1.0, 0.0, -1.0),
    "VAE decode": (1.0, 0.0, -1.0), "upscale": (1.0, 0.0, -1.0),
}  # fmt: skip
LOADED = {"text encode": ["WanTEModel"], "VAE encode": ["WanVAE"], "sample": ["WAN21"], "VAE decode": ["WanVAE"],
          "upscale": ["CausalLQ4xProjection", "TCDecoder", "Transformer"]}  # fmt: skip
CARD_NODE = """
import sys
from pathlib import Path

sys.path.append({folder!r})  # last: ComfyUI has a `server` of its own
import phases_card


class Card(phases_card.SimulatedCard):
    @property
    def capacity(self):
        return int(Path({capacity!r}).read_text())

    @capacity.setter
    def capacity(self, value):
        pass


phases_card.take_small_models()
phases_card.write_models(Path({base!r}))
Card(0).install()
NODE_CLASS_MAPPINGS = {{}}
"""
FILES = {
    "SteadyVSR_LoadDiffusionModel": {"unet_name": "tiny_wan.safetensors"},
    "SteadyVSR_ApplyLoRA": {"lora_name": "tiny_lora.safetensors"},
    "SteadyVSR_LoadCLIP": {"clip_name1": "tiny_umt5.safetensors"},
    "SteadyVSR_LoadVAE": {"vae_name": "tiny_wan_vae.safetensors"},
    "ImageFromBatch": {"length": 5},
    "ImageScale": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}


class SmallServer(Server):
    """A server whose device is a simulated card; `capacity` is a file that says how large it is."""

    def __init__(self, checkout: Path, base: Path) -> None:
        self.capacity = base / "capacity"
        folder = str(ROOT / "tests" / "comfy")
        node = CARD_NODE.format(folder=folder, capacity=str(self.capacity), base=str(base))
        (base / "custom_nodes" / "simulated_card.py").write_text(node)
        self.capacity.write_text(str(LARGE_CARD))
        super().__init__(checkout, base)


SERVER = SmallServer


def example(server: Server, path: Path = EXAMPLE) -> dict[str, dict]:
    return api_form(json.loads(path.read_text()), server.get("/object_info"))


def small(prompt: dict[str, dict], seed: int, **limits: float) -> dict[str, dict]:
    """The prompt with small files, sizes and steps, and with other limits at every gate if any are given."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] |= FILES.get(node["class_type"], {})
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = seed
        if node["class_type"] == "SteadyVSR_PhaseGate":
            node["inputs"] |= limits
    return prompt


def without_upscale(prompt: dict[str, dict]) -> dict[str, dict]:
    """The seven phases alone: the embedded FlashVSR is larger than the small models, and than a card that holds one."""
    types = {node["class_type"]: id for id, node in prompt.items()}
    upscale, loader = types["SteadyVSR_Upscale"], types["SteadyVSR_LoadFlashVSR"]
    (gate,) = [id for id, node in prompt.items() if node["inputs"].get("phase") == "upscale"]
    frames = prompt[upscale]["inputs"]["image"]
    rest = {id: node for id, node in prompt.items() if id not in (upscale, loader, gate)}
    for node in rest.values():
        node["inputs"] = {name: frames if value == [gate, 0] else value for name, value in node["inputs"].items()}
    return rest


def gate_reports(entry: dict) -> dict[str, dict]:
    """Phase → report of its gate, in the order of the workflow."""
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1][1].get("exception_message")
    shown = [json.loads(output["text"][0]) for output in entry["outputs"].values() if "text" in output]
    return {report["phase"]: report for report in shown if report["node"] == "Phase Gate"}


def test_the_gates_of_the_example_have_the_budgets_of_a_24_gb_card_and_stop_the_workflow(server):
    gates = [node["inputs"] for node in example(server).values() if node["class_type"] == "SteadyVSR_PhaseGate"]
    assert {g["phase"]: (g["budget_gb"], g["needs_gb"], g["peak_gb"]) for g in gates} == LIMITS
    assert {g["on_violation"] for g in gates} == {"error"}


def freed(report: dict) -> list[str]:
    """Names of the models that the gate took off the card."""
    assert {receipt["verdict"] for receipt in report["offloaded"]} <= {"FREED", "NOT_LOADED"}
    return [receipt["name"] for receipt in report["offloaded"] if receipt["verdict"] == "FREED"]


def test_the_example_runs_to_its_video_within_its_own_budgets(server):
    server.capacity.write_text(str(LARGE_CARD))
    reports = gate_reports(server.run(small(example(server), seed=1)))
    assert reports.keys() == LIMITS.keys()
    for phase, report in reports.items():
        budget, needs, peak = (gib * GIB if gib > 0 else None for gib in LIMITS[phase])
        assert report["limits_bytes"] == {"resident": budget, "free": needs, "peak": peak}
        assert report["violations"] == []
        assert sorted(freed(report)) == LOADED.get(phase, []) and report["cards"][0]["resident_bytes"] == 0
    assert reports["sampling patch"]["admission"]["free"] == LARGE_CARD
    assert list((server.log.parent / "output" / "video").glob("SteadyVSR*.mp4"))


def test_the_example_runs_on_a_card_that_holds_one_model_with_nothing_left_after_each_phase(server):
    server.capacity.write_text(str(SMALL_CARD))
    limits = {"budget_gb": 0.0, "needs_gb": SMALL_CARD / GIB - 1e-6, "peak_gb": SMALL_CARD / GIB}
    reports = gate_reports(server.run(without_upscale(small(example(server), seed=2, **limits))))
    assert reports.keys() == LIMITS.keys() - {"upscale"}
    for phase, report in reports.items():
        assert report["violations"] == [] and report["limits_bytes"]["resident"] == 0
        (card,) = report["cards"]
        peak = card["peak"]["allocated"]["bytes"]
        assert freed(report) == LOADED.get(phase, []) and (peak > 0) == (phase in LOADED)
        assert (card["books_bytes"], card["reading"]["allocated"]["bytes"]) == (0, 0)
        assert report["admission"]["free"] == card["reading"]["total"]["bytes"] == SMALL_CARD


def test_a_gate_that_is_exceeded_stops_its_prompt_and_not_the_queue(server):
    server.capacity.write_text(str(SMALL_CARD))
    prompt = without_upscale(small(example(server), seed=3, peak_gb=0.001, needs_gb=0.0))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "error"
    messages = dict(entry["status"]["messages"])["execution_error"]
    assert messages["node_type"] == "CLIPTextEncode", "the node that exceeds the limit, not the gate behind it"
    assert messages["exception_message"].startswith(
        "Phase Gate: expected at most 1.02 MiB (1,073,741 B) on cpu:0 during"
    )
    assert gate_reports(server.run(small(prompt, seed=3, peak_gb=-1.0))).keys() == LIMITS.keys() - {"upscale"}


def test_the_report_at_the_end_has_the_phases_of_this_run_and_a_picture(server):
    server.capacity.write_text(str(SMALL_CARD))
    entry = server.run(without_upscale(small(example(server), seed=4, budget_gb=0.0, needs_gb=0.0)))
    shown = [json.loads(output["text"][0]) for output in entry["outputs"].values() if "text" in output]
    (report,) = [item for item in shown if item["node"] == "Memory Report"]
    ended = [phase["name"] for phase in report["phases"]]
    # The decoder notes a phase of its own inside that of the gate.
    assert set(ended) <= set(LIMITS) and ended[-3:] == ["sample", "VAE decode", "VAE decode"]
    assert any(line.startswith("VAE decode: cpu:0 allocated 0.00 MiB → peak 3.53 MiB") for line in report["text"])
    assert any(image["filename"] for output in entry["outputs"].values() for image in output.get("images", []))


def presses(server: Server) -> list[dict]:
    """The last look at each press of the button, with what was kept then."""
    return [look for look in server.get("/steadyvsr/snapshots")["snapshots"] if look["stage"] == "post-collect"]


def residents(server: Server) -> dict[str, tuple[str, int]]:
    """Network → (policy, bytes on the card) of everything that is loaded or kept."""
    return {m["name"]: (m["policy"], m["bytes"]) for m in server.get("/steadyvsr/state")["residents"]}


def run_and_see_the_press(server: Server, prompt: dict[str, dict]) -> tuple[dict, dict]:
    """The outputs of a prompt and the last look at the press that it asked for."""
    before = len(presses(server))
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    deadline = time.monotonic() + SETTLE_SECONDS
    while len(presses(server)) == before:
        assert time.monotonic() < deadline, "the node's press was never acted on"
        time.sleep(0.2)
    return entry["outputs"], presses(server)[-1]


def test_two_models_stay_through_the_press_at_the_end_of_the_example_and_are_read_once(server):
    server.capacity.write_text(str(LARGE_CARD))
    server.run(small(example(server), seed=5))
    server.post("/free", {"unload_models": True, "free_memory": True})
    prompt = small(example(server, TWO_KEPT), seed=0)
    loads = {}
    for turn in (1, 2):
        outputs, press = run_and_see_the_press(server, prompt)
        assert {model["name"] for model in press["residents"]} == set(), "what nobody keeps is gone"
        kept = {entry["networks"][0]: entry for entry in press["kept"]}
        assert set(kept) == {"WAN21", "WanVAE"} and {entry["policy"] for entry in kept.values()} == {"keep"}
        assert all(entry["size"] > 0 for entry in kept.values())
        assert residents(server) == {"WAN21": ("keep", 0), "WanVAE": ("keep", 0)}
        loads[turn] = {name: (entry["loads"], entry["hits"] >= turn - 1) for name, entry in kept.items()}
        assert press["caller"] == "button" and press["reason"] == "end of the example"
        card = server.get("/steadyvsr/receipts")["receipts"][0]
        freed, stays, *_ = card["line"].split(" · ")
        assert freed.endswith(" MiB left cpu:0: WanTEModel 2.17 MiB") and card["verdict"] == "FREED", card["line"]
        assert sorted(stays.removeprefix("kept: ").split(", ")) == [
            "tiny_wan.safetensors 3.33 MiB in RAM", "tiny_wan_vae.safetensors 3.53 MiB in RAM",
        ]  # fmt: skip
    assert loads[1] == loads[2] == dict.fromkeys(("WAN21", "WanVAE"), (1, True)), "read from the disk once"
    server.post("/steadyvsr/release", {})
    assert not any(policy == "keep" for policy, _ in residents(server).values())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_comfyui_s_front_end_loads_the_example_and_makes_the_same_prompt(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[test]")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("canvas#graph-canvas, canvas", timeout=60_000)
        prompt = page.evaluate(
            """async workflow => {
              const {app} = await import("/scripts/app.js");
              const types = () => window.LiteGraph?.registered_node_types ?? {};
              const known = () => types().SteadyVSR_PhaseGate && types().MarkdownNote;
              for (let tries = 0; tries < 300 && !(app.graph && known()); tries += 1)
                await new Promise(resolve => setTimeout(resolve, 100));
              await app.loadGraphData(workflow);
              return (await app.graphToPrompt()).output;
            }""",
            json.loads(EXAMPLE.read_text()),
        )
        browser.close()
    shown = {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in prompt.items()}
    expected = example(server)
    for node in shown.values():
        node["inputs"].pop("video-preview", None)  # a widget of the front end alone
    assert shown == expected
