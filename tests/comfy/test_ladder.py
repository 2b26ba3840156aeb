"""The upscale node in a real ComfyUI on a card that runs out of memory: what it tries, what it keeps, what it says.

See test_flashvsr.py for COMFYUI_PATH and COMFYUI_PYTHON; the states are observed by ladder_session.py.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("ladder_session.py",)
CARDS = ("books", "simcard")
RUNGS = ["KV cache in RAM", "decoder in smaller chunks", "decoder strips", "spatial tiles"]
HELPS = {
    "project": [RUNGS[0], RUNGS[1], RUNGS[3]], "transform": [RUNGS[0], RUNGS[1], RUNGS[3]], "decode": RUNGS[:3],
}  # fmt: skip
CASES = [(phase, rung) for phase, rungs in HELPS.items() for rung in rungs]


def test_every_run_sums_up_its_memory_with_the_source_of_each_number(observed, card):
    seen = scenario(observed, "summary")
    memory = seen["report"]["memory"]
    assert seen["phase"] == "FlashVSR" and seen["marks"] >= 1
    predicted = memory["predicted"]
    assert predicted["bytes"] == predicted["weights_bytes"] + predicted["activations_bytes"]
    assert predicted["weights_bytes"] == seen["report"]["weights_loaded_bytes"] > 0
    for moment in ("before", "peak", "after"):
        figures = memory[moment].values()
        # A card of its own is empty before and after the run, and a zero is a figure, too.
        assert any(figure["bytes"] for figure in figures) or (card == "simcard" and moment != "peak")
        assert any(figure["bytes"] is not None for figure in figures)
        assert all(figure["source"] for figure in figures if figure["bytes"] is not None)
        # By the books nothing counts tensors here, and nothing is guessed.
        assert (memory[moment]["allocated"]["bytes"] is None) == (card == "books")
    assert memory["attempts"] == [] and memory["plan_at_end"] == "everything on the device"


@pytest.mark.parametrize(("phase", "rung"), CASES)
def test_a_phase_that_does_not_fit_goes_down_to_the_rung_that_does(observed, phase, rung):
    seen = scenario(observed, "rungs")[f"{phase}: {rung}"]
    expected = HELPS[phase][: HELPS[phase].index(rung) + 1]
    assert [(item["phase"], item["frame"], item["tried"]) for item in seen["attempts"]] == [
        (phase, 21, tried) for tried in expected
    ]
    assert seen["frames"] == 25 and seen["finite"] and seen["shape"] == [25, 256, 384, 3]
    assert seen["live_before"] == seen["live_after"] > 0
    assert seen["before_failure"] == 0.0
    if rung == "spatial tiles":
        assert 30 < seen["psnr"] < 150
    else:
        assert seen["largest"] < 1e-5


def test_another_model_is_unloaded_before_the_plan_changes(observed):
    seen = scenario(observed, "unload")
    assert "Other" in seen["before"] and "Other" not in seen["after"] and len(seen["after"]) == 3
    assert [item["tried"] for item in seen["attempts"]] == ["unload others"]
    assert seen["plan"] == "everything on the device" and seen["same"] is True


def test_at_the_bottom_the_error_holds_the_table_of_attempts_and_nothing_is_held(observed):
    seen = scenario(observed, "bottom")
    assert seen["kind"] == "OutOfMemoryError"
    lines = seen["message"].splitlines()
    assert lines[0].startswith("FlashVSR Upscale: the device is out of memory")
    assert [line.split()[0] for line in lines[2:6]] == ["transform"] * 4
    for line, words in zip(lines[2:6], [*HELPS["transform"], "error"], strict=True):
        assert line.rstrip().endswith(words)
    assert seen["before"] == seen["after"] > 0 and seen["same"] is True


def test_an_interrupt_in_the_middle_of_the_ladder_leaves_at_once(observed):
    seen = scenario(observed, "interrupt")
    assert seen["raised"] == "InterruptProcessingException"
    assert seen["plans"] == ["everything on the device"] and seen["before"] == seen["after"]


def test_a_budget_takes_the_first_plan_that_is_predicted_to_fit(observed, card):
    seen = scenario(observed, "budgets")
    assert seen["1.05"]["plan"] == "everything on the device" and seen["1.05"]["largest"] == 0.0
    # Where ComfyUI computes in RAM, nothing is gained by keeping the cache there.
    assert {"books": "spatial tiles of 256", "simcard": "KV cache in RAM"}[card] in seen["0.97"]["plan"]
    assert seen["0.97"]["predicted"] <= seen["0.97"]["budget"]
    assert "expected a budget_gb in which a plan fits" in seen["0.55"]["error"] and "Predicted" in seen["0.55"]["error"]
    assert "at least the model's own weights" in seen["below_weights"]
    assert seen["tile"].startswith("FlashVSR Upscale: ") and "multiple of 128" in seen["tile"]
    assert seen["tiled"]["plan"] == "spatial tiles of 256" and 30 < seen["tiled"]["psnr"] < 150


def test_cleaning_follows_the_choice_and_lines_come_on_demand(observed):
    seen = scenario(observed, "cleaning")
    assert {name: item["cleanings"]["times"] for name, item in seen.items()} == {
        "never": 0, "every step": 1, "pressure, full": 1, "pressure, empty": 0,
    }  # fmt: skip
    assert all(item["calls"] == item["cleanings"]["times"] for item in seen.values())
    assert [len(item["lines"]) for item in seen.values()] == [0, 1, 0, 0]
