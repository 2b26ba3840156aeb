"""The seven phases of a Wan workflow inside a real ComfyUI, on two kinds of simulated card, ended by gates.

By the books: 5,000,000 bytes, which hold any one of the models and no two. With memory of its own: 64,000,000 bytes,
in which activations take their share too. The states are observed by phases_session.py, which runs in ComfyUI's own
process and sends prompts through ComfyUI's own executor.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.comfy.phases_workflow import PHASES
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

WAN, TEXT, VAE = "WAN21", "WanTEModel", "WanVAE"
NEEDED = dict(zip(PHASES, (WAN, WAN, TEXT, WAN, VAE, WAN, VAE), strict=True))
BYTES = {WAN: 3_495_584, VAE: 3_697_964}
SESSIONS = ("phases_session.py",)
CARDS = ("books", "simcard")
ROUNDING = 1.02
"""How much more an allocator counts than the tensors hold, at most: it rounds each of them up."""


def rounds(observed: dict) -> list[dict]:
    seen = scenario(observed, "phases")
    assert [outcome["error"] for outcome in seen["rounds"]] == [None] * 3
    return seen["rounds"]


@pytest.mark.parametrize("name", ["PhaseGate", "MemoryReport"])
def test_schema_ids_are_the_parameters_of_execute_and_each_has_a_tooltip(observed, name):
    schema = scenario(observed, "schema")[name]
    assert schema["inputs"] == schema["parameters"]
    assert schema["without_tooltip"] == [] and schema["category"] == "SteadyVSR/Memory"


def test_a_gate_takes_models_of_any_kind_in_any_mixture(observed):
    assert scenario(observed, "schema")["PhaseGate"]["model_types"] == "*"


def test_loading_the_pack_lets_the_probe_see_dynamic_vram(observed):
    assert scenario(observed, "schema")["dynamic_reader"] is True


@pytest.mark.parametrize("card", ["books"])
def test_the_card_holds_each_model_and_no_two(observed, card):
    capacity = scenario(observed, "phases")["capacity"]
    sizes = {}
    for phase in rounds(observed)[0]["phases"]:
        sizes |= phase["resident_in_phase"]
    assert capacity == 5_000_000 and sizes.keys() == {WAN, TEXT, VAE}
    assert {name: sizes[name] for name in BYTES} == BYTES
    assert max(sizes.values()) < capacity < min(a + b for a in sizes.values() for b in sizes.values() if a != b)


def test_inside_each_phase_its_model_and_no_other_was_resident(observed, card):
    capacity = scenario(observed, "phases")["capacity"]
    for outcome in rounds(observed):
        assert [phase["phase"] for phase in outcome["phases"]] == list(PHASES)
        for phase in outcome["phases"]:
            needed = NEEDED[phase["phase"]]
            assert phase["resident_in_phase"].keys() == phase["before_gate"].keys() == {needed}
            weights = phase["resident_in_phase"][needed]
            assert phase["peak_bytes"] == weights > 0 if card == "books" else capacity > phase["peak_bytes"] >= weights


def test_at_the_end_of_each_phase_nothing_is_resident_by_the_books_and_by_the_probe(observed):
    for outcome in rounds(observed):
        for phase in outcome["phases"]:
            assert (phase["after_by_books"], phase["after_by_probe"]) == ({}, 0), phase["phase"]
        assert outcome["resident_at_end"] == {}


@pytest.mark.parametrize("phase", ["load", "LoRA", "sampling patch"])
def test_after_loading_lora_and_patch_the_receipt_says_that_the_model_left(observed, card, phase):
    for outcome in rounds(observed):
        (seen,) = [item for item in outcome["phases"] if item["phase"] == phase]
        receipt = seen["receipts"][0]
        assert (receipt["name"], receipt["verdict"]) == (WAN, "FREED")
        assert receipt["asked"] == BYTES[WAN] and receipt["still_loaded"] == 0
        assert receipt["asked"] <= receipt["left"] <= (1 if card == "books" else ROUNDING) * receipt["asked"]
        assert receipt["parameters"] == {"cpu": BYTES[WAN]}


def test_a_model_that_was_not_loaded_is_not_called_freed(observed):
    (load,) = [item for item in rounds(observed)[0]["phases"] if item["phase"] == "load"]
    assert [(r["name"], r["verdict"]) for r in load["receipts"][1:]] == [(TEXT, "NOT_LOADED"), (VAE, "NOT_LOADED")]


def test_the_second_and_third_round_are_equal_to_the_byte(observed):
    first, second, third = rounds(observed)
    assert second == third
    assert second["live_bytes"] > 0 and first["phases"] == second["phases"]


@pytest.mark.parametrize("phase", PHASES)
def test_with_the_offload_stubbed_out_the_gate_fails_and_names_model_bytes_and_phase(observed, phase):
    seen, needed = scenario(observed, "stubbed")[phase], NEEDED[phase]
    size = seen["resident"][needed]
    assert seen["error"].startswith(f"Phase Gate: expected {needed} (")
    assert f'"{phase}"' in seen["error"] and f"({size:,} B) still there" in seen["error"]
    assert "STILL_HELD" in seen["error"] and f"weights of module {needed}" in seen["error"]
    budget = seen["error"].splitlines()[1]
    assert "at most 0.00 MiB" in budget and needed in budget and f"{size:,} B" in budget and f'"{phase}"' in budget


def test_once_the_offload_works_again_so_does_the_workflow(observed):
    assert scenario(observed, "stubbed")["afterwards"] == {"error": None, "resident": {}}


@pytest.mark.parametrize("run", [0, 1])
def test_every_number_of_every_report_was_read_in_that_run(observed, run):
    seen = scenario(observed, "reports")["runs"][run]
    assert seen["error"] is None
    assert {"unet", "clip", "vae", "lora", "report", "gate sample"} < set(seen["reports"])
    assert len(seen["reports"]) == len(PHASES) + 5 and seen["numbers"] > 300 and seen["in_text"] > 50
    assert (seen["unexplained"], seen["unexplained_in_text"]) == ([], [])
    assert seen["press_as_recorded"] is True


def test_what_only_one_run_could_read_stands_in_its_reports_and_in_no_other(observed, card):
    # On a card of its own the look before the first load is another one; it is told only where the load does not fit.
    untold = 1 if card == "simcard" else 0
    first, second = scenario(observed, "reports")["runs"]
    for this, other in ((first, second), (second, first)):
        only_here = set(this["answers"]) - set(other["answers"])
        assert len(only_here) >= 4 and len(only_here - set(this["said"])) <= untold
        assert not only_here & set(other["said"])


def test_a_gate_with_nothing_to_do_keeps_the_cache_and_one_with_something_to_do_runs(observed):
    seen = scenario(observed, "caching")
    assert seen["first"]["gates"] == list(PHASES) and seen["again"]["gates"] == []
    # A model of these gates came back by another way.
    assert seen["dirty_before"] == {WAN: BYTES[WAN]}
    assert seen["dirty"]["error"] is None and "load" in seen["dirty"]["gates"] and seen["dirty"]["resident"] == {}
    assert seen["after_dirty"]["gates"] == []
    assert seen["new_seed"]["gates"] == ["sample", "VAE decode"]


def test_a_foreign_model_on_the_card_stops_the_workflow_at_its_first_gate(observed):
    seen = scenario(observed, "caching")
    assert seen["foreign"]["gates"] == ["load"] and seen["foreign"]["resident"] == seen["foreign_before"]
    assert f"TAESD 9.33 MiB ({seen['foreign_before']['TAESD']:,} B)" in seen["foreign"]["error"]


def test_a_value_passes_as_the_same_object_and_a_list_as_a_whole(observed):
    seen = scenario(observed, "semantics")
    assert all(seen[name] for name in ("identity", "list_identity", "none", "report_identity"))
    assert seen["error"] is None and seen["through_lists"] == [0.0, 1.0, 2.0] and seen["gates_for_a_list"] == 1
    assert seen["plot"] == [1, 400, 960, 3]


def test_a_gate_whose_value_leads_nowhere_runs_all_the_same(observed):
    assert scenario(observed, "semantics")["leaf"] == ["leaf"]


def test_a_limit_that_another_node_computes_holds_and_keeps_the_cache(observed):
    limits, ran = scenario(observed, "semantics")["wired"]
    assert [limit["resident"] for limit in limits] == [1 << 29, 1 << 29] and ran == 1


def test_what_is_no_model_is_refused_by_name(observed):
    message = scenario(observed, "semantics")["no_model"]
    assert message.startswith("ValueError: Phase Gate: expected a model; got str on a model input")


def test_a_budget_names_what_is_resident_and_one_byte_decides(observed, card):
    seen = scenario(observed, "limits")
    source, mib = ("ComfyUI's books", "9.33") if card == "books" else ("simcard", "9.34")
    assert f'phase "small"; got {mib} MiB ({seen["size"]:,} B) by {source}: TAESD' in seen["budget"]
    assert seen["budget_met"] == "no error"
    assert len(seen["warned"]) == 1 and "TAESD" in seen["warned"][0]
    assert seen["still_there"] == seen["resident"] == {"TAESD": 9_780_260}


def test_what_must_be_free_names_what_is_in_the_way(observed):
    seen = scenario(observed, "limits")
    assert f"({seen['capacity']:,} B) free on {seen['device']}" in seen["needs"]
    assert "in the way: TAESD 9.33 MiB" in seen["needs"] and seen["needs_met"] == "no error"


def test_a_peak_above_its_limit_is_told_with_its_phase(observed, card):
    seen = scenario(observed, "limits")
    assert f'phase "peaky"; got a peak of 9.3{3 if card == "books" else 4} MiB ({seen["size"]:,} B)' in seen["peak"]


def test_a_model_that_rests_on_the_card_is_told_and_not_called_gone(observed):
    message = scenario(observed, "limits")["rests_there"]
    assert "Phase Gate: expected TAESD (9.33 MiB" in message and "rests where it computes" in message


@pytest.mark.parametrize("policy", ["keep", "pin"])
def test_a_gate_moves_a_model_that_is_kept_or_pinned_and_it_stays_kept(observed, policy):
    seen = scenario(observed, "limits")[policy]
    assert seen["before"] and seen["after"] == {} and seen["owned"] == policy
    assert [receipt["verdict"] for receipt in seen["report"]["offloaded"]] == ["FREED"]
    assert seen["report"]["violations"] == []


def test_a_flashvsr_model_leaves_with_all_its_networks(observed):
    seen = scenario(observed, "limits")["flashvsr"]
    networks = ["Transformer", "CausalLQ4xProjection", "TCDecoder"]
    assert set(networks) <= set(seen["before"]) and all(seen["before"].values())
    assert seen["receipts"] == [*networks, "TAESD"] and seen["after"] == {}


def test_a_move_that_is_complete_is_freed_and_names_nobody(observed):
    seen = scenario(observed, "leaks")["nothing"]
    assert (seen["error"], seen["verdict"], seen["held"]) == (None, "FREED", [])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("closure", "global HELD in module __main__[0] → closure of leaks.<locals>.finish"),
        ("backup", "the patcher's backup"),
        ("node cache", "ComfyUI's node cache"),
    ],
)
def test_a_planted_leak_is_named_in_the_gate_s_receipt_and_error(observed, card, kind, name):
    seen = scenario(observed, "leaks")[kind]
    assert seen["verdict"] == "STILL_HELD" and seen["unnamed"] == 0
    ((holder, size),) = seen["held"]
    assert holder.startswith(name) and size == seen["largest"] > 1 << 20
    held, budget = seen["error"].splitlines()
    source = "books" if card == "books" else "simcard"
    assert name in held and "got 2.00 MiB" in held and '"leak"' in held
    assert card != "books" or f"{size:,} B" in held  # an allocator's loss is rounded up, and what is left down
    # The books are empty: only the device's own count shows what is left.
    assert "at most 0.00 MiB" in budget and f"{size:,} B) by {source}: 2.00 MiB ({size:,} B) of other tensors" in budget


def test_a_probe_that_dies_in_a_run_leaves_marked_reports_and_a_working_queue(observed):
    seen = scenario(observed, "dying")
    assert (seen["error"], seen["phases"], seen["then"]) == (None, len(PHASES), None)
    # The models were moved all the same; nobody claims that it was measured.
    assert seen["after"] == [{}] * len(PHASES) and set(seen["verdicts"]) == {"UNVERIFIABLE", "NOT_LOADED"}
    assert seen["allocated"] is None and any("GPU is lost" in note for note in seen["notes"])
    assert any("books alone" in note for note in seen["notes"])


def test_with_a_dead_probe_a_budget_is_held_by_the_books(observed):
    message = scenario(observed, "dying")["budget"]
    assert "at most 0.00 MiB" in message and "by ComfyUI's books: TAESD 9.33 MiB (9,780,260 B)" in message


def test_without_an_accelerator_a_gate_says_so_and_lets_pass(observed):
    seen = scenario(observed, "on_the_cpu")
    assert seen["verdicts"] == ["CANNOT_OFFLOAD"] and seen["cards"] == []
    assert any("no accelerator" in line for line in seen["text"])
