"""The loader nodes inside a real ComfyUI: what is read from disk, who owns it, where it is, and what the reports say.

The states are observed by loaders_session.py, which runs in ComfyUI's own process on a simulated card.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

LOADERS = ["LoadDiffusionModel", "LoadCLIP", "LoadVAE", "LoadCheckpoint"]
WAN_BYTES = 3_495_584
ROUNDING = 1.02
"""How much more an allocator counts than the tensors hold, at most: it rounds each of them up."""
SESSIONS = ("loaders_session.py",)
CARDS = ("books", "simcard")


@pytest.mark.parametrize("name", [*LOADERS, "ApplyLoRA"])
def test_schema_ids_are_the_parameters_of_execute_and_each_has_a_tooltip(observed, name):
    seen = scenario(observed, "schema")[name]
    assert seen["inputs"] == seen["parameters"] and seen["without_tooltip"] == []
    assert seen["category"] == "SteadyVSR/Loaders" and {"keep_loaded", "offload_after_load"} <= set(seen["inputs"])


def test_the_widgets_list_what_the_stock_loader_lists(observed):
    assert scenario(observed, "schema")["stock widgets"] == [True, True]


@pytest.mark.parametrize("name", LOADERS)
def test_a_kept_model_is_read_once_and_again_only_after_it_was_given_up(observed, name):
    seen = scenario(observed, "reads")[name]
    once = seen["counts"]["kept"]
    assert once >= 1
    assert seen["counts"] == {"kept": once, "again": once, "given up": once, "anew": 2 * once}
    memory = "memory: nothing was read"
    assert seen["sources"] == {"kept": "disk", "again": memory, "given up": memory, "anew": "disk"}
    assert seen["hits"] == {"kept": 0, "again": 1, "given up": 2, "anew": 0}


@pytest.mark.parametrize("keep", ["keep", "no"])
@pytest.mark.parametrize("name", LOADERS)
def test_two_loads_share_their_weights_and_the_owners_object_is_not_handed_out(observed, name, keep):
    seen = scenario(observed, "clones")[f"{name} {keep}"]
    assert seen["same_weights"] and all(seen["same_weights"]) and seen["reloadable"] is True
    assert seen["owner"] is (name in ("LoadVAE", "LoadCheckpoint"))  # a VAE has no clone


def test_a_changed_file_is_loaded_anew_and_its_predecessor_dropped_before_the_read(observed):
    seen = scenario(observed, "file_changed")
    assert seen["fingerprint_changed"] and seen["source"] == "disk" and seen["new_module"]
    assert set(seen["owned_while_reading"]) == {0} and seen["entries"] == 1


@pytest.mark.parametrize(
    ("order", "policy"), [("no+pin", "pin"), ("pin+no", "pin"), ("keep+pin", "pin"), ("no+keep", "keep")]
)
def test_of_two_loaders_of_one_file_the_stronger_wish_holds(observed, order, policy):
    assert scenario(observed, "strongest")[order] == {"error": None, "policy": policy, "reads": 1}


def test_a_text_encoder_that_nobody_keeps_is_shared_as_long_as_somebody_uses_it(observed):
    seen = scenario(observed, "strongest")["clip"]
    assert seen == {"reads": 1, "policy": "pin", "source": "memory: nothing was read"}


def test_a_wish_ends_with_its_node(observed):
    assert scenario(observed, "strongest")["the strong one removed"]["policy"] == "no"


def test_the_wish_of_a_loader_that_comfyui_has_cached_still_holds(observed):
    seen = scenario(observed, "wishes")["cached"]
    assert "a" in seen["cached"] and seen["error"] is None
    assert seen["policies"] == ["pin"]


def test_a_changed_wish_replaces_the_earlier_one_of_its_node(observed):
    assert scenario(observed, "wishes")["changed"] == {"policies": ["keep"], "cached": [], "error": None}


def test_a_node_of_another_workflow_with_the_same_id_has_no_say(observed):
    assert scenario(observed, "wishes")["id of another"] == {"policies": ["no"], "cached": [], "error": None}


def test_offload_after_load_moves_what_the_load_put_there_and_keeps_it(observed, card):
    seen = scenario(observed, "offloaded")["keep"]
    assert seen["before"] == {"WAN21": WAN_BYTES} and seen["after"] == {}
    (receipt,) = seen["receipts"]
    assert (receipt["verdict"], receipt["asked"]) == ("FREED", WAN_BYTES)
    assert WAN_BYTES <= receipt["left_tensors"] <= (1 if card == "books" else ROUNDING) * WAN_BYTES
    assert receipt["line"].startswith(f"asked 3.33 MiB · left the tensors 3.33 · left the driver 3.33 ({card})")
    assert seen["policy"] == "keep" and seen["source"] == "disk"


def test_a_pinned_model_stays_on_the_card_where_its_load_put_it(observed):
    seen = scenario(observed, "offloaded")["pin"]
    assert seen["before"] == seen["after"] == {"WAN21": WAN_BYTES} and seen["receipts"] == []


@pytest.mark.parametrize("keep", ["keep", "pin"])
def test_a_kept_model_that_is_on_the_card_is_left_there_by_its_own_loader(observed, keep):
    seen = scenario(observed, "offloaded")[keep]
    assert seen["after_again"] == {"WAN21": WAN_BYTES} and seen["receipts_again"] == []
    assert seen["stays"] == WAN_BYTES


@pytest.mark.parametrize("keep", ["keep", "pin"])
def test_an_offloaded_model_works_again_with_the_same_result(observed, keep):
    seen = scenario(observed, "offloaded")[keep]
    assert seen["same_output"] is True and seen["resident_when_used"] == {"WAN21": WAN_BYTES}


def test_a_lora_changes_the_output_is_read_once_and_ends_off_the_card(observed):
    seen = scenario(observed, "lora")
    assert seen["patches"] == {"model": 2} and seen["changes"] > 1e-4
    assert seen["reads"] == 1 and seen["sources"] == ["disk", "memory: nothing was read"]
    assert seen["on_card_before"] == seen["on_card_kept"] == {"WAN21": WAN_BYTES} and seen["on_card_after"] == {}
    assert (seen["verdict"], seen["asked"]) == ("FREED", WAN_BYTES)


def test_no_lora_is_left_in_the_kept_model(observed):
    assert scenario(observed, "lora")["residue"] == 0.0


def test_a_lora_for_another_architecture_is_an_error_that_names_it(observed):
    seen = scenario(observed, "lora")
    assert "foreign.safetensors" in seen["foreign"] and "WAN21" in seen["foreign"] and "none fits" in seen["foreign"]
    assert "gone.safetensors" in seen["missing"] and "not there" in seen["missing"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("device", "expected a device of {device}, cpu; got 'cuda:7'"),
        ("missing", "got 'gone.safetensors', which is not there"),
        ("outside", "which is not there"),
        ("policy", "expected no, keep, pin; got 'forever'"),
        ("auto without room", "{device}"),
    ],
)
def test_bad_input_is_refused_in_words(observed, device, case, words):
    assert words.format(device=device) in scenario(observed, "refusals")[case]


def test_auto_takes_the_card_with_room_and_the_cpu_only_when_allowed(observed):
    seen = scenario(observed, "refusals")
    assert seen["auto"] == "no error"
    assert seen["cpu"]["device"] == "cpu" and "no device has" in seen["cpu"]["reason"]


def test_a_file_that_is_no_model_registers_nothing(observed):
    seen = scenario(observed, "refusals")
    assert seen["broken"] != "no error" and "broken.safetensors" not in seen["entries"]


@pytest.mark.parametrize("name", [*LOADERS, "ApplyLoRA"])
def test_more_runs_leave_the_tensor_bytes_of_the_third(observed, name):
    seen = scenario(observed, "repeated")[name]
    assert len(seen["bytes"]) == 6 and seen["loaded"] > 2_000_000
    assert set(seen["bytes"][2:]) == {seen["bytes"][2]}
