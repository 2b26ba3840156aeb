"""What a loader's execution moves, on the double of ComfyUI and in each real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from steadyvsr.tests.session.observed import scenario

SUBJECT = "loaders"
WEIGHTS = (64 * 64 + 64) * 4


@pytest.mark.parametrize("policy", ["keep", "pin"])
def test_no_byte_of_a_kept_model_moves_over_ten_runs_with_presses_between(observed, policy):
    seen = scenario(observed, "loaders ten runs")[policy]
    assert seen["weights"] == WEIGHTS and seen["source"] == "memory: nothing was read"
    assert seen["runs"] == [WEIGHTS, *[0] * 9]


def test_a_model_that_nobody_keeps_goes_with_every_press(observed):
    """Its network dies, so nothing is copied back: it is only loaded anew."""
    assert scenario(observed, "loaders ten runs")["no"]["runs"] == [WEIGHTS] * 10


@pytest.mark.parametrize("policy", ["no", "keep"])
def test_what_an_execution_put_on_the_card_is_offloaded_by_it(observed, policy):
    seen = scenario(observed, "loaders put there")[f"{policy} True"]
    assert (seen["on the card"], seen["receipts"]) == (0, 1)


def test_a_pinned_model_stays_where_its_own_loader_put_it(observed):
    seen = scenario(observed, "loaders put there")["pin True"]
    assert (seen["on the card"], seen["receipts"]) == (WEIGHTS, 0)


@pytest.mark.parametrize("policy", ["no", "keep", "pin"])
def test_a_model_that_was_on_the_card_before_stays_and_the_report_says_so(observed, policy):
    seen = scenario(observed, "loaders put there")[f"{policy} False"]
    assert (seen["after another loader"], seen["stays"]) == (WEIGHTS, WEIGHTS)


@pytest.mark.parametrize(("policy", "left"), [("no", 0), ("keep", 3)])
def test_a_lora_file_that_nobody_keeps_goes_with_the_node_cache(observed, policy, left):
    assert scenario(observed, "loaders lora files")[policy] == [3, left]


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(observe, comfyui_path: Path):
    names = ("loaders ten runs", "loaders put there", "loaders lora files")
    double, real = observe(None), observe(comfyui_path)
    assert {name: scenario(double, name) for name in names} == {name: scenario(real, name) for name in names}
