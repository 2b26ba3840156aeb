"""`steadyvsr doctor --full`, rehearsed with tiny weights on a card with memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from steadyvsr.app import card as full
from steadyvsr.app.card import holding
from steadyvsr.memory import probe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
WITHOUT_PROCESSES = {name: block for name, block in full.FULL.items() if block is not holding.two_workers}


@pytest.fixture
def setting(card) -> full.Setting:
    return full.Setting(card, torch.float32, reduced=True, golden=GOLDEN)


def test_every_block_measures_on_a_card_and_all_is_as_promised(setting, simcard) -> None:
    record = full.measure(setting, WITHOUT_PROCESSES)
    assert [(name, block) for name, block in record["blocks"].items() if block["missed"] or not block["lines"]] == []
    assert record["exit_code"] == 0
    receipts = record["blocks"]["offload with planted holders"]["figures"]["receipts"]
    assert [row["verdict"] for row in receipts] == ["FREED_TO_POOL", "STILL_HELD", "STILL_HELD"]
    assert "HELD_LIST" in receipts[1]["held_by"] and "weight" in receipts[2]["held_by"]
    press = record["blocks"]["a press with a kept model"]["figures"]
    assert press["left_bytes"] >= press["asked_bytes"] > 0 and press["kept_unchanged"]
    (run,) = record["blocks"]["speed at 768 × 1408"]["figures"]["runs"]
    assert run["measured_peak_bytes"] > 0 and run["frames_per_second"] > 0
    assert {"LQ projection", "transformer", "decoder"} < run["part_seconds_of_8_frames"].keys()
    rows = record["blocks"]["200 frames three times"]["figures"]["v1.1"]
    assert len({(row["digest"], row["allocated_after_bytes"]) for row in rows}) == 1
    assert simcard.statistics(setting.device)["live"] == 0


def test_a_card_whose_books_lie_is_found_out(setting, monkeypatch) -> None:
    """A press that leaves every weight where it is, and says that it moved them."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    record = full.measure(setting, {"press": holding.press, "offload": holding.planted_holders})
    assert record["exit_code"] == 1
    assert "every byte left the device" in record["blocks"]["press"]["missed"]
    assert "the verdict with nothing planted" in record["blocks"]["offload"]["missed"]


def test_a_run_that_leaves_tensors_behind_is_found_out(setting, monkeypatch) -> None:
    kept = []
    made = full.FULL["200 frames three times"].__globals__["frames_of"]

    def leaking(size, count):
        kept.append(torch.ones(1000, device=setting.device))
        return made(size, count)

    monkeypatch.setitem(full.FULL["200 frames three times"].__globals__, "frames_of", leaking)
    record = full.measure(setting, {"repeats": full.FULL["200 frames three times"]})
    kept.clear()
    assert record["blocks"]["repeats"]["missed"] == ["v1: no bytes left over", "v1.1: no bytes left over"]
    assert probe.read(setting.device).allocated.bytes == 0
