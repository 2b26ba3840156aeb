"""Runs of a model at full size by shapes alone: on the meta device nothing is computed, but tensors live and die.

The networks take the paths of a GPU, with attention kernels that keep no work space.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

LARGE = 1 << 14


class ShapeTracker(TorchDispatchMode):
    """Peak bytes of live meta storages; a meta tensor that is brought to the CPU has no values there.

    Args:
        exclude: tensors (weights, say) whose storages never count.
    """

    def __init__(self, exclude: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in exclude}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if on_meta and func is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        if on_meta and func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        # Caches in RAM are only mapped, never written: at full size they would not fit here.
        large = func is torch.ops.aten.copy_.default and args[0].numel() >= LARGE
        if large and args[0].device.type == "cpu":
            return args[0]
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if not isinstance(tensor, Tensor) or tensor.device.type != "meta":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


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
