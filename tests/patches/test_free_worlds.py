"""Free-memory buttons, errors, interrupts and pressure, with kept, pinned and other models: who stays, who goes.

The scenarios of free_worlds.py run in processes of their own: on the double of ComfyUI always, and on each checkout
of COMFYUI_PATH. The column "stock" is ComfyUI without us; it shows that every scenario takes kept models away unless
something is done, and that the double does what ComfyUI does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("free_worlds.py")
OURS = ("keep", "pin")
STAGES = ("pre", "unloaded", "reset", "collected", "end")


@pytest.fixture(scope="module")
def observed(comfyui_or_double: Path | None) -> dict:
    """Column → scenario → what was seen, on the double (None) or a checkout."""
    return played(SCRIPT, comfyui_or_double)


@pytest.fixture(params=OURS)
def column(request: pytest.FixtureRequest) -> str:
    return request.param


def names(state: str) -> tuple[set[str], set[str]]:
    listed, alive = state.replace("+dead", "").replace("-", "").split("/")
    return set(listed), set(alive)


def at_least(press: dict[str, str], kept: str, stages: tuple[str, ...] = STAGES) -> None:
    """The kept models live at every stage, with no second copy, and are listed but for a moment after a collection."""
    for stage in stages:
        listed, alive = names(press[stage])
        assert set(kept) <= alive, (stage, press)
        assert set(kept) <= listed or stage == "collected", (stage, press)
        for part in press[stage].split("/"):
            assert len(set(part)) == len(part) or "+" in part, (stage, press)


@pytest.mark.parametrize("scenario", ["S1", "S4a", "S4b"])
def test_both_buttons_take_a_and_leave_b_and_c_press_after_press(observed, column, scenario):
    found = observed[column][scenario]
    seen = found["seen"]
    for press in ("first", "second", "third"):
        at_least(seen[press], "BC")
        assert seen[press]["end"] == "BC/BC"
    assert seen["first"]["pre"] == seen["again"] == "ABC/ABC"
    assert names(seen["first"]["unloaded"])[0] == set("BC")
    assert (found["reads"]["B"], found["reads"]["C"]) == (1, 1)
    gone = observed["stock"][scenario]
    assert gone["seen"]["first"]["end"] == gone["seen"]["third"]["end"] == "-/-" and gone["reads"]["B"] >= 2


def test_a_lora_leaves_nothing_in_a_kept_model(observed, column):
    seen = observed[column]["S4a"]["seen"]
    assert seen["patched"] is True and seen["residue"] is False


def test_a_kept_model_whose_clone_dies_in_a_cycle_gets_its_place_back(observed, column):
    press = observed[column]["S4b"]["seen"]["first"]
    assert press["collected"] == "C+dead/BC" and press["end"] == "BC/BC"


def test_a_press_is_looked_at_four_times(observed, column):
    seen = observed[column]["S1"]["seen"]
    assert seen["stages"] == ["pre-unload", "post-unload", "post-reset", "post-collect"]
    assert seen["callers"] == ["button"]


def test_when_all_are_kept_none_is_touched(observed, column):
    found = observed[column]["S2"]
    assert [found["seen"]["first"][stage] for stage in STAGES] == ["DE/DE"] * 5
    assert found["seen"]["again"] == "DE/DE" and found["reads"] == {"D": 1, "E": 1}
    assert observed["stock"]["S2"]["seen"]["first"]["unloaded"] == "-/DE"


def test_unload_models_alone_takes_a_off_and_leaves_it_in_the_node_cache(observed, column):
    found = observed[column]["S3"]
    assert [found["seen"]["first"][stage] for stage in STAGES[1:]] == ["BC/ABC"] * 4
    assert found["seen"]["again"] == "ABC/ABC" and found["reads"] == {"A": 1, "B": 1, "C": 1}
    assert observed["stock"]["S3"]["seen"]["first"]["end"] == "-/ABC"


def test_a_kept_model_stays_beside_what_fits(observed, column):
    seen = observed[column]["S5"]["seen"]["Y"]
    assert (seen["resident"], seen["reads"], seen["yields"]) == ("BY", 1, 0)


def test_kept_yields_its_place_to_what_does_not_fit_and_is_not_read_again(observed):
    seen = observed["keep"]["S5"]["seen"]["X"]
    assert (seen["resident"], seen["over"], seen["again"]) == ("X", False, "B")
    assert (seen["reads"], seen["yields"]) == (1, 1)
    assert observed["stock"]["S5"]["seen"]["X"]["reads"] == 2


def test_pinned_yields_to_nobody(observed):
    seen = observed["pin"]["S5"]["seen"]["X"]
    assert (seen["resident"], seen["over"], seen["reads"], seen["yields"]) == ("BX", True, 1, 0)


@pytest.mark.parametrize(("column", "after"), [("keep", "-/BCX"), ("pin", "BC/BCX"), ("stock", "-/BCX")])
def test_after_running_out_of_memory_kept_has_yielded_and_pinned_has_not(observed, column, after):
    found = observed[column]["S6"]
    assert found["seen"] == {"after": after, "again": "BC/BCX"}
    assert (found["reads"]["B"], found["reads"]["C"]) == (1, 1)


def test_keeping_is_stronger_than_disable_smart_memory(observed, column):
    assert observed[column]["S7"]["seen"] == {"first": "BC/ABC", "again": "BC/ABC"}
    assert observed["stock"]["S7"]["seen"] == {"first": "-/ABC", "again": "-/ABC"}


def test_an_error_in_the_middle_of_a_load_loses_no_kept_model(observed, column):
    seen = observed[column]["S8"]["seen"]
    assert seen["untracked"] == 0 and seen["error_as_it_was"] is True
    assert names(seen["end"])[0] == {"B"}
    assert observed["stock"]["S8"]["seen"]["untracked"] > 0


def test_an_interrupt_loses_nothing(observed, column):
    assert observed[column]["S9"]["seen"] == {"after": "BX/BX", "resident": "BX"}


def test_a_dead_entry_of_somebody_else_breaks_nothing(observed, column):
    seen = observed[column]["S10"]["seen"]
    at_least(seen["first"], "B")
    assert seen["first"]["unloaded"] == "B+dead/ABZ" and seen["first"]["end"] == "B+dead/BZ"
    assert observed["stock"]["S10"]["seen"]["first"]["end"] == "-+dead/Z"


def test_other_workflows_take_no_kept_model_with_any_node_cache(observed, column):
    assert observed[column]["S11"]["seen"] == {"classic": 1, "lru": 1, "none": 1}
    assert observed["stock"]["S11"]["seen"] == {"classic": 2, "lru": 2, "none": 2}


def test_short_ram_releases_kept_models_once_and_only_between_prompts(observed):
    seen = observed["keep"]["S12"]["seen"]
    assert seen == {"in_prompt": "BC", "idle": "", "once": "BC", "armed_again": "", "flags": []}


def test_short_ram_releases_no_pinned_model_and_sets_no_flag(observed):
    seen = observed["pin"]["S12"]["seen"]
    assert seen == dict.fromkeys(("in_prompt", "idle", "once", "armed_again"), "BC") | {"flags": []}


def test_no_entry_is_left_half_unloaded(observed, column):
    seen = observed[column]["S13"]["seen"]
    assert seen["contract"] == "TypeError" and seen["half_unloaded"] == 0
    assert names(seen["end"])[0] == {"B", "C"}


def test_kept_models_of_two_accelerators_stay(observed, column):
    seen = observed[column]["two devices"]["seen"]
    at_least(seen["mixed"], "BC")
    assert seen["mixed"]["end"] == "BC/BC"
    assert [seen["all_kept"][stage] for stage in STAGES] == ["BC/BC"] * 5


def test_the_wrappers_log_no_error(observed):
    errors = {(column, name): found["errors"] for column in OURS for name, found in observed[column].items()}
    assert len(errors) == 30 and not any(errors.values()), errors


def comparable(session: dict[str, Any]) -> dict[str, Any]:
    """Without what ComfyUI's versions do differently: 0.3.64 unloads one device only, and loads in any order."""
    plain = json.loads(json.dumps(session))
    for column in plain.values():
        for press in ("mixed", "all_kept"):
            for stage in ("unloaded", "reset"):
                del column["two devices"]["seen"][press][stage]
        column["S8"]["seen"]["untracked"] = min(1, column["S8"]["seen"]["untracked"])
    del plain["stock"]["S8"]["seen"]["end"]  # B is lost or not, as the order of that load was
    return plain


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(comfyui_path: Path):
    assert comparable(played(SCRIPT, None)) == comparable(played(SCRIPT, comfyui_path))
