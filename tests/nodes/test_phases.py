"""What a gate takes off the card, and what its limits stop before it, on the double of ComfyUI and in each real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from steadyvsr.tests.session.observed import scenario

SUBJECT = "phases"
WEIGHTS = (64 * 64 + 64) * 4
DONE = "no error"


@pytest.mark.parametrize("kind", ["CLIP_VISION", "CONTROL_NET", "GLIGEN"])
def test_a_gate_offloads_whatever_has_a_patcher(observed, kind):
    assert scenario(observed, "phases kinds")[kind] == [WEIGHTS, 0, DONE, False]


def test_a_gate_takes_a_model_that_comfyui_does_not_manage_and_says_where_it_rests(observed):
    assert scenario(observed, "phases kinds")["UPSCALE_MODEL"] == [0, 0, DONE, True]


def test_a_gate_refuses_what_is_no_model(observed):
    assert "expected a model; got str on a model input" in scenario(observed, "phases kinds")["no model"]


@pytest.mark.parametrize(
    ("scope", "left"),
    [
        ("these", ["kept", "other", "pinned"]), ("everything else too", ["kept", "pinned"]), ("everything", []),
        ("None", ["kept", "other", "pinned"]),
    ],
)  # fmt: skip
def test_offload_says_what_else_leaves_the_card(observed, scope, left):
    """None is a workflow that was saved before the option was there."""
    assert scenario(observed, "phases scopes")[scope] == left


def test_a_phase_that_takes_more_than_its_gate_allows_stops_while_it_runs(observed):
    first, then = scenario(observed, "phases watched")["before the gate"]
    assert first == DONE
    expected, on_card, model, rest = then.splitlines()
    assert expected.startswith(
        "PhaseLimitExceeded: Phase Gate: expected at most 0.02 MiB (20,000 B) on cpu:0 "
        'during phase "sample"; got a peak of 0.02 MiB (25,640 B) (planted).'
    )
    assert on_card == "on cpu:0 now:" and model == "  0.02 MiB  Network" and rest.endswith("  other tensors")


def test_a_loader_is_watched_for_the_first_gate_that_it_leads_to(observed):
    first, then = scenario(observed, "phases watched")["a loader, before both gates"]
    assert first == DONE and 'phase "sample"' in then


@pytest.mark.parametrize(
    "case",
    [
        "a loader of the next phase, after a larger one",
        "a gate",
        "behind all gates",
        "without a limit",
        "a limit that another node computes",
        "a node that the prompt does not have",
    ],
)
def test_what_belongs_to_no_limited_phase_is_not_stopped(observed, case):
    assert scenario(observed, "phases watched")[case] == [DONE, DONE]


def test_outside_a_prompt_nothing_is_stopped(observed):
    assert scenario(observed, "phases watched")["outside a prompt"] == DONE


def test_a_gate_that_warns_lets_the_phase_go_on_and_says_it_once(observed):
    seen = scenario(observed, "phases watched")
    assert seen["warn"] == [DONE, DONE]
    assert len(seen["warned"]) == 1 and 'during phase "sample"; got a peak' in seen["warned"][0]


def test_a_load_that_will_not_fit_is_said_with_what_is_in_the_way(observed):
    seen = scenario(observed, "phases admitted")["no limit"]
    assert seen["error"] == DONE and seen["loaded"] is True
    (line,) = seen["said"]
    assert line.startswith("loading Transformer on cpu:0: needs 0.02 MiB, 0.01 MiB free (planted), 0.00 MiB short")
    assert line.endswith("in the way: Network (pinned.safetensors, pinned by another workflow) 0.02 MiB (stays)")


def test_a_load_beyond_the_limit_of_its_phase_is_refused_before_it_begins(observed):
    seen = scenario(observed, "phases admitted")["a limit"]
    assert seen["loaded"] is False and "got Transformer, with which 0.03 MiB (33,280 B) would be there" in seen["error"]
    assert "pinned.safetensors" in seen["error"] and "raise peak_gb" in seen["error"]


def test_a_load_beyond_a_limit_that_only_warns_goes_on(observed):
    seen = scenario(observed, "phases admitted")["a limit, warn"]
    assert seen["error"] == DONE and seen["loaded"] is True and "Phase Gate: expected" in seen["said"][-1]


@pytest.mark.parametrize("case", ["it fits", "room"])
def test_nothing_is_said_where_comfyui_can_make_room(observed, case):
    assert scenario(observed, "phases admitted")[case] == {"error": DONE, "said": [], "loaded": True}


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(observe, comfyui_path: Path):
    double, real = observe(None), observe(comfyui_path)
    assert {name: scenario(double, name) for name in double} == {name: scenario(real, name) for name in real}
