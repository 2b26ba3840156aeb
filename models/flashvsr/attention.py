"""Locality-constrained block-sparse attention (FlashVSR, section 3): selecting blocks, and attending over them.

Selection matches the released code exactly: pooled queries and keys, a local window, a softmax per query block, then
one strict threshold per head and group of query blocks. Blocks are 128 tokens in window order. No backend ever computes
a pair of blocks that was not selected, and a query block with no selected key block gives zeros.

Layout: HBTD = heads, blocks, 128 tokens, head dim.

To add a backend, write a function with the signature of `sparse_attention` less the name, here or in a module of its
own, and add its row to `BACKENDS`. Options, command line, node, settings and benchmark read that table. What is left:
its name in tests/node_schemas.json (choices only grow), a line in CHANGELOG.md, and a test where it needs more than
`self_check`, which holds every backend to the same float64 result.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import BLOCK_TOKENS, Grid

log = logging.getLogger("steadyvsr.attention")

GATHER_BUDGET_BYTES = 512 << 20
"""Copies of selected keys and values that the batched gather backend may hold at once."""
COMPILER_MINIMUM_CAPABILITY = (8, 0)
SELF_CHECK_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error (L2) of a backend against float64."""


class AttentionBackendError(RuntimeError):
    """The backend asked for by name does not work here, or none does."""


@dataclass(frozen=True)
class Backend:
    """One way to compute `sparse_attention`.

    Attributes:
        compute: (queries, keys, values, mask) → HBTD; see `sparse_attention`.
        available: whether "auto" may try it on a device, without running anything. A backend asked for by name is held
            to its self-check alone.
        rank: "auto" tries the available backends from the highest rank down.
    """

    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    available: Callable[[torch.device], bool]
    rank: int


def local_window(grid: Grid, local_range: int, device: torch.device) -> Tensor:
    """Which key blocks of a frame pair a query block may see: blocks × blocks, bool.

    Block (r', c') is seen from (r, c) iff -(local_range // 2) ≤ r'-r ≤ local_range - 1 - local_range // 2, and columns
    alike. The window is cut at the border, not shifted.
    """

    def near(count: int) -> Tensor:
        offset = torch.arange(count, device=device)[None, :] - torch.arange(count, device=device)[:, None]
        return (offset >= -(local_range // 2)) & (offset <= local_range - 1 - local_range // 2)

    rows, columns = near(grid.block_rows), near(grid.block_columns)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid.blocks, grid.blocks)


def pool(x: Tensor) -> Tensor:
    """Mean over the tokens of each block, in x's dtype as in the released code: HBTD → heads × blocks × head dim."""
    return x.mean(2)


def select_blocks(pooled_queries: Tensor, pooled_keys: Tensor, window: Tensor, topk_ratio: float) -> Tensor:
    """The block mask of one layer and step.

    Args:
        pooled_queries: heads × (query groups · blocks) × head dim.
        pooled_keys: heads × (key groups · blocks) × head dim.
        window: blocks × blocks, bool; see `local_window`.
        topk_ratio: selected pairs over blocks², per head and query group.

    Returns:
        bool, heads × query blocks × key blocks. At most int(blocks² · topk_ratio) - 1 pairs per head and query group
        are true (one where that would be less); ties with the threshold are all false.
    """
    heads, query_blocks, head_dim = pooled_queries.shape
    blocks = window.shape[0]
    scores = pooled_queries @ pooled_keys.transpose(1, 2) / head_dim**0.5
    scores = scores.float().view(heads, query_blocks // blocks, blocks, -1, blocks)
    scores.masked_fill_(~window[:, None, :], float("-inf"))
    share = scores.flatten(3).softmax(-1)
    flat = share.flatten(2)
    budget = int(blocks * blocks * topk_ratio) - 1
    if budget < 1:
        _warn_once(
            f"top-k ratio {topk_ratio:.4g} selects less than one of {blocks}² block pairs per head; raised to one pair"
        )
        budget = 1
    rank = min(flat.shape[-1] - 1, budget)
    threshold = flat.topk(rank + 1, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return (flat > threshold).view(heads, query_blocks, -1)


@functools.lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    log.warning(message)


def sparse_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, backend: str) -> Tensor:
    """Softmax attention of each query block over its selected key blocks.

    Args:
        queries, keys, values: HBTD.
        mask: bool, heads × query blocks × key blocks.
        backend: a key of `BACKENDS`, as returned by `choose_backend`.

    Returns:
        HBTD in queries' dtype; zeros where a row of the mask is empty.
    """
    return BACKENDS[backend].compute(queries, keys, values, mask)


def _gather(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return (_gather_loop if queries.device.type == "cpu" else _gather_batched)(queries, keys, values, mask)


def _gather_loop(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query block at a time: two matrix products over the selected blocks. The fastest exact form on a CPU."""
    heads, query_blocks, tokens, head_dim = queries.shape
    key_blocks = keys.shape[1]
    # CPUs multiply half precision slowly and coarsely; a head in fp32 is small.
    q, k, v = (x.float().flatten(2) for x in (queries * head_dim**-0.5, keys, values))
    q = q.unflatten(2, (tokens, head_dim))
    columns = mask.nonzero()[:, 2].split(mask.sum(-1).flatten().tolist())
    rows = []
    for row, selected in enumerate(columns):
        head, block = divmod(row, query_blocks)
        if not len(selected):
            rows.append(torch.zeros_like(q[head, block]))
            continue
        whole = len(selected) == key_blocks
        k_row, v_row = ((x[head] if whole else x[head].index_select(0, selected)).reshape(-1, head_dim) for x in (k, v))
        rows.append((q[head, block] @ k_row.t()).softmax(-1) @ v_row)
    return torch.stack(rows).view(queries.shape).to(queries.dtype)


def _gather_batched(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Runs query blocks with the same number of selected blocks together: no padding, no token mask."""
    heads, query_blocks, tokens, head_dim = queries.shape
    key_blocks = keys.shape[1]
    offset = torch.arange(heads, device=mask.device)[:, None] * key_blocks
    head_of, _, column = mask.nonzero(as_tuple=True)
    flat_columns = column + offset[head_of, 0]
    counts = mask.sum(-1).flatten()
    starts = counts.cumsum(0) - counts
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    out = torch.zeros_like(q)
    block_bytes = 2 * tokens * head_dim * k.element_size()
    by_count: dict[int, list[int]] = {}
    for row, count in enumerate(counts.tolist()):
        if count:
            by_count.setdefault(count, []).append(row)
    for count, rows in by_count.items():
        step = torch.arange(count, device=mask.device)
        limit = max(1, GATHER_BUDGET_BYTES // (count * block_bytes))
        for chunk in torch.tensor(rows, device=mask.device).split(limit):
            selected = flat_columns[starts[chunk][:, None] + step].flatten()
            k_rows, v_rows = (x.index_select(0, selected).view(len(chunk), 1, count * tokens, head_dim) for x in (k, v))
            out[chunk] = F.scaled_dot_product_attention(q[chunk][:, None], k_rows, v_rows)[:, 0]
    return out.view(queries.shape)


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: outside a compiled graph flex_attention would silently form the dense score matrix.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    count = mask.sum(-1, dtype=torch.int32)[None]
    order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True).to(torch.int32)[None]
    # All blocks go to the "full" list: no token inside a selected block is masked.
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(order),
        count,
        order,
        BLOCK_SIZE=BLOCK_TOKENS,
        seq_lengths=(queries.shape[1] * BLOCK_TOKENS, keys.shape[1] * BLOCK_TOKENS),
        compute_q_blocks=False,
    )
    q, k, v = (x.flatten(1, 2)[None] for x in (queries, keys, values))
    return _compiled_flex()(q, k, v, block_mask=block_mask)[0].view(queries.shape)


def _triton(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    # Triton is no requirement of the pack: PyTorch brings it where it knows the platform.
    from .triton_attention import attend

    return attend(queries, keys, values, mask)


def _compiler_available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= COMPILER_MINIMUM_CAPABILITY


BACKENDS = {
    "gather": Backend(_gather, lambda device: True, rank=0),
    "flex": Backend(_flex, _compiler_available, rank=2),
    # Below flex as long as no card has shown that it is faster; self_check finds whether Triton is there.
    "triton": Backend(_triton, _compiler_available, rank=1),
}
"""Every backend by the name that users choose it by."""


def backend_choices() -> tuple[str, ...]:
    """What a user can choose: "auto", then every name in `BACKENDS`."""
    return ("auto", *BACKENDS)


def check_backend(name: str, field: str = "attention") -> None:
    """Raises a ValueError that lists the choices unless `name` is one of them."""
    if name not in backend_choices():
        raise ValueError(f"{field}: expected one of {', '.join(backend_choices())}; got {name!r}.")


@functools.lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Settles which backend computes the attention of a run, and logs it.

    Args:
        name: a key of `BACKENDS`, or "auto": the highest-ranked available backend that passes its self-check.

    Returns:
        A key of `BACKENDS`.

    Raises:
        ValueError: no such backend.
        AttentionBackendError: the backend asked for by name fails its self-check; with "auto", all of them do.
    """
    check_backend(name)
    ranked = sorted(BACKENDS, key=lambda known: BACKENDS[known].rank, reverse=True)
    candidates = [known for known in ranked if BACKENDS[known].available(device)] if name == "auto" else [name]
    problem = None
    for candidate in candidates:
        problem = self_check(candidate, device, dtype)
        if problem is None:
            log.info("attention: %s on %s, %s", candidate, device, dtype)
            return candidate
        if candidate != candidates[-1]:
            log.warning("attention: %s is not used on %s: %s", candidate, device, problem)
    raise AttentionBackendError(
        f"attention: expected the {candidates[-1]} backend to work on {device} with {dtype}; {problem}. "
        f"Choose attention=auto or another backend."
    )


def self_check(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs a backend on small cases that a dense, shifted or stale mask would spoil.

    The masks have a full row, a row with only the last block, an empty row, and heads that differ; keys of blocks that
    nothing selects are large. Two masks share a shape, to catch a cached one; the third has another.

    Returns:
        None, or what was wrong.
    """
    generator = torch.Generator().manual_seed(7)
    for query_blocks, key_blocks in ((3, 5), (3, 5), (2, 7)):
        mask = torch.rand(2, query_blocks, key_blocks, generator=generator) < 0.5
        mask[0, 0] = True
        mask[1, 0] = False
        mask[1, 1] = torch.arange(key_blocks) == key_blocks - 1
        q, k, v = (
            torch.randn(2, blocks, BLOCK_TOKENS, 128, generator=generator)
            for blocks in (query_blocks, key_blocks, key_blocks)
        )
        unused = ~mask.any(1)
        k[unused] *= 8
        v[unused] += 1000
        q, k, v = (x.to(dtype) for x in (q, k, v))
        expected = _reference(q.double(), k.double(), v.double(), mask)
        try:
            result = sparse_attention(q.to(device), k.to(device), v.to(device), mask.to(device), backend).cpu().double()
        except (RuntimeError, ImportError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
            return f"it failed with {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if not torch.isfinite(result).all():
            return "it gave values that are not finite"
        if result[1, 0].abs().max() != 0:
            return "a query block with no selected keys was not zero"
        difference = ((result - expected).norm() / expected.norm()).item()
        if difference > SELF_CHECK_TOLERANCE.get(dtype, 1e-2):
            return f"its result differs by {difference:.2g} from the exact one"
    return None


def _reference(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Dense masked attention, small enough to hold every score: what `self_check` compares with."""
    q, k, v = (x.flatten(1, 2) for x in (queries, keys, values))
    allowed = mask.repeat_interleave(BLOCK_TOKENS, 1).repeat_interleave(BLOCK_TOKENS, 2)
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v).view(queries.shape)
