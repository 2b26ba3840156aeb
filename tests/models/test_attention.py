"""Which blocks attention selects, what it computes, and that it never becomes dense."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from steadyvsr.cli import main
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import StreamOptions, attention
from steadyvsr.models.flashvsr.windows import Grid
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
SCHEMAS = Path(__file__).parents[1] / "node_schemas.json"


def everywhere(blocks: int) -> Tensor:
    return torch.ones(blocks, blocks, dtype=torch.bool)


def random_case(heads: int, query_blocks: int, key_blocks: int, head_dim: int, density: float = 0.5):
    generator = torch.Generator().manual_seed(3)
    shapes = [(heads, n, 128, head_dim) for n in (query_blocks, key_blocks, key_blocks)]
    mask = torch.rand(heads, query_blocks, key_blocks, generator=generator) < density
    return *(torch.randn(shape, generator=generator) for shape in shapes), mask


def test_the_batched_and_the_looped_gather_equal_masked_attention() -> None:
    q, k, v, mask = random_case(2, 3, 5, 32)
    mask[1, 2] = False
    expected = attention._reference(q.double(), k.double(), v.double(), mask)
    for gather in (attention._gather_loop, attention._gather_batched):
        result = gather(q, k, v, mask)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
        assert result[1, 2].abs().max() == 0


def test_a_small_gather_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, mask = random_case(2, 4, 6, 16)
    whole = attention._gather_batched(q, k, v, mask)
    monkeypatch.setattr(attention, "GATHER_BUDGET_BYTES", 1)
    torch.testing.assert_close(attention._gather_batched(q, k, v, mask), whole)


def test_flops_are_those_of_the_selected_blocks_and_no_dense_scores_exist() -> None:
    """12 × 20 blocks, four key groups, density 12 %: dense attention would be eight times the work."""
    head_dim, blocks, groups = 16, 240, 4
    grid = Grid(2, 96, 160)
    q, k, v, _ = random_case(1, blocks, blocks * groups, head_dim)
    window = attention.local_window(grid, 11, CPU)
    mask = attention.select_blocks(attention.pool(q), attention.pool(k), window, 2.0 * 768 * 1280 / (1536 * 2560))
    density = mask.float().mean().item()
    assert 0.115 < density < 0.13
    with FlopCounterMode(display=False) as counter, StorageTracker() as tracker:
        attention.sparse_attention(q, k, v, mask, "gather")
    flops = counter.get_total_flops()
    selected = int(mask.sum())
    assert 0.95 < flops / (selected * 4 * 128 * 128 * head_dim) <= 1.05
    assert tracker.created > blocks
    one_query_block = 128 * blocks * groups * 128
    assert tracker.largest <= one_query_block < blocks * one_query_block


def test_at_most_the_budget_is_selected_for_each_head_and_group() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(3, 18, 8, generator=generator), torch.randn(3, 24, 8, generator=generator)
    mask = attention.select_blocks(queries, keys, everywhere(6), 1.5)
    assert mask.view(3, 3, 6, 24).sum((2, 3)).unique().tolist() == [int(36 * 1.5) - 1]


def test_ties_with_the_threshold_are_all_dropped() -> None:
    mask = attention.select_blocks(torch.zeros(1, 4, 8), torch.zeros(1, 12, 8), everywhere(4), 2.0)
    assert not mask.any()


def test_nothing_outside_the_local_window_is_selected() -> None:
    grid = Grid(2, 32, 48)
    window = attention.local_window(grid, 3, CPU).view(4, 6, 4, 6)
    assert window[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert window[2, 3].sum() == 9
    mask = attention.select_blocks(torch.randn(2, 24, 8), torch.randn(2, 72, 8), window.view(24, 24), 100.0)
    assert not (mask.view(2, 24, 3, 24) & ~window.view(24, 1, 24)).any()
    assert mask.any()


def test_an_even_window_is_the_released_codes() -> None:
    near = attention.local_window(Grid(2, 8, 80), 4, CPU)
    assert near[5].nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_less_than_one_block_is_raised_to_one_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    attention._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "steadyvsr.attention"):
        for _ in range(3):
            mask = attention.select_blocks(torch.randn(2, 4, 8), torch.randn(2, 12, 8), everywhere(4), 0.01)
    assert mask.sum((1, 2)).tolist() == [1, 1]
    assert len(caplog.records) == 1


@pytest.fixture
def fresh_choice():
    attention.choose_backend.cache_clear()
    yield
    attention.choose_backend.cache_clear()


@pytest.mark.parametrize("fault", ["dense", "shifted", "stale", "not a number", "raises"])
def test_a_backend_asked_for_by_name_that_is_wrong_raises(
    fault: str, monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    right, seen = attention.sparse_attention, []

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, backend: str) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no compiler")
        if fault == "not a number":
            return torch.full_like(q, float("nan"))
        seen.append(mask)
        stale = next(old for old in seen if old.shape == mask.shape)
        used = {"dense": torch.ones_like(mask), "shifted": mask.roll(1, 2), "stale": stale}[fault]
        return right(q, k, v, used, "gather")

    monkeypatch.setattr(attention, "sparse_attention", wrong)
    with pytest.raises(attention.AttentionBackendError, match="expected the flex backend to work"):
        attention.choose_backend("flex", CPU, torch.float32)


def test_auto_on_the_cpu_is_gather_and_is_logged(caplog: pytest.LogCaptureFixture, fresh_choice: None) -> None:
    with caplog.at_level(logging.INFO, "steadyvsr.attention"):
        assert attention.choose_backend("auto", CPU, torch.float32) == "gather"
    assert "gather" in caplog.text


@pytest.fixture
def new_backend(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> str:
    """A row that is added to the table, above the others."""
    row = attention.Backend(attention.BACKENDS["gather"].compute, lambda device: True, rank=9)
    monkeypatch.setitem(attention.BACKENDS, "new", row)
    return "new"


def test_a_row_of_the_table_is_a_choice_of_options_and_command_line(
    new_backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert StreamOptions(attention=new_backend).attention == new_backend
    with pytest.raises(SystemExit):
        main(["upscale", "--help"])
    assert "{" + ",".join(attention.backend_choices()) + "}" in capsys.readouterr().out
    assert attention.backend_choices()[-1] == new_backend


def test_the_committed_schema_offers_the_rows_of_the_table() -> None:
    inputs = json.loads(SCHEMAS.read_text(encoding="utf-8"))["SteadyVSR_LoadFlashVSR"]["inputs"]
    (choices,) = (item["choices"] for item in inputs if item["id"] == "attention")
    assert tuple(choices) == attention.backend_choices()


def test_auto_takes_the_highest_rank_that_is_available(new_backend: str) -> None:
    assert attention.choose_backend("auto", CPU, torch.float32) == new_backend


def test_auto_passes_over_a_backend_that_fails_its_self_check(
    new_backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = attention.Backend(lambda q, k, v, mask: torch.ones_like(q), lambda device: True, rank=9)
    monkeypatch.setitem(attention.BACKENDS, new_backend, row)
    assert attention.choose_backend("auto", CPU, torch.float32) == "gather"
    assert "new is not used on cpu" in caplog.text


@pytest.mark.parametrize("choose", [lambda name: StreamOptions(attention=name),
                                    lambda name: attention.choose_backend(name, CPU, torch.float32)])  # fmt: skip
def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(choose) -> None:
    with pytest.raises(ValueError, match=r"attention: expected one of auto, gather, flex, triton; got 'dense'"):
        choose("dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gather_passes_its_self_check(dtype: torch.dtype) -> None:
    assert attention.self_check("gather", CPU, dtype) is None
