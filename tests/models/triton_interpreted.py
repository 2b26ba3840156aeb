"""Values of the Triton backend, in Triton's interpreter: run by test_triton_attention.py, in a process of its own.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported. It (3.6 to 3.9) multiplies bf16 operands of
`tl.dot` wrongly, so values are checked in fp16 and fp32.
"""

from __future__ import annotations

import pytest
import torch
from steadyvsr.models.flashvsr import attention, triton_attention
from torch import Tensor

CPU = torch.device("cpu")


def random_case(seed: int, head_dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a mask with many empty rows, a full one, and heads that differ."""
    generator = torch.Generator().manual_seed(seed)
    heads, query_blocks, key_blocks = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 5, 9))
    mask = torch.rand(heads, query_blocks, key_blocks, generator=generator) < torch.rand((), generator=generator) ** 2
    mask[:, torch.rand(query_blocks, generator=generator) < 0.4] = False
    if seed % 2:
        mask[-1, -1] = True
    q, k, v = (
        torch.randn(heads, blocks, 128, head_dim, generator=generator)
        for blocks in (query_blocks, key_blocks, key_blocks)
    )
    return q, k, v, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_passes_the_self_check_of_every_backend(dtype: torch.dtype) -> None:
    assert attention.self_check("triton", CPU, dtype) is None


@pytest.mark.parametrize("programs", [1, 3, 19])
def test_any_number_of_shares_gives_the_exact_result(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Into a result full of NaN: what no program writes is seen."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))
    for seed in range(3):
        q, k, v, mask = random_case(seed)
        result = triton_attention.attend(q, k, v, mask, programs)
        expected = attention._reference(q.double(), k.double(), v.double(), mask)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
        assert not result[~mask.any(-1)].any()


def test_blocks_that_are_not_selected_are_never_read() -> None:
    q, k, v, mask = random_case(3)
    mask[..., ::2] = False
    expected = triton_attention.attend(q, k, v, mask)
    unused = ~mask.any(1)
    k[unused], v[unused] = float("nan"), float("nan")
    assert unused.any() and torch.equal(triton_attention.attend(q, k, v, mask), expected)


def test_tensors_that_are_not_contiguous_give_the_same() -> None:
    q, k, v, mask = random_case(5)
    scattered = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    assert torch.equal(triton_attention.attend(*scattered, mask), triton_attention.attend(q, k, v, mask))
