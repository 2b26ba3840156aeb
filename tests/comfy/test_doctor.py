"""Memory Doctor inside a real ComfyUI: the network and the sampler go through ComfyUI, and a held model is noticed.

The states are observed by doctor_session.py, which runs in ComfyUI's own process.
"""

from __future__ import annotations

import pytest
from steadyvsr.tests.session.observed import scenario

pytestmark = pytest.mark.comfy

SESSIONS = ("doctor_session.py",)
CARDS = ("books", "simcard")
ROUNDING = 1.02
"""How much more an allocator counts than the tensors hold, at most: it rounds each of them up."""
LEAST_PEAK = {"books": 30 << 20, "simcard": 20 << 20}
"""Of sampling with guidance in one batch: many times the 3.4 MiB of the weights."""
LARGEST_SHARE = {"books": 0.6, "simcard": 1.0}
"""Of that, without guidance or one after the other. On the simulated card ComfyUI cuts its attention, which is most of
the peak, into pieces by what is free, so the batch hardly shows there."""


def test_the_network_was_on_the_card_and_left_it(observed, card):
    seen = scenario(observed, "fine")
    receipt = seen["report"]["offload"]
    assert seen["loads"][0] == {"Transformer": receipt["asked"]} and receipt["asked"] > 1_000_000
    assert receipt["verdict"] == "FREED" and receipt["still_loaded"] == 0
    left = receipt["before"]["allocated"]["bytes"] - receipt["after"]["allocated"]["bytes"]
    assert receipt["asked"] <= left <= (1 if card == "books" else ROUNDING) * receipt["asked"]
    assert seen["report"]["exit_code"] == 0 and seen["report"]["problems"] == []


def test_afterwards_nothing_is_left_of_the_examination(observed):
    seen = scenario(observed, "fine")
    assert seen["resident_after"] == {} and seen["listed_after"] == 0
    assert seen["report"]["dropped"]["before"] > 0 and seen["report"]["dropped"]["after"] == 0


def test_guidance_is_measured_with_comfyuis_own_sampler(observed, card):
    seen = scenario(observed, "fine")
    guidance = seen["report"]["guidance"]
    assert any("WAN21" in resident for resident in seen["loads"])
    assert "small Wan 2.1" in guidance["measured_on"] and guidance["peaks"]["batched"] > LEAST_PEAK[card]
    for mode in ("off", "sequential"):
        assert guidance["peaks"][mode] <= LARGEST_SHARE[card] * guidance["peaks"]["batched"]


def test_the_leak_line_has_its_twelve_runs(observed):
    report = scenario(observed, "fine")["report"]
    assert len(report["after_runs"]) == report["growth"]["runs"] == 12
    assert not report["growth"]["leaking"]


def test_the_findings_are_shown_on_the_node_as_text(observed, device):
    shown = scenario(observed, "fine")["shown"]
    assert f"offload on {device}: FREED" in shown and shown.endswith("nothing is held, nothing grows")


def test_a_network_that_stays_on_the_card_is_a_problem(observed):
    seen = scenario(observed, "held")
    assert seen["report"]["offload"]["verdict"] == "STILL_HELD"
    assert seen["report"]["offload"]["still_loaded"] == seen["report"]["offload"]["asked"]
    assert seen["report"]["exit_code"] == 1
    assert "PROBLEM: memory is held after an offload" in seen["shown"]


def test_cancel_stops_it_and_leaves_nothing_on_the_card(observed):
    assert scenario(observed, "interrupted") == {"stopped": True, "resident_after": {}}
