"""Computing with a network whose weights ComfyUI holds on another device or in another dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CastWeights(nn.Module):
    """Temporarily swaps in copies of the weights on another device or in another dtype; ComfyUI's own are untouched.

    Args:
        network: whose weights are swapped.
        own: where and in what ComfyUI holds them; None once they have left.
    """

    def __init__(self, network: nn.Module, own: tuple[torch.device, torch.dtype] | None) -> None:
        super().__init__()
        self.network = network
        self.own = own
        self._copies: dict[str, Tensor] = {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Makes the copies, or none where ComfyUI's own weights will do."""
        self._copies = {}
        if (device, dtype) != self.own:
            self._copies = {
                name: value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)
                for name, value in [*self.named_parameters(), *self.named_buffers()]
            }

    def run(self, compute: Callable[[], None]) -> None:
        """Calls `compute` with the copies in place."""
        if self._copies:
            torch.func.functional_call(self, self._copies, (compute,))
        else:
            compute()

    def forward(self, compute: Callable[[], None]) -> None:
        compute()
