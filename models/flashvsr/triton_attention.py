"""Block-sparse attention in Triton: the "triton" backend of `attention`.

The selected pairs of all rows (a row: one head's query block) lie one after another, and every program takes an equal
share of them. One program per row would let the longest lists decide when the kernel ends; what a share leaves of a row
is merged afterwards. Nothing waits for the device, so a step stays one stream of launches.

Softmax as in FlashAttention (Dao et al., 2022, algorithm 1), in base 2, accumulated in fp32. Layout HBTD, contiguous.
"""

# Kernels are Triton's language, which only looks like Python to a type checker.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .windows import BLOCK_TOKENS

CPU_PROGRAMS = 5
"""Shares in Triton's interpreter: several, and no divisor of the usual numbers of rows."""
TILE = 64
TILE_FP32 = 16
"""Keys in one product: the largest whose two pipeline stages fit into the shared memory of every card from sm_80 on."""
WARPS, STAGES = 8, 2


@triton.jit
def _lists(Mask, Lists, Counts, key_blocks, SIZE: tl.constexpr):
    """One row of the mask → the selected key blocks in rising order, and how many there are."""
    row = tl.program_id(0)
    lane = tl.arange(0, SIZE)
    chosen = tl.load(Mask + row.to(tl.int64) * key_blocks + lane, mask=lane < key_blocks, other=0) != 0
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(Lists + row.to(tl.int64) * key_blocks + place, lane, mask=chosen)
    tl.store(Counts + row, tl.sum(chosen.to(tl.int32)))


@triton.jit
def _last_row(Offsets, at, rows, SEARCH: tl.constexpr, BEFORE: tl.constexpr):
    """The last row whose pairs begin at `at` or before it (BEFORE: strictly before it), by bisection."""
    row = 0
    for bit in range(SEARCH):
        trial = row + (1 << (SEARCH - 1 - bit))
        if trial < rows:
            begins = tl.load(Offsets + trial)
            row = tl.where((begins < at) if BEFORE else (begins <= at), trial, row)
    return row


@triton.jit
def _attend(
    Q, K, V, Out, Lists, Counts, Offsets, Partial, Scalars,
    scale_log2, query_blocks, key_blocks, rows,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One share. Offsets (rows + 1) is the running sum of Counts."""
    PARTS: tl.constexpr = BLOCK // TILE
    program = tl.program_id(0)
    pairs = tl.load(Offsets + rows)
    share = (pairs + tl.num_programs(0) - 1) // tl.num_programs(0)
    start = program * share
    end = tl.minimum(start + share, pairs)
    lane = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, BLOCK)
    within = tl.arange(0, TILE)
    # Strictly before: empty rows in front of the share are this program's, too, and two that store zeros do no harm.
    row = _last_row(Offsets, start, rows, SEARCH, True)
    done = row >= rows
    while not done:
        begins = tl.load(Offsets + row)
        count = tl.load(Counts + row)
        first = tl.maximum(start - begins, 0)
        last = tl.minimum(end - begins, count)
        if (last > first) | (count == 0):
            token = (row * BLOCK + inside).to(tl.int64)
            q = tl.load(Q + token[:, None] * HEAD_DIM + lane[None, :])
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
            head = (row // query_blocks).to(tl.int64) * key_blocks
            listed = Lists + row.to(tl.int64) * key_blocks
            for step in range(first * PARTS, last * PARTS):
                block = head + tl.load(listed + step // PARTS)
                key = block * BLOCK + (step % PARTS) * TILE + within
                k = tl.load(K + key[None, :] * HEAD_DIM + lane[:, None])
                scores = tl.dot(q, k, input_precision="ieee") * scale_log2
                new = tl.maximum(best, tl.max(scores, 1))
                p = tl.exp2(scores - new[:, None])
                fade = tl.exp2(best - new)
                total = total * fade + tl.sum(p, 1)
                v = tl.load(V + key[:, None] * HEAD_DIM + lane[None, :])
                acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
                best = new
            if last - first == count:
                acc = acc / tl.where(total == 0, 1.0, total)[:, None]
                tl.store(Out + token[:, None] * HEAD_DIM + lane[None, :], acc.to(Out.dtype.element_ty))
            else:
                # Slot 0 continues a row of an earlier program; slot 1 begins one that goes on in a later program.
                slot = (program * 2 + (first == 0).to(tl.int32)).to(tl.int64)
                tl.store(Partial + (slot * BLOCK + inside)[:, None] * HEAD_DIM + lane[None, :], acc)
                tl.store(Scalars + slot * 2 * BLOCK + inside, best)
                tl.store(Scalars + (slot * 2 + 1) * BLOCK + inside, total)
        row += 1
        done = row >= rows
        if not done:
            done = tl.load(Offsets + row) > end


@triton.jit
def _merge(
    Out, Offsets, Partial, Scalars, rows, programs,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One program per border between two shares: puts the parts of the row that is cut there together."""
    border = tl.program_id(0) + 1
    pairs = tl.load(Offsets + rows)
    share = (pairs + programs - 1) // programs
    at = border * share
    row = _last_row(Offsets, at, rows, SEARCH, False)
    begins = tl.load(Offsets + row)
    ends = tl.load(Offsets + row + 1)
    # A row that lies over several borders is the first one's.
    if (begins < at) & (at < ends) & (begins >= at - share):
        inside = tl.arange(0, BLOCK)
        lane = tl.arange(0, HEAD_DIM)
        slot = ((border - 1) * 2 + 1).to(tl.int64)
        best = tl.load(Scalars + slot * 2 * BLOCK + inside)
        total = tl.load(Scalars + (slot * 2 + 1) * BLOCK + inside)
        acc = tl.load(Partial + (slot * BLOCK + inside)[:, None] * HEAD_DIM + lane[None, :])
        program = border
        while program * share < ends:
            slot = (program * 2).to(tl.int64)
            other = tl.load(Scalars + slot * 2 * BLOCK + inside)
            new = tl.maximum(best, other)
            mine, theirs = tl.exp2(best - new), tl.exp2(other - new)
            total = total * mine + tl.load(Scalars + (slot * 2 + 1) * BLOCK + inside) * theirs
            part = tl.load(Partial + (slot * BLOCK + inside)[:, None] * HEAD_DIM + lane[None, :])
            acc = acc * mine[:, None] + part * theirs[:, None]
            best = new
            program += 1
        token = (row * BLOCK + inside).to(tl.int64)
        tl.store(Out + token[:, None] * HEAD_DIM + lane[None, :], (acc / total[:, None]).to(Out.dtype.element_ty))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, programs: int | None = None) -> Tensor:
    """`attention.sparse_attention` in Triton.

    Args:
        programs: shares that the work is cut into. None: one per multiprocessor. Each needs 132 KB of workspace at head
            dim 128.

    Raises:
        RuntimeError: Triton cannot run on the tensors' device.
    """
    heads, query_blocks, _, head_dim = queries.shape
    key_blocks, rows, device = keys.shape[1], heads * query_blocks, queries.device
    if programs is None:
        on_card = device.type == "cuda"
        programs = torch.cuda.get_device_properties(device).multi_processor_count if on_card else CPU_PROGRAMS
    queries, keys, values = (x.contiguous() for x in (queries, keys, values))
    out = torch.empty_like(queries)
    lists = torch.empty(rows, key_blocks, dtype=torch.int32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    partial = torch.empty(programs * 2, BLOCK_TOKENS, head_dim, dtype=torch.float32, device=device)
    # Of each partial result the largest score and the sum of the exponentials.
    scalars = torch.empty(programs * 2, 2, BLOCK_TOKENS, dtype=torch.float32, device=device)
    sizes = {"BLOCK": BLOCK_TOKENS, "HEAD_DIM": head_dim, "SEARCH": max(1, (rows - 1).bit_length())}
    _lists[(rows,)](
        mask.contiguous().view(torch.uint8), lists, counts, key_blocks, SIZE=triton.next_power_of_2(key_blocks)
    )
    torch.cumsum(counts, 0, out=offsets[1:])
    _attend[(programs,)](
        queries, keys, values, out, lists, counts, offsets, partial, scalars,
        head_dim**-0.5 / math.log(2), query_blocks, key_blocks, rows,
        TILE=TILE_FP32 if keys.dtype == torch.float32 else TILE, num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
    if programs > 1:
        _merge[(programs - 1,)](out, offsets, partial, scalars, rows, programs, num_warps=WARPS, **sizes)
    return out
