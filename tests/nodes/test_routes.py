"""The routes of the memory panel on the double of ComfyUI and in each real one, asked by a client of aiohttp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import scenario
from steadyvsr.tests.web.frontend_server import scripted_state

SUBJECT = "routes"
GIB = 1 << 30


def test_the_state_tells_a_card_s_parts_from_the_readings(observed):
    seen = scenario(observed, "routes state")
    assert (seen["status"], seen["devices"]) == (200, ["xpu:0", "RAM"])
    weights = seen["weights"]
    assert seen["loaded"] == [True, True] and seen["policies"] == ["None", "keep"] and weights > 30_000
    assert seen["parts"]["xpu:0"] == {
        "kept": weights // 2, "models": weights // 2, "working": GIB - weights, "pool": GIB, "others": 8 * GIB,
        "free": 12 * GIB, "context": 2 * GIB,
    }  # fmt: skip
    assert seen["phases"] == ["planted"]


def named(value: Any) -> Any:
    """The names in a tree of JSON; of a list those of its first item."""
    if isinstance(value, dict):
        return {name: named(item) for name, item in sorted(value.items())}
    return [named(value[0])] if isinstance(value, list) and value else None


def test_the_scripted_state_of_the_panel_s_tests_has_the_names_of_the_real_one(observed):
    real, scripted = scenario(observed, "routes state")["keys"], named(scripted_state())
    # GET adds what the push costs; the share of the driver's context is there only where a process can be read.
    del real["push"], real["devices"][0]["parts"]["context"]
    assert real == scripted


@pytest.mark.parametrize(
    ("route", "answer"), [("receipts", ["receipts"]), ("snapshots", ["snapshots"]), ("ledger", ["marks", "phases"])]
)
def test_a_get_answers(observed, route, answer):
    assert scenario(observed, "routes gets")[route] == [200, answer]


REFUSED = {
    "no JSON": (400, "expected JSON"), "no object": (400, "got list"), "nothing asked": (400, "got neither"),
    "a word for a bool": (400, 'unload_models: got "yes"'), "a bool for a word": (400, "client: got true"),
    "ids that are no list": (400, 'ids: got "all"'), "an id that is no word": (400, "expected a list of ids"),
    "an unknown id": (404, "no kept model has the id"), "an unknown policy": (400, "expected no, keep, pin; got 'x'"),
    "an unknown model": (404, "no model has the id"), "an unknown handle": (404, "no model '../x' is loaded"),
    "a level of 101 %": (400, "expected a share above 0 and up to 1; got 1.01"),
    "least RAM below 0": (400, "least_ram_gib: expected 0"),
    "a switch that is a number": (400, "reset_when_short: got 1"),
    "RAM below 0": (400, "kept_ram_gib: expected 0"), "no size": (400, "height: got null"),
    "no number": (400, "width: got true"), "too much": (400, "expected at most 65536 bytes"),
    "a misspelt key": (400, "expected the keys ids; got 'id'"),
    "a key that another route has": (400, "got 'decoder'"),
    "a warning above the strong one": (400, "expected warn_percent up to critical_percent, 60; got 90"),
    "a number of 400 digits": (400, "kept_ram_gib: expected a number"),
    "a size of 400 digits": (400, "width: expected a number"),
    "a scale of 400 digits": (400, "scale: expected a number"),
    "a number of 5,000 digits": (400, "expected JSON"), "not a number": (400, "expected JSON"),
    "no end": (400, "expected JSON"), "a deep list": (400, "expected JSON"),
    "a list of lists": (400, "expected a list of ids"), "a dict for a word": (400, "id: got a dict"),
    "half a character": (404, "no model has the id"), "no UTF-8": (400, "expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_in_words(observed, case):
    status, answer = scenario(observed, "routes refused")[case]
    assert (status, list(answer)) == (REFUSED[case][0], ["error"]) and REFUSED[case][1] in answer["error"]


HOSTS = {
    "localhost": 200, "the loopback": 200, "the loopback of IPv6": 200, "another name": 403, "a name like ours": 403,
    "nothing": 403, "another machine": 403, "nonsense": 403, "a list": 403,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_only_a_host_of_this_machine_is_answered(observed, name):
    """A name that an attacker points at this machine (DNS rebinding) makes their page ours to the browser."""
    assert scenario(observed, "routes hosts")[name] == [HOSTS[name], HOSTS[name]]


def test_a_host_that_comfyui_was_told_to_listen_on_is_answered(observed):
    assert scenario(observed, "routes listened") == {
        "127.0.0.1": [403, 403, 403, 403], "box.lan,127.0.0.1": [200, 403, 403, 403],
        "0.0.0.0,::": [403, 200, 200, 403],
    }  # fmt: skip


FOREIGN = {
    "no header": (403, "X-SteadyVSR: 1"), "a form": (403, "X-SteadyVSR: 1"), "plain text": (403, "X-SteadyVSR: 1"),
    "our header, plain text": (415, "application/json"), "our header, no type": (415, "application/json"),
    "another value": (403, "X-SteadyVSR: 1"), "an unknown charset": (415, "UTF-8"), "UTF-7": (415, "UTF-8"),
    "packed": (415, "uncompressed"), "a bomb": (415, "uncompressed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_a_page_of_another_site_can_send_is_refused_and_has_no_effect(observed, case):
    seen = scenario(observed, "routes foreign")
    status, answer = seen["answers"][case]
    assert status == FOREIGN[case][0] and FOREIGN[case][1] in answer["error"]
    assert seen["kept"] == ["F.safetensors"]


def test_a_receipt_goes_to_pages_that_have_the_panel_open_and_to_nobody_else(observed):
    seen = scenario(observed, "routes receipts")
    assert seen == {"nobody watches": [], "one page watches": ["page"], "it has closed the panel": []}


def test_keeping_and_releasing_change_the_policy_at_once(observed):
    seen = scenario(observed, "routes buttons")
    assert seen["keep"] == [200, "DONE", "keep"] and seen["release"] == [200, "DONE", "no"]


def test_an_offload_waits_for_the_worker_and_replaces_its_receipt(observed):
    seen = scenario(observed, "routes buttons")
    assert seen["offload"] == [200, "PENDING", True]
    assert seen["offloaded"][:2] == [True, "Offload Network"] and seen["pushed"] == ["steadyvsr.receipt"]


def test_the_free_buttons_set_comfyui_s_own_flags(observed):
    assert scenario(observed, "routes buttons")["free"] == [200, ["free_memory", "unload_models"]]


def test_settings_are_taken_over_and_told_back(observed):
    status, answer = scenario(observed, "routes buttons")["settings"]
    assert status == 200 and answer["kept_budget_bytes"] == 2 * GIB
    assert (answer["levels"]["warn"], answer["levels"]["critical"]) == (0.7, 0.9)
    assert (answer["least_ram_bytes"], answer["reset_when_short"]) == (3 * GIB, False)


def test_a_prediction_needs_a_model_that_is_known(observed):
    seen = scenario(observed, "routes buttons")
    assert seen["predict"] == [200, True, ["advice", "budget", "predicted"]]
    assert seen["predict unknown"] == [200, None]


def test_only_a_page_that_is_there_is_pushed_to_and_the_thread_ends_with_it(observed):
    seen = scenario(observed, "routes watching")
    assert seen["answers"] == [[200, {}], [200, {}]] and seen["to"] == ["page"] and seen["ended"] is True
    assert seen["keys"] == sorted(scripted_state())
    assert seen["figures"] == ["cpu_seconds", "pushes", "running", "seconds"]


@pytest.mark.comfy
def test_the_double_does_what_comfyui_does(observe, comfyui_path: Path):
    def comparable(observed: dict[str, Any]) -> dict[str, Any]:
        return {name: scenario(observed, name) for name in observed}

    assert comparable(observe(None)) == comparable(observe(comfyui_path))
