"""Bytes of live tensors, counted storage by storage while a block of code runs.

Allocators report what they hold, not what is alive, and on the CPU they report nothing. The tracker counts each storage
that an operator makes inside the `with` block, until its last tensor dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageTracker(TorchDispatchMode):
    """Counts storages made inside it.

    Args:
        exclude: tensors (weights, say) whose storages never count.
        on_meta: counts tensors of the meta device, which hold no bytes, instead of those that do.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once since the start or `reset_peak`.
        created: how many storages were made; 0 means that nothing was watched.
        largest: elements of the largest tensor that an operator returned.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), on_meta: bool = False) -> None:
        super().__init__()
        self._on_meta = on_meta
        self._excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
        self._live: dict[int, int] = {}
        self.now = self.peak = self.created = self.largest = 0

    def reset_peak(self) -> None:
        self.peak = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Storages that an operator was given are not made by it: an input may come from outside the block.
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, Tensor) or (tensor.device.type == "meta") is not self._on_meta:
                continue
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live or key in given or key in self._excluded:
                continue
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.created += 1
            weakref.finalize(storage, self._forget, key)
        return result


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the unique storages under `tensors`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
