"""Which tensors are alive: for tests that nothing of a run is held after it."""

from __future__ import annotations

import gc

import torch
from torch import Tensor


def live_tensors(since: set[int] | None = None) -> list[Tensor]:
    """Tensors that Python can reach through the collector, except those whose `id` is in `since`."""
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in (since or ())]
