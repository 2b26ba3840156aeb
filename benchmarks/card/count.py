"""What one steady step (8 output frames) of the released 1.3 B model asks of a card, counted part by part without one.

    python -m steadyvsr.benchmarks.card.count [--size 768x1408] [--backend flex] [--json FILE]

The product's own code runs on the meta device in bf16. A dispatch mode sees every operator as CUDA would get it and
adds up floating-point operations, bytes (each input read once, each output written once), operators that launch a
kernel, operators that make the host wait for the device, and bytes that cross between the two.

Counted, not measured. Operators are exact; kernels are at least as many, since cuDNN and topk may launch several for
one. Stood in for, because meta takes another way than CUDA there: both attentions and `rms_norm` (one kernel each), the
choice of the backend (given), and `operations.uploaded` and `downloaded`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from steadyvsr.app.card.random_model import released_model
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr import (
    CausalLQ4xProjection,
    StreamOptions,
    TCDecoder,
    rotary,
    stream,
    transformer,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
SCALE = 4
BLOCK_SIDE = 128
"""Output pixels of a block's side; a block has as many tokens as pixels of a side."""
FIGURES = ("flops", "bytes", "launches", "syncs", "uploaded", "downloaded")
NO_KERNEL = {
    "view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "slice", "select", "unbind",
    "split", "split_with_sizes", "detach", "alias", "as_strided", "unfold", "diagonal", "lift_fresh", "_reshape_alias",
    "chunk", "empty", "empty_like", "new_empty", "empty_strided", "is_same_size", "record_stream",
}  # fmt: skip
"""Operators that only change how memory is looked at, or allocate it."""
PARTS: tuple[tuple[Any, str, str], ...] = (
    (stream._Engine, "_lq", "input: upload, resize, pad"),
    (CausalLQ4xProjection, "forward", "LQ projection"),
    (stream._Engine, "begin", "noise and latents"),
    (stream._Engine, "transform", "transformer: the rest"),
    (transformer, "rotation", "transformer: rotary table"),
    (transformer, "local_window", "transformer: window"),
    (transformer, "patchify", "transformer: patches, LQ tokens"),
    (transformer, "to_windows", "transformer: patches, LQ tokens"),
    (transformer.Block, "attend", "transformer: gates, residuals"),
    (transformer.Block, "feed", "transformer: gates, residuals"),
    (transformer.Block, "_modulation", "transformer: modulation"),
    (transformer, "_modulate", "transformer: modulation"),
    (transformer.Block, "_attend", "transformer: token layout"),
    (transformer.Block, "_blocks", "transformer: token layout"),
    (transformer.RMSNorm, "forward", "transformer: RMS norms"),
    (transformer, "rotate", "transformer: rotary"),
    (transformer, "pool", "transformer: selection"),
    (transformer, "select_blocks", "transformer: selection"),
    (transformer, "_join", "transformer: keys and values joined"),
    (transformer, "_remember", "transformer: keys and values kept"),
    (transformer.Block, "_attend_prompt", "transformer: attention to the prompt"),
    (transformer.Block, "prompt_keys_values", "transformer: prompt's keys and values"),
    (TCDecoder, "forward", "decoder"),
    (stream._Engine, "decode", "output: colour, fp32, download"),
)
"""Functions of the product and the part that their work counts for; the innermost one of them counts."""


def touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements that a tensor shows: an expanded axis counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def matrix_flops(name: str, args: tuple[Any, ...], out: Tensor) -> int:
    """Of an operator that multiplies matrices; 0 for any other."""
    if name in ("mm", "bmm"):
        return 2 * out.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * out.numel() * args[1].shape[-1]
    return 2 * out.numel() * args[1][0].numel() if name == "convolution" else 0


class Counts(TorchDispatchMode):
    """Adds up, while `on`, under the part that was entered last.

    Attributes:
        parts: part → figure of FIGURES → sum.
        syncs: part and reason → how often the host waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.parts: dict[str, Counter[str]] = defaultdict(Counter)
        self.syncs: Counter[str] = Counter()
        self._entered = ["the rest"]

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        self._entered.append(part)
        try:
            yield
        finally:
            self._entered.pop()

    def counting(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, its work counted under `part`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.inside(part):
                return function(*args, **kwargs)

        return counted

    def add(self, **figures: int) -> None:
        if self.on:
            self.parts[self._entered[-1]].update(figures)

    def waited(self, why: str) -> None:
        if self.on:
            self.syncs[f"{self._entered[-1]}: {why}"] += 1
            self.add(syncs=1)

    def total(self) -> dict[str, int]:
        return {name: sum(part[name] for part in self.parts.values()) for name in FIGURES}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_card = [tensor for tensor in tensors if tensor.device.type == "meta"]
        if name == "_local_scalar_dense" and on_card:
            self.waited("a number read from the device")
            return 0.5
        if name in ("_to_copy", "copy_") and tensors:
            crossed = self._crossed(name, tensors, args, kwargs)
            if crossed is not None:
                return crossed
        result = func(*args, **kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.device.type == "meta"]
        if name in NO_KERNEL or not (made or on_card):
            return result
        # copy_ and fill_ do not read what they write; other in-place operators do.
        read = on_card[1:] if name in ("copy_", "fill_", "zero_") else on_card
        nbytes = sum(map(touched, read)) + sum(map(touched, made))
        self.add(flops=matrix_flops(name, args, made[0] if made else on_card[0]), bytes=nbytes, launches=1)
        return result

    def _crossed(self, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> Tensor | None:
        """A copy between host and device; None for any other."""
        source = tensors[-1] if name == "copy_" else tensors[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        size, waits = source.numel() * source.element_size(), not kwargs.get("non_blocking", False)
        if source.device.type == "meta" and target.type == "cpu":
            self.add(launches=1, downloaded=size)
            if waits:
                self.waited("device to host")
            return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if source.device.type == "cpu" and target.type == "meta":
            self.add(launches=1, uploaded=size)
            if waits:
                self.waited("host to device, pageable")
            return args[0] if name == "copy_" else torch.empty_like(source, device="meta", dtype=kwargs.get("dtype"))
        return None


def selected_pairs(options: StreamOptions, height: int, width: int) -> int:
    """Block pairs that one head of a layer attends to in a steady step, where the threshold selects all it may."""
    rows, columns, reach = height // BLOCK_SIDE, width // BLOCK_SIDE, options.local_range // 2

    def near(count: int) -> int:
        return sum(-reach <= b - a <= options.local_range - 1 - reach for a in range(count) for b in range(count))

    budget = int((rows * columns) ** 2 * options.block_pair_ratio(height, width)) - 1
    return min(budget, near(rows) * near(columns) * (options.cached_pairs + 1))


def count(height: int, width: int, backend: str) -> Counts:
    """One steady step at an output size, from frames of a quarter of its sides."""
    options, counts, model = (
        StreamOptions(scale=SCALE, attention="gather"),
        Counts(),
        released_model("v1.1", torch.bfloat16, META),
    )
    padded = [-(-side // BLOCK_SIDE) * BLOCK_SIDE for side in (height, width)]
    pairs = selected_pairs(options, *padded)

    def one_kernel(queries: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:
        counts.add(flops=4 * queries.numel() * keys.shape[-2], bytes=_moved(queries, keys, values, queries), launches=1)
        return torch.empty_like(queries)

    def sparse(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, name: str) -> Tensor:
        heads, _, tokens, head_dim = queries.shape
        with counts.inside("transformer: lists of blocks"):
            if name == "flex":  # the two operators of `attention._flex` before its kernel
                mask.sum(-1, dtype=torch.int32)
                torch.argsort(mask.int(), dim=-1, descending=True, stable=True).to(torch.int32)
            elif name == "triton":  # lists, their running sum, and the merge of what two shares have of a row
                counts.add(launches=3, bytes=2 * touched(mask))
        with counts.inside("transformer: sparse attention"):
            flops = 4 * heads * pairs * tokens * tokens * head_dim
            counts.add(flops=flops, bytes=_moved(queries, keys, values, queries), launches=1)
        return torch.empty_like(queries)

    def rms_norm(x: Tensor, *_: Any) -> Tensor:
        counts.add(bytes=2 * touched(x), launches=1)
        return torch.empty_like(x)

    # On CUDA both go through pinned memory, which meta has none of: no wait on the way up, one on the way down.
    def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
        counts.add(launches=1, uploaded=touched(tensor))
        return torch.empty_like(tensor, device=device)

    def downloaded(tensor: Tensor) -> Tensor:
        counts.add(launches=1, downloaded=touched(tensor))
        counts.waited("frames downloaded")
        return torch.empty_like(tensor, device="cpu")

    steady = 21 + 8 * options.cached_pairs  # output frames before the first step whose caches are full

    def on_step(phase: str, done: int, total: int | None) -> None:
        counts.on = steady <= done < steady + 8

    functional = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": one_kernel, "rms_norm": rms_norm})
    source = (torch.zeros(height // SCALE, width // SCALE, 3) for _ in range(steady + 24))
    with ExitStack() as patches:
        for owner, name, part in PARTS:
            patches.enter_context(mock.patch.object(owner, name, _method(counts, owner, name, part)))
        for module in (stream, rotary):
            patches.enter_context(mock.patch.object(module, "uploaded", uploaded))
        patches.enter_context(mock.patch.object(stream, "downloaded", downloaded))
        for name, value in (("F", functional), ("choose_backend", lambda *_: backend), ("sparse_attention", sparse)):
            patches.enter_context(mock.patch.object(transformer, name, value))
        for block in model.transformer.blocks:
            linear = [getattr(a, n) for a in (block.self_attn, block.cross_attn) for n in "qkvo"]  # type: ignore
            for layer in linear:
                layer.forward = counts.counting(layer.forward, "transformer: q, k, v, o")
            block.ffn.forward = counts.counting(block.ffn.forward, "transformer: feed-forward")  # type: ignore
        patches.enter_context(counts)
        patches.enter_context(torch.no_grad())
        run = stream.upscale_frames(model, source, options, device=META, dtype=torch.bfloat16, on_step=on_step)
        for _ in zip(range(steady + 8), run, strict=False):
            pass
        run.close()
    return counts


def _moved(*tensors: Tensor) -> int:
    return sum(map(touched, tensors))


def _method(counts: Counts, owner: Any, name: str, part: str) -> Any:
    inner = owner.__dict__[name]
    counted = counts.counting(inner.__func__ if isinstance(inner, staticmethod) else inner, part)
    return staticmethod(counted) if isinstance(inner, staticmethod) else counted


def main(arguments: list[str] | None = None) -> int:
    made = frame.parser(__doc__)
    made.add_argument("--size", default="768x1408", help="height x width of the output, multiples of 4")
    made.add_argument("--backend", default="flex", help="the attention backend to count")
    options = made.parse_args(arguments)
    height, width = map(int, options.size.split("x"))
    counts = count(height, width, options.backend)
    total = counts.total()
    rows = [["part", "TFLOP", "GB", "launches", "syncs", "MB up", "MB down"]]
    ordered = sorted(counts.parts.items(), key=lambda part: -part[1]["bytes"])
    for name, part in [*ordered, ("total", total)]:
        cells = (part["flops"] / 1e12, part["bytes"] / 1e9, part["launches"], part["syncs"])
        crossing = (part["uploaded"] / 1e6, part["downloaded"] / 1e6)
        rows.append([name, *(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in (*cells, *crossing))])
    print(frame.table(rows))
    print(json.dumps(counts.syncs, indent=1))
    figures = {"size": options.size, "backend": options.backend, "total": total, "syncs": counts.syncs}
    return frame.finish(options.json, figures | {"parts": {name: dict(part) for name, part in ordered}})


if __name__ == "__main__":
    raise SystemExit(main())
