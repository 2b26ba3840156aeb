"""What a steady step asks of a card, counted on the meta device: see benchmarks/card/count.py."""

from __future__ import annotations

import pytest
from steadyvsr.benchmarks.card.count import Counts, count


@pytest.fixture(scope="module")
def counted() -> Counts:
    return count(256, 256, "triton")


def test_a_steady_step_waits_for_the_card_twice_when_its_frames_leave(counted: Counts) -> None:
    """Before, each of 16 input frames, the noise, two rotary tables and each of 8 output frames was waited for."""
    assert counted.syncs == {"output: colour, fp32, download: frames downloaded": 2}


def test_a_step_s_products_are_all_there(counted: Counts) -> None:
    """A count of nothing would wait for nothing."""
    total = counted.total()
    assert total["flops"] > 1e12 and total["launches"] > 2000 and total["downloaded"] == 8 * 3 * 4 * 256 * 256
