"""Promises of the pack in a real ComfyUI whose cards have memory of their own: an allocator tells what is true.

The states are observed by simcard_session.py, which runs in ComfyUI's own process; test_phases.py, test_loaders.py,
test_doctor.py and others run their sessions on these cards, too.
"""

from __future__ import annotations

import re

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("simcard_session.py",)
CARDS = ("simcard",)
WAN_BYTES, FOREIGN_BYTES = 3_495_584, 2 << 20
RUNS = 10
ROUNDING = 1.02
"""How much more an allocator counts than the tensors hold, at most: it rounds each of them up."""
SPARE = 512
"""Of one tensor that is rounded up."""
both_cards = pytest.mark.parametrize("card", ["simcard", "simcard:2"])


@both_cards
@pytest.mark.parametrize("holder", ["nobody", "the largest weight", "all weights"])
def test_what_a_press_says_left_is_what_the_allocators_lost(observed, card, holder):
    seen = scenario(observed, "presses")[holder]
    wanted = [WAN_BYTES - seen["held"], FOREIGN_BYTES][: len(seen["lost"])]
    for lost, bytes in zip(seen["lost"], wanted, strict=True):
        assert bytes <= lost <= ROUNDING * bytes + SPARE
    assert seen["told"]["left_bytes"] == sum(seen["lost"]), seen["line"]
    assert seen["told"]["verdict"] == ("FREED" if holder == "nobody" else "STILL_HELD")


@both_cards
@pytest.mark.parametrize("holder", ["nobody", "the largest weight", "all weights"])
def test_a_press_moves_no_kept_model(observed, card, holder):
    assert scenario(observed, "presses")[holder]["kept_stays"] is True


@pytest.mark.parametrize("holder", ["the largest weight", "all weights"])
def test_a_press_after_which_weights_are_held_says_who_holds_them(observed, holder):
    line = scenario(observed, "presses")[holder]["line"]
    assert "STILL_HELD" in line and "global HELD in module" in line


@pytest.mark.parametrize("policy", ["keep", "pin"])
def test_of_a_kept_model_no_byte_moves_in_ten_runs_with_presses_between_them(observed, policy):
    seen = scenario(observed, "kept")[policy]
    assert seen["errors"] == [None] * RUNS and seen["reads"] == 1
    assert seen["runs"] == [[WAN_BYTES, 0], *[[0, 0]] * (RUNS - 1)]
    assert WAN_BYTES <= seen["live"][0] <= ROUNDING * WAN_BYTES


def check_sweep(seen, tolerance):
    """Frames equal, or within what spatial tiles and smaller numbers differ by, or an error with the table."""
    assert 0 <= seen["difference"] < tolerance and seen["left"] == 0
    kinds = []
    for step in seen["steps"]:
        assert step["left"] == 0
        if "refused" in step:
            assert re.search(
                r"^(VAE|FlashVSR) .+: (the device is out of memory, and nothing|expected )", step["refused"]
            )
            assert re.search(r" then *\n", step["refused"]) or "Predicted" in step["refused"], "no table"
            kinds.append("refused")
        else:
            assert step["difference"] >= 0
            kinds.append("smaller" if step["tried"] else "equal")
            assert step["tried"] or step["difference"] < tolerance
    assert kinds[0] == "equal" and kinds[-1] == "refused"
    ranks = [["equal", "smaller", "refused"].index(kind) for kind in kinds]
    assert ranks == sorted(ranks)


def test_a_flashvsr_run_on_ever_smaller_cards_gives_its_frames_or_the_table(observed):
    check_sweep(scenario(observed, "flashvsr"), 1e-4)


@pytest.mark.parametrize("kind", ["wan", "sd"])
def test_vae_tiles_on_ever_smaller_cards_give_the_image_or_the_table(observed, kind):
    check_sweep(scenario(observed, "vae_tiles")[kind], 1e-3)


@pytest.mark.parametrize("run", ["FlashVSR", "VAE"])
def test_a_pinned_model_stays_on_the_card_while_a_run_beside_it_goes_down_its_ladder(observed, run):
    seen = scenario(observed, "pinned")[f"{run} pin"]
    assert seen["tried"], "the card was not too small"
    assert seen["beside"] == seen["size"]
    assert seen["after"] == seen["on_card"] == seen["size"]


SETTINGS = ["default", "--cache-none", "--cache-lru", "--disable-smart-memory", "--highvram"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_rerun_is_equal_to_the_bit_and_a_press_leaves_the_card_as_it_was(observed, setting):
    seen = scenario(observed, "reruns")[setting]
    assert seen["same"] == [True, True]
    assert seen["left"][0] == seen["left"][1] == 0


def test_thirty_alternating_prompts_leave_the_card_exactly_flat(observed):
    series = scenario(observed, "flat")["alternating"]
    assert len(series) == 30
    assert len(set(series[2::2])) == len(set(series[3::2])) == 1, series


def test_ten_cancelled_prompts_leave_the_card_exactly_flat(observed):
    steps, results, series = zip(*scenario(observed, "flat")["cancelled"], strict=True)
    assert set(steps) == {1} and set(results) == {0}
    assert len(set(series[1:])) == 1, series


def test_ten_prompts_that_run_out_of_memory_leave_the_card_exactly_flat(observed):
    seen = scenario(observed, "flat")
    errors, series = zip(*seen["failing"], strict=True)
    assert all(error and "out of memory" in error for error in errors)
    assert len(set(series)) == 1, series
    assert seen["works"] is True and seen["left"] == 0
