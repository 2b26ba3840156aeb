"""Runs of a model at full size by shapes alone: on the meta device nothing is computed, but tensors live and die.

The networks take the paths of a GPU, with attention kernels that keep no work space.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from steadyvsr.memory.tracker import StorageTracker
from torch import Tensor

LARGE = 1 << 14


class ShapeTracker(StorageTracker):
    """Peak bytes of live meta storages; a meta tensor that is brought to the CPU has no values there.

    Args:
        exclude: tensors (weights, say) whose storages never count.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        super().__init__(exclude, on_meta=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        aten, settings = torch.ops.aten, (*args[1:], *kwargs.values())
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if on_meta and func is aten._local_scalar_dense.default:
            return 0.5
        # Inference mode hands on `to` itself, other modes what it is made of.
        moves = on_meta and func.overloadpacket in (aten.to, aten._to_copy)
        if moves and any(isinstance(value, torch.device) and value.type == "cpu" for value in settings):
            dtypes = [value for value in settings if isinstance(value, torch.dtype)]
            return torch.empty(args[0].shape, dtype=dtypes[0] if dtypes else args[0].dtype)
        # Caches in RAM are only mapped, never written: at full size they would not fit here.
        if func is aten.copy_.default and args[0].device.type == "cpu" and args[0].numel() >= LARGE:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def _functional() -> types.SimpleNamespace:
    """torch.nn.functional with an attention that allocates its result and nothing else."""
    functional = types.SimpleNamespace(**vars(F))
    functional.scaled_dot_product_attention = lambda queries, keys, values: torch.empty_like(queries)
    return functional


FUSED = {
    "F": _functional(),
    "choose_backend": lambda *_: "flex",
    "sparse_attention": lambda queries, *_: torch.empty_like(queries),
}
"""Attributes of `models.flashvsr.transformer` to replace for a run by shapes."""
