"""The engine and its ladder where memory really runs out: on a card with an allocator of its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from steadyvsr.app.card.random_model import parameters, tiny_model
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.memory_plan import MemoryPlan, smaller
from torch import Tensor

FRAMES, WIDTH, HEIGHT = 17, 96, 64
OPTIONS = StreamOptions(scale=4.0)
SIZE = (384, 256)
CAPACITIES = 20
MODEL = tiny_model()


class Ladder:
    """Remembers the plan that a run has come down to."""

    def __init__(self) -> None:
        self.plan = MemoryPlan()

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        found = smaller(plan, phase, SIZE)
        if found is not None:
            self.plan = found[1]
        return found and found[1]


def clip() -> Tensor:
    return torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(3))


def upscaled(device: torch.device, ladder: Ladder | None = None) -> Tensor:
    down = None if ladder is None else ladder.on_memory_error
    return torch.stack(list(upscale_frames(MODEL, clip(), OPTIONS, device=device, on_memory_error=down)))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return upscaled(torch.device("cpu"))


@pytest.fixture
def empty(simcard, card) -> Iterator[torch.device]:
    """The card, and afterwards the proof that a run left nothing on it."""
    yield card
    gc.collect()
    assert simcard.statistics(card)["live"] == 0


def test_frames_of_the_card_are_those_of_the_cpu_and_nothing_stays_there(simcard, empty, expected) -> None:
    torch.testing.assert_close(upscaled(empty), expected, rtol=0, atol=1e-5)
    found = simcard.statistics(empty)
    assert found["live"] == 0 and found["peak"] > sum(p.nbytes for p in parameters(MODEL))


def test_a_run_that_is_left_in_the_middle_leaves_nothing_on_the_card(simcard, empty) -> None:
    frames = upscale_frames(MODEL, clip(), OPTIONS, device=empty)
    next(frames)
    assert simcard.statistics(empty)["live"] > 0
    frames.close()
    assert simcard.statistics(empty)["live"] == 0


def test_from_an_ample_card_to_one_too_small_for_everything(simcard, empty, expected) -> None:
    """Every capacity gives the same frames, spatial tiles apart, or the error with the table. Never anything else."""
    upscaled(empty)
    peak = simcard.statistics(empty)["peak"]
    outcomes = []
    for step in range(CAPACITIES):
        gc.collect()
        simcard.empty_cache()
        simcard.set_up(empty, int(1.2 * peak * (CAPACITIES - step) / CAPACITIES))
        ladder = Ladder()
        try:
            frames = upscaled(empty, ladder)
        except torch.OutOfMemoryError as error:
            outcomes.append("error")
            assert "out of memory" in str(error)
        else:
            tiled = ladder.plan.tile is not None
            outcomes.append("tiles" if tiled else "equal" if ladder.plan == MemoryPlan() else "equal, smaller plan")
            assert frames.shape == expected.shape
            if not tiled:
                torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
        assert simcard.statistics(empty)["live"] == 0
    assert outcomes[0] == "equal" and outcomes[-1] == "error" and "tiles" in outcomes
    # A smaller card never does better than a larger one.
    order = ["equal", "equal, smaller plan", "tiles", "error"]
    ranks = [order.index(outcome) for outcome in outcomes]
    assert ranks == sorted(ranks)
