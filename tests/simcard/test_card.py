"""The simulated card itself: it counts, it fills up, it fragments, and computes what the CPU computes."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from steadyvsr.memory import probe

MIB = 1 << 20


def test_live_bytes_follow_the_tensors_and_the_pool_keeps_what_is_freed(simcard, card) -> None:
    x = torch.zeros(MIB, dtype=torch.uint8, device=card)
    assert simcard.statistics(card)["live"] == MIB
    del x
    found = simcard.statistics(card)
    assert (found["live"], found["reserved"], found["peak"]) == (0, MIB, MIB)
    simcard.empty_cache()
    assert simcard.statistics(card)["reserved"] == 0


def test_a_full_card_raises_torch_s_own_error_and_stays_usable(simcard, card) -> None:
    simcard.set_up(card, 4 * MIB)
    kept = torch.zeros(3 * MIB, dtype=torch.uint8, device=card)
    with pytest.raises(torch.OutOfMemoryError, match="simcard:0 out of memory"):
        torch.zeros(2 * MIB, dtype=torch.uint8, device=card)
    assert torch.zeros(MIB // 2, dtype=torch.uint8, device=card).sum().item() == 0 and kept.numel()


def test_pooled_blocks_are_given_back_before_the_card_is_called_full(simcard, card) -> None:
    simcard.set_up(card, 4 * MIB)
    torch.zeros(3 * MIB, dtype=torch.uint8, device=card)
    assert torch.zeros(4 * MIB, dtype=torch.uint8, device=card).numel() == 4 * MIB


def test_the_context_is_taken_once_and_never_returned(simcard, card) -> None:
    simcard.set_up(card, 8 * MIB, context=2 * MIB)
    torch.zeros(1, device=card)
    gc.collect()
    simcard.empty_cache()
    assert probe.read(card).process.bytes == 2 * MIB
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(7 * MIB, dtype=torch.uint8, device=card)


def test_one_small_tensor_keeps_its_shared_segment(simcard, card) -> None:
    simcard.set_up(card, 64 * MIB, shared_segment=4 * MIB)
    blocks = [torch.zeros(MIB // 2, dtype=torch.uint8, device=card) for _ in range(8)]
    assert simcard.statistics(card)["reserved"] == 4 * MIB
    del blocks[1:]
    simcard.empty_cache()
    found = simcard.statistics(card)
    assert (found["live"], found["reserved"], found["inactive_split"]) == (MIB // 2, 4 * MIB, 7 * MIB // 2)


def test_each_card_counts_for_itself(simcard, card) -> None:
    x = torch.zeros(MIB, dtype=torch.uint8, device="simcard:1")
    assert (simcard.statistics(0)["live"], simcard.statistics(1)["live"]) == (0, MIB)
    moved = x.to(card)
    assert (simcard.statistics(0)["live"], simcard.statistics(1)["live"]) == (MIB, MIB) and moved.device == card


def test_what_is_copied_to_the_card_and_from_it_is_counted(simcard, card) -> None:
    before = simcard.statistics(card)
    x = torch.zeros(3 * MIB, dtype=torch.uint8).to(card)
    x[:MIB].clone().cpu()
    after = simcard.statistics(card)
    assert after["copied_in"] - before["copied_in"] == 3 * MIB
    assert after["copied_out"] - before["copied_out"] == MIB


def test_it_computes_what_the_cpu_computes(card) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4, 3, 9, 9, generator=generator), torch.randn(8, 4, 3, 3, 3, generator=generator)

    def work(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = F.conv3d(x, weight).relu().flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y).softmax(-1).sort(-1).values.unfold(1, 3, 2)

    torch.testing.assert_close(work(x.to(card), weight.to(card)).cpu(), work(x, weight))


def test_the_probe_reads_the_allocator(simcard, card) -> None:
    x = torch.zeros(3 * MIB, dtype=torch.uint8, device=card)
    reading = probe.read(card)
    assert (reading.device, reading.allocated.bytes, reading.allocated.source) == ("simcard:0", x.nbytes, "simcard")
    assert reading.total.bytes == 8 << 30 and reading.free == reading.total.bytes - x.nbytes
