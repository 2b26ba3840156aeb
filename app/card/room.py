"""How many bytes of tensors fit on a card of a given size: predicted, not measured."""

from __future__ import annotations

from ...memory.budget import RESERVE_BYTES, gib
from ...memory.reading import MIB

CARDS_GB = (6, 8, 12, 16, 24)
CONTEXT_BYTES = 512 * MIB
"""What a CUDA process takes besides its tensors: the context with loaded kernels is 300 to 600 MiB by common report.
Predicted, not measured here."""
POOL_SHARE = 0.10
"""What the allocator's pool holds beyond live tensors at a peak. ComfyUI itself asks for 10 % more than a model's size
before a load (`load_models_gpu`: total · 1.1)."""


def room(card_gb: int) -> int:
    """Bytes of live tensors that a card can hold."""
    return int((gib(card_gb) - CONTEXT_BYTES - RESERVE_BYTES) / (1 + POOL_SHARE))
