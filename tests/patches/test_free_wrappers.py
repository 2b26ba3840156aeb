"""The wrappers pass on what is not theirs, come and go without a trace, and say who pressed and what was lost.

The scenarios of free_wrappers.py run in processes of their own: on the double of ComfyUI always, and on each checkout
of COMFYUI_PATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("free_wrappers.py")
NAMES = ("unload_all_models", "free_memory", "soft_empty_cache", "load_models_gpu")
STEP = "throw_exception_if_processing_interrupted"


@pytest.fixture(scope="module")
def observed(comfyui_or_double: Path | None) -> dict:
    return played(SCRIPT, comfyui_or_double)


def scenario(observed: dict, name: str) -> Any:
    assert observed[name]["errors"] == []
    return observed[name]["seen"]


def test_an_owner_s_own_wish_is_not_filtered_and_holds_for_its_thread_only(observed):
    seen = scenario(observed, "explicit")
    assert seen == {"without": "C/ABC", "other thread": "BC/ABC", "within": "-/ABC", "after": "BC/ABC", "lost": 0}


def test_a_pinned_model_goes_only_for_who_names_it(observed):
    """Not for another pack's call that spares all but it, nor for "unload others" of the ladders."""
    seen = scenario(observed, "meant")
    assert seen["others"] == "ABC/ABC"
    assert seen["the ladders"] == seen["again"] == "AC/ABC"
    assert seen.get("by ComfyUI", "A/ABC") == "A/ABC"


def test_the_ram_budget_takes_the_least_recently_used_and_none_of_the_running_prompt(observed):
    assert scenario(observed, "budget") == {"BCD": "BCD", "E": "DE", "B": "BE"}


def test_another_file_under_the_same_name_replaces_a_kept_model(observed):
    seen = scenario(observed, "file")
    assert seen == {"first": [1, "B/B", "B"], "same file": [1, "B/B", "B"], "other file": [2, "B/B", "B"]}


@pytest.mark.parametrize("kind", ["InterruptProcessingException", "RuntimeError"])
@pytest.mark.parametrize("name", NAMES)
def test_what_comfyui_raises_comes_out_as_the_same_object_and_costs_no_kept_model(observed, name, kind):
    assert scenario(observed, "passes through")[f"{name} {kind}"] == ["the same", "BC/BC"]


def test_an_error_leaves_the_thread_as_it_was(observed):
    assert scenario(observed, "passes through")["thread"] == 0


def test_parameters_that_we_do_not_know_arrive(observed):
    seen = scenario(observed, "arguments")
    assert seen["calls"] == [
        [1, 2, ["B"], {"for_dynamic": True}],
        [2, 4, ["B"], {"pins_required": 7}],
        [3, 1, ["B"], {"device": None, "ram_required": 5}],
    ]
    assert seen["results"] == [["gone"], ["gone"], ["gone"], [[True], {}], [["all"], {"hard": True}]]


def test_kept_entries_go_back_to_their_places_unless_they_were_loaded_again(observed):
    seen = scenario(observed, "places")
    assert seen == {"before": "ACYBX", "hidden": ["AYX"], "after": "ACYBX", "loaded again": "BCAYX"}


def test_another_pack_s_function_meets_no_entry_without_a_patcher(observed):
    """It would end ComfyUI's worker; the entry is back afterwards, unless its network has died."""
    seen = scenario(observed, "dead")
    assert (seen["before"], seen["found"], seen["after"]) == ("B+dead/BZ", [], "B+dead/BZ")
    assert (seen["died"], seen["entries"]) == ("B/B", 1)


def test_installing_twice_wraps_once_and_uninstalling_leaves_comfyui_s_own(observed):
    seen = scenario(observed, "installing")
    assert seen["twice"] is True and seen["gone"] is True


@pytest.mark.parametrize(("kind", "status"), [("telling", "in chain"), ("silent", "replaced")])
def test_uninstalling_beneath_another_pack_disarms_and_cuts_nothing(observed, kind, status):
    """A wrapper that says what it wraps, and one that does not, so that ours beneath it cannot be seen."""
    seen = scenario(observed, "installing")[kind]
    assert seen == {"status": [status, "replaced"], "still_theirs": True, "called": ["foreign"], "then": "-/B"}


def test_a_chain_that_holds_us_twice_acts_once(observed):
    seen = scenario(observed, "doubled")
    assert seen["stages"] == ["pre-unload", "post-unload", "post-reset", "post-collect"]
    assert (seen["press"]["pre"], seen["press"]["end"]) == ("AB/AB", "B/B")


def test_a_press_says_who_asked(observed):
    seen = scenario(observed, "callers")
    assert seen == {"tail": ["button"], "error": ["OOM"], "in a prompt": ["housekeeping"]}


MIB = 1 << 20
STAGES = ["pre-unload", "post-unload", "post-reset", "post-collect"]
PRESSES = {
    "both": [STAGES, "collected", ""],
    "free": [STAGES, "collected", ""],
    "unload": [[*STAGES[:2], STAGES[3]], "collected", "the node cache was not reset"],
    "out of memory": [STAGES[:2], "ended", "ended after unloading"],
    "no collection": [STAGES[:2], "ended", "ended after unloading"],
    "another thread between": [[*STAGES[:2], STAGES[3]], "collected", "the node cache was not reset"],
    "the worker's next turn": [STAGES[:3], "ended", "ended after the reset"],
}


@pytest.mark.parametrize("press", PRESSES)
def test_a_press_goes_as_far_as_comfyui_does_and_says_so(observed, press):
    assert scenario(observed, "stages")[press] == PRESSES[press]


def test_a_press_ends_when_another_begins(observed):
    assert scenario(observed, "stages")["another press"] == ["ended", "unloaded"]


def test_after_the_reset_the_garbage_is_there_and_after_the_collection_it_is_not(observed):
    found = scenario(observed, "garbage")
    assert [found[stage] // MIB for stage in STAGES] == [8, 8, 8, 0]


def test_a_function_that_comfyui_does_not_have_costs_its_own_wrapper_only(observed):
    seen = scenario(observed, "missing")
    queue = ("PromptQueue.get", "PromptQueue.get_flags")
    worker = ("PromptExecutor.execute", "execution.execute", "PromptExecutor.reset", *queue)
    gone = ("free_memory", *worker)
    required = {name: status for name, status in seen["status"].items() if name != "unload_model_and_clones"}
    assert required == {name: "missing" if name in gone else "on top" for name in (*NAMES, STEP, *worker)}
    assert seen["again"] is True


def test_a_flag_that_was_set_while_the_worker_collected_garbage_is_heard_at_once(observed):
    seen = scenario(observed, "heard")
    assert seen["nothing"] == [None, 0.3] and seen["flags"] == {"unload_models": True}
    assert seen["a flag"] == [None, 0.0]
    assert seen["a flag and a prompt"] == ["prompt", 0.0] and seen["a flag, without a limit"] == ["prompt", 0.3]
    assert seen["a flag while it waits"] == [None, 0.3]


def test_while_idle_and_short_of_ram_the_node_cache_is_reset_though_nothing_is_kept(observed):
    seen, reset = scenario(observed, "relief"), {"unload_models": False, "free_memory": True}
    assert (seen["idle"], seen["results"], seen["models"]) == (reset, 0, "A/A")
    assert (seen["once"], seen["enough"], seen["a prompt waits"]) == ({}, {}, {})


def test_relief_can_be_switched_off_and_its_threshold_be_set(observed):
    seen = scenario(observed, "relief")
    assert (seen["switched off"], seen["above a threshold in bytes"]) == ({}, {})
    assert seen["below it, with a press"] == {"unload_models": True, "free_memory": True}


def test_the_ring_holds_sixty_four_snapshots(observed):
    seen = scenario(observed, "ring")
    assert (seen["looks"], seen["presses"]) == (64, [5, 20]) and "kept: B 1.00 MiB" in seen["last"]


def test_a_press_is_one_line_and_four_snapshots_for_those_who_debug(observed):
    lines = scenario(observed, "log")["plain"]
    assert [level for level, _ in lines] == ["DEBUG"] * 4 + ["INFO"]
    stages = ["pre-unload", "post-unload", "post-reset", "post-collect"]
    assert [line.split(" ")[0] for _, line in lines[:4]] == stages
    assert lines[4][1] == "button: 1.00 MiB left cpu:0: A 1.00 MiB · kept: B 1.00 MiB on cpu:0 · said why"


def test_a_kept_model_that_was_lost_is_one_error_with_class_id_and_key(observed):
    seen = scenario(observed, "log")
    errors = [line for level, line in seen["lost"] if level == "ERROR"]
    assert len(errors) == seen["reported"] == 1
    assert f"B of B ({seen['id']}, keep; model B)" in errors[0] and "1.00 MiB on the device before" in errors[0]
    assert [level for level, _ in seen["lost"]].count("INFO") == 1


def test_a_failure_of_ours_is_said_once_and_comfyui_goes_on(observed):
    seen = scenario(observed, "own failure")
    assert seen["after"] == "-/AB"
    *failures, lost = (line.partition(";")[0] for line in seen["lines"])
    assert failures == ["hiding kept models failed", "choosing kept models failed"]
    # The next press ends this one, and it says what it came to.
    assert lost.startswith("a kept model was lost: B of B")
