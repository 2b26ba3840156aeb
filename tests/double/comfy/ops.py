"""Layers whose weights follow their input: to its device and dtype, at each use."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_bias_weight(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer.weight.to(x), None if layer.bias is None else layer.bias.to(x)
    for change in getattr(layer, "weight_function", ()):
        weight = change(weight)
    return weight, bias


class disable_weight_init:
    """Torch's layers; ComfyUI's skip the random start."""

    Linear, Conv1d, Conv2d, Conv3d = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
    LayerNorm, GroupNorm, Embedding = torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.Embedding


class manual_cast(disable_weight_init):
    class Linear(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, *cast_bias_weight(self, x))

    class Conv2d(torch.nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, *cast_bias_weight(self, x))

    class Conv3d(torch.nn.Conv3d):
        def forward(self, x: Tensor, autopad: str | None = None) -> Tensor:
            weight, bias = cast_bias_weight(self, x)
            if autopad == "causal_zero":
                weight = weight[:, :, -x.shape[2] :]
            return self._conv_forward(x, weight, bias)

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            weight, bias = (None, None) if self.weight is None else cast_bias_weight(self, x)
            return torch.nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
