"""Layers whose weights follow their input.

Every network here takes an `operations` argument: a namespace with `Linear`, `Conv2d`, `Conv3d` and `LayerNorm`.
`cast_on_use` is the default; `torch.nn` works where weights and inputs already agree, and the nodes hand in ComfyUI's
own cast-on-use layers, so that its partial loading can keep weights in RAM.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_like(parameter: Tensor, like: Tensor) -> Tensor:
    """`parameter` in the device and dtype of `like`; the same tensor where they agree."""
    return parameter.to(device=like.device, dtype=like.dtype)


def weight_and_bias(layer: nn.Linear | nn.Conv2d | nn.Conv3d, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of one layer, for code that computes with them in another form than `layer(x)`.

    Returns tensors in the device and dtype of `like`.
    """
    bias = layer.bias
    return to_like(layer.weight, like), None if bias is None else to_like(bias, like)


def _onednn_linear():
    """oneDNN's matrix product, which inductor calls too; None where this PyTorch has none."""
    try:
        return torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
    except AttributeError:
        return None


_ONEDNN_LINEAR = _onednn_linear()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN on the CPU in fp32 without gradients.

    MKL, which `F.linear` asks, takes more than twice oneDNN's time on the AMD CPU it was tried on.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if _ONEDNN_LINEAR is not None and on_cpu and not torch.is_grad_enabled() and torch.backends.mkldnn.enabled:
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, *weight_and_bias(self, input))


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *weight_and_bias(self, input))


class Conv3d(nn.Conv3d):
    """With `autopad="causal_zero"`, as ComfyUI's own since 0.33 has it, taps of the kernel that would meet zeros before
    the first frame are left out."""

    def forward(self, input: Tensor, autopad: str | None = None) -> Tensor:
        weight, bias = weight_and_bias(self, input)
        if autopad == "causal_zero":
            weight = weight[:, :, -input.shape[2] :]
        return self._conv_forward(input, weight, bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else to_like(self.weight, input)
        bias = None if self.bias is None else to_like(self.bias, input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


cast_on_use = SimpleNamespace(Linear=Linear, Conv2d=Conv2d, Conv3d=Conv3d, LayerNorm=LayerNorm)


def rms_gain(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, computed in fp32, times `gain`; returned in x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), gain.to(device=x.device, dtype=torch.float32), eps).to(x.dtype)
