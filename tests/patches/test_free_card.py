"""What a press says is what the allocators of the cards count; who holds what should have left is named.

The scenarios of free_card.py run in processes of their own, with two simulated cards that have memory of their own: on
the double of ComfyUI always, and on each checkout of COMFYUI_PATH.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("free_card.py")
MIB = 1 << 20


@pytest.fixture(scope="module")
def pressed(comfyui_or_double: Path | None) -> dict:
    observed = played(SCRIPT, comfyui_or_double)
    if "absent" in observed:
        pytest.skip(f"the simulated card needs {observed['absent']} to be built; found none")
    return observed


def test_what_left_is_what_the_allocator_counts(pressed):
    seen = pressed["freed"]
    assert (seen["before"], seen["after"]) == ([48, 0], [8, 0])
    assert (seen["left"], seen["verdict"], seen["lost"]) == (40 * MIB, "FREED", [])
    assert seen["line"] == "40.00 MiB left simcard:0: A 40.00 MiB · kept: B 8.00 MiB on simcard:0"
    assert seen["by model"] == {"A": 0, "B": 8 * MIB}


def test_weights_that_a_foreign_node_holds_have_not_left_and_it_is_named(pressed):
    """ComfyUI's books are 40 MiB lower, and the allocator is not."""
    seen = pressed["held"]
    assert (seen["before"], seen["after"]) == ([40, 0], [40, 0])
    assert (seen["left"], seen["verdict"]) == (0, "STILL_HELD")
    (receipt,) = seen["receipts"]
    assert (receipt["asked"], receipt["left_tensors"], receipt["device"]) == (40 * MIB, 0, "simcard:0")
    (holder,) = receipt["held"]
    assert (holder["name"], holder["bytes"]) == ("global FOREIGN in module __main__[0]", 40 * MIB)
    assert "asked 40.00 MiB · left the tensors 0.00" in seen["line"] and "40.00 by global FOREIGN" in seen["line"]
    assert "40.00 MiB left" not in seen["line"] and seen["by model"] == {"A": 40 * MIB}


def test_a_kept_model_is_named_with_its_place_wherever_it_rests(pressed):
    line = pressed["in RAM"]["line"]
    assert "2.00 MiB left simcard:0: A" in line
    assert line.endswith("kept: B 8.00 MiB in RAM, C 4.00 MiB on simcard:1"), line


def test_a_press_takes_models_off_every_card(pressed):
    seen = pressed["second card"]
    assert (seen["before"], seen["after"], seen["state"]) == ([6, 24], [4, 16], "BD/ABCD")
    assert "2.00 MiB left simcard:0: A" in seen["line"] and "8.00 MiB left simcard:1: C" in seen["line"]
    assert (seen["left"], seen["verdict"]) == (10 * MIB, "FREED")


def test_a_press_of_an_empty_card_frees_nothing_and_says_so(pressed):
    seen = pressed["nothing"]
    assert seen["line"] == "no model was unloaded · kept: none"
    assert (seen["left"], seen["verdict"], seen["receipts"]) == (0, "NOT_LOADED", [])


def test_results_in_the_node_cache_leave_too(pressed):
    seen = pressed["results"]
    assert (seen["before"], seen["after"], seen["left"]) == ([16, 0], [0, 0], 16 * MIB)
    assert seen["line"] == "no model was unloaded · 16.00 MiB left simcard:0: tensors of no model · kept: none"


def test_every_look_reads_the_cards_and_the_ram(pressed):
    seen = pressed["freed"]
    assert seen["devices"] == [["simcard:0", "simcard:1", "cpu"]] * 4 and seen["ram"] > 0
