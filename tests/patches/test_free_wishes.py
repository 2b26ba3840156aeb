"""Wishes are read where a prompt begins, policies from the panel hold until then, and idle models make room.

The scenarios of free_wishes.py run in processes of their own: on the double of ComfyUI always, and on each checkout of
COMFYUI_PATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("free_wishes.py")


@pytest.fixture(scope="module")
def observed(comfyui_or_double: Path | None) -> dict:
    return played(SCRIPT, comfyui_or_double)


def scenario(observed: dict, name: str) -> Any:
    assert observed[name]["errors"] == []
    return observed[name]["seen"]


def test_the_strongest_wish_of_a_prompt_holds_also_where_its_loader_is_cached(observed):
    """The second and the fourth prompt, which have the weaker wish alone, are followed by one with both, and by the
    first again."""
    assert [seen["B"] for seen in scenario(observed, "cached")["policies"]] == ["keep", "no", "keep", "keep"]


def test_after_a_release_the_next_prompt_s_keep_works_again(observed):
    seen = scenario(observed, "released")
    assert [policy["B"] for policy in seen["policies"]] == ["no", "keep"]
    assert (seen["alive"], seen["intact"]) == ("-/B", True)


def test_a_model_that_every_prompt_uses_is_not_the_first_to_go(observed):
    assert scenario(observed, "used") == {"moved": True, "owned": "B"}


def test_a_kept_model_is_not_in_use_after_its_prompt_nor_beside_others(observed):
    """ComfyUI's ControlNet loads again what is in use."""
    seen = scenario(observed, "in use")
    assert seen["after"] == "" and "B" not in seen["within"] + seen["end"] and "Y" in seen["within"]


def test_between_two_nodes_kept_models_of_other_prompts_yield_ram(observed):
    seen = scenario(observed, "short of RAM")
    assert (seen["owned"], seen["end"], seen["alive"]) == (["BCD", "BD"], "BD", "BD/BD")


def test_a_value_may_die_between_two_reads(observed):
    assert scenario(observed, "dying") == {"no": "", "keep": "B", "pin": "B"}


def test_a_prompt_without_a_loader_of_ours_puts_wrappers_back(observed):
    assert scenario(observed, "healed") == {"status": ["replaced", "on top"], "after": "B/B"}


def test_pages_that_the_driver_takes_are_no_loss_and_pin_is_not_promised(observed):
    seen = scenario(observed, "pages")
    assert (seen["dynamic"], seen["not dynamic"], len(seen["off"])) == (0, 1, 1)
