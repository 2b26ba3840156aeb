"""Verified offload, the search for holders and the test for growth where an allocator tells what really left."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steadyvsr.memory import leak, probe
from steadyvsr.memory.offload import Receipt, Subject, Verdict, offload
from steadyvsr.tests.memory import test_holders
from torch import nn

MIB = 1 << 20
LAYERS = 4
LAYER = 5 * MIB // 4
SIZE = LAYERS * LAYER
HELD: list[Any] = []
# The others bring tensors of their own, which lie on the CPU.
PLANTED = [case for case in test_holders.PLANTED if case[0] is not test_holders.in_a_graph]
nothing_stays_planted = test_holders.nothing_stays_planted


class Model:
    """A network on the card, moved as ComfyUI moves one; its books are what it believes itself."""

    def __init__(self, simcard: Any, card: torch.device, between: Callable[[], Any] = lambda: None) -> None:
        self.simcard, self.card = simcard, card
        self.network = nn.Sequential(*(nn.Linear(512, 640, bias=False) for _ in range(LAYERS)))
        self.rests = torch.device("cpu")
        for layer in self.network:
            HELD.append(between())
            layer.to(card)

    def loaded(self) -> int:
        return sum(weight.nbytes for weight in self.network.parameters() if weight.device == self.card)

    def offload(self, clean: Callable[[], None] | None = None, roots: dict[str, Any] | None = None) -> Receipt:
        subject = Subject(
            "tiny", self.card, self.rests, self.loaded, lambda: self.network.to("cpu") and None,
            self.network.named_parameters, roots or {},
        )  # fmt: skip
        return offload(subject, clean or self.simcard.empty_cache, seconds=20.0)


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    HELD.clear()
    gc.collect()


def test_what_the_receipt_says_left_is_what_the_allocator_lost(simcard, card) -> None:
    simcard.set_up(card, 64 * MIB, context=3 * MIB)
    model, beside = Model(simcard, card), torch.zeros(MIB, device="simcard:1")
    before = simcard.statistics(card)
    receipt = model.offload()
    after = simcard.statistics(card)
    assert receipt.verdict is Verdict.FREED and receipt.asked == SIZE
    assert receipt.left_tensors == before["live"] - after["live"] == SIZE
    assert receipt.left_driver.bytes == before["reserved"] - after["reserved"] == SIZE
    assert probe.read(card).process.bytes == 3 * MIB and simcard.statistics(beside.device)["live"] == beside.nbytes


def test_a_network_that_left_and_came_back_computes_the_same(simcard, card) -> None:
    model, x = Model(simcard, card), torch.randn(3, 512)

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            return [layer(x.to(layer.weight.device)).cpu() for layer in model.network]

    before = results()
    assert model.offload().freed
    torch.testing.assert_close(results(), before)
    model.network.to(card)
    assert model.loaded() == SIZE and all(map(torch.equal, results(), before))


def test_blocks_that_stay_in_the_pool_are_not_called_freed(simcard, card) -> None:
    receipt = Model(simcard, card).offload(clean=lambda: None)
    assert (receipt.verdict, receipt.left_tensors, receipt.left_driver.bytes) == (Verdict.FREED_TO_POOL, SIZE, 0)


def test_small_foreign_blocks_that_hold_its_segments_leave_the_memory_in_the_pool(simcard, card) -> None:
    simcard.set_up(card, 64 * MIB, shared_segment=7 * MIB // 2)
    receipt = Model(simcard, card, lambda: torch.zeros(512 << 10, dtype=torch.uint8, device=card)).offload()
    assert (receipt.verdict, receipt.left_tensors) == (Verdict.FREED_TO_POOL, SIZE)
    assert receipt.after is not None and receipt.after.inactive_split.bytes == SIZE


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_weights_that_somebody_holds_are_still_held_by_the_bytes_and_by_name(simcard, card, layers) -> None:
    model = Model(simcard, card)
    HELD.extend(layer.weight.data for layer in model.network[:layers])
    receipt = model.offload()
    assert (receipt.verdict, receipt.left_tensors) == (Verdict.STILL_HELD, SIZE - layers * LAYER)
    assert sum(holder.bytes for holder in receipt.held) == layers * LAYER and receipt.unnamed == 0
    assert all("global HELD in module" in holder.name for holder in receipt.held)


def test_what_is_not_there_or_cannot_move_is_not_called_freed(simcard, card) -> None:
    model = Model(simcard, card)
    model.rests = card
    assert model.offload().verdict is Verdict.CANNOT_OFFLOAD and model.loaded() == SIZE
    model.network.to("cpu")
    assert model.offload().verdict is Verdict.NOT_LOADED


def test_a_card_that_cannot_be_read_gives_no_verdict(simcard, card, monkeypatch) -> None:
    model = Model(simcard, card)
    monkeypatch.setattr(simcard, "statistics", lambda device: 1 // 0)
    receipt = model.offload()
    assert receipt.verdict is Verdict.UNVERIFIABLE and model.loaded() == 0


@pytest.mark.parametrize(("plant", "roots", "expected"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED])
def test_a_leak_on_the_card_is_named(simcard, card, plant, roots, expected) -> None:
    model = Model(simcard, card)
    keeps = plant(model.network[0].weight.data.flatten())
    receipt = model.offload(roots=roots(keeps) if roots else {})
    assert (receipt.verdict, receipt.left_tensors, receipt.unnamed) == (Verdict.STILL_HELD, SIZE - LAYER, 0)
    name = " | ".join(holder.name for holder in receipt.held)
    assert all(word in name for word in expected), name


@pytest.mark.parametrize("leaked", [0, 64 << 10])
def test_growth_from_run_to_run_is_reported_only_where_there_is_some(simcard, card, leaked) -> None:
    series = []
    for _ in range(leak.MINIMUM_RUNS):
        model = Model(simcard, card)
        HELD.append(torch.zeros(leaked, dtype=torch.uint8, device=card))
        del model
        series.append(probe.read(card).allocated.bytes or 0)
    found = leak.fit(series)
    assert found is not None and (found.leaking, round(found.slope)) == (leaked > 0, leaked)
