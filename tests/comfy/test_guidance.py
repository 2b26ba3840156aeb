"""Guidance Memory and Lean Sampling inside a real ComfyUI: calls, batches, peaks, and what other nodes still see.

The states are observed by guidance_session.py, which runs in ComfyUI's own process.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("guidance_session.py",)


@pytest.mark.parametrize("name", ["GuidanceMemory", "LeanSampling"])
def test_schema_ids_are_the_parameters_of_execute_and_each_has_a_tooltip(observed, name):
    seen = scenario(observed, "schema")[name]
    assert seen["inputs"] == seen["parameters"] and seen["without_tooltip"] == []


@pytest.mark.parametrize(("mode", "batches"), [("off", [1, 1]), ("sequential", [1, 1, 1, 1]), ("batched", [2, 2])])
def test_calls_and_batches_of_two_steps(observed, mode, batches):
    seen = scenario(observed, "calls")[mode]
    assert seen["batches"] == batches


@pytest.mark.parametrize("mode", ["off", "sequential", "batched"])
def test_a_foreign_function_around_the_model_works_before_and_after_the_node(observed, mode):
    seen = scenario(observed, "calls")[mode]
    assert seen["batches_foreign_later"] == seen["batches"] and seen["again"] == 0


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_the_result_is_that_of_stock_guidance(observed, mode):
    assert scenario(observed, "calls")["cfg_matters"] > 1e-3
    assert scenario(observed, "calls")[mode]["same_as_stock"] <= 1e-5


def test_off_gives_the_positive_prompt_alone(observed):
    seen = scenario(observed, "calls")["off"]
    assert seen["same_as_positive"] <= 1e-5 and seen["same_as_stock"] > 1e-3


def test_a_second_choice_replaces_the_first_and_the_input_is_not_changed(observed):
    seen = scenario(observed, "calls")
    assert seen["replaced"] == [2, 2] and seen["untouched"] == [0]


def test_an_unknown_mode_is_refused(observed):
    assert "expected a mode of off, sequential, batched; got 'half'" in scenario(observed, "calls")["unknown"]


def test_a_foreign_batch_function_keeps_its_effect(observed):
    seen = scenario(observed, "foreign_batch_function")
    assert seen["effect"] > 1e-3
    assert seen["sequential"]["difference"] <= 1e-5 and seen["sequential"]["batches"] == [1, 1, 1, 1]
    assert seen["off"]["batches"] == [1, 1]


@pytest.mark.parametrize(
    "name",
    ["sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "area", "mask", "hooks"],
)
def test_patches_and_conditions_of_other_nodes_keep_their_effect(observed, name):
    seen = scenario(observed, "composition")[name]
    assert seen["effect"] > 1e-3
    assert seen["sequential"] <= 1e-5 and seen["off"] <= 1e-5
    assert seen["calls"] >= 4


@pytest.mark.parametrize("name", ["sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"])
def test_sequential_stays_at_batch_one_beside_functions_of_other_nodes(observed, name):
    assert scenario(observed, "composition")[name]["largest_batch"] == 1


@pytest.mark.parametrize("mode", ["sequential", "off"])
def test_a_negative_that_another_node_evaluates_alone_is_computed(observed, mode):
    seen = scenario(observed, "evaluated_apart")[mode]
    assert seen["difference"] <= 1e-5 and seen["batches"] == [1, 1, 1, 1]
    assert len(seen["said"]) == (mode == "off")


@pytest.mark.parametrize("mode", ["sequential", "off"])
def test_three_conditions_are_all_computed_and_off_says_so_once(observed, mode):
    seen = scenario(observed, "three_conditions")[mode]
    assert seen["difference"] <= 1e-5 and seen["batches"] == [1] * 6
    assert len(seen["said"]) == (mode == "off")


def test_sequential_and_off_need_at_most_three_fifths_of_the_batched_peak(observed):
    seen = scenario(observed, "peaks")
    assert seen["batched"] > 30 << 20
    assert seen["sequential"] <= 0.6 * seen["batched"] and seen["off"] <= 0.6 * seen["batched"]


def test_cleanings_follow_the_choice(observed):
    seen = scenario(observed, "cleanings")
    stock = seen["never"]["during"]  # what ComfyUI does by itself around a run
    assert seen["never"]["steps"] == 2
    assert seen["every step"]["during"] - stock == 2
    assert seen["pressure"]["during"] - stock == 0
    assert seen["pressure full"]["during"] - stock == 2


@pytest.mark.parametrize(
    ("case", "words"), [("every step", "2 cleanings in 2 steps"), ("pressure", "0 cleanings in 2 steps")]
)
def test_the_cost_is_said_when_sampling_is_over(observed, case, words):
    receipt = scenario(observed, "cleanings")[case]["receipt"]
    assert receipt.startswith(words) and " s in all" in receipt


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("every step", "Lean Sampling: 2 cleanings in 2 steps"),
        ("pressure", "Lean Sampling: 0 cleanings in 2 steps"),
        ("pressure full", "Lean Sampling: 2 cleanings in 2 steps"),
    ],
)
def test_the_cost_stands_in_the_ledger(observed, case, words):
    (mark,) = scenario(observed, "cleanings")[case]["marks"]
    assert mark.startswith(words) and " s in all" in mark


def test_never_leaves_no_mark(observed):
    assert scenario(observed, "cleanings")["never"]["marks"] == []


def test_a_memory_report_after_sampling_says_the_cost(observed):
    (line,) = scenario(observed, "cleanings")["memory report"]
    assert "Lean Sampling: 2 cleanings in 2 steps" in line and "cpu:0" in line


def test_a_card_that_cannot_be_read_is_never_cleaned_under_pressure_and_that_is_said(observed):
    line = scenario(observed, "cleanings")["unreadable"]
    assert line.startswith("0 cleanings in 2 steps") and "could not be read after 2 of them" in line
