"""A network's weights on another device or in another number format, for as long as something is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CastWeights(nn.Module):
    """Where ComfyUI has the weights otherwise, copies stand in their place for as long as `run` runs; its own stay.

    Args:
        network: whose weights.
        device, dtype: in which ComfyUI has them.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._own = (device, dtype)
        self._copies: dict[str, Tensor] = {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Makes them ready for a computation of that kind."""
        self._copies = {}
        if (device, dtype) != self._own:
            self._copies = {
                name: value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)
                for name, value in [*self.named_parameters(), *self.named_buffers()]
            }

    def run(self, compute: Callable[[], None]) -> None:
        if self._copies:
            torch.func.functional_call(self, self._copies, (compute,))
        else:
            compute()

    def forward(self, compute: Callable[[], None]) -> None:
        compute()
