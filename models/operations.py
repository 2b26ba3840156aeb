"""Layers whose weights follow their input.

Every network here takes an `operations` argument: a namespace with `Linear`, `Conv2d`, `Conv3d` and `LayerNorm`.
`cast_on_use` is the default. `torch.nn` works where weights and inputs already agree. The nodes pass ComfyUI's own
cast-on-use layers, so that its partial loading can keep weights in RAM.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_like(parameter: Tensor, like: Tensor) -> Tensor:
    """`parameter` on the device and in the dtype of `like`; the same tensor if they agree."""
    return parameter.to(device=like.device, dtype=like.dtype)


def owned(tensor: Tensor) -> Tensor:
    """A contiguous copy, whose storage holds nothing else."""
    return tensor.clone(memory_format=torch.contiguous_format)


def asynchronous(device: torch.device) -> bool:
    """Whether copies between pinned memory and the device need not be waited for."""
    return device.type == "cuda"


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device; where that is possible, without the host waiting for the copy."""
    if tensor.device.type != "cpu" or not asynchronous(device):
        return tensor.to(device)
    # The allocator of pinned memory knows of the copy and keeps the memory until it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def downloaded(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, which the host has waited for once, however many frames it holds."""
    if not asynchronous(tensor.device):
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    result = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    result.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return result


def weight_and_bias(layer: nn.Linear | nn.Conv2d | nn.Conv3d, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer for code that does not call it, on the device and in the dtype of `like`.

    A layer whose weights are not simply its parameters has a method `resolved` that gives them: those of ComfyUI may be
    changed on use, or rest where only ComfyUI knows.
    """
    if (resolved := getattr(layer, "resolved", None)) is not None:
        return resolved(like)
    bias = layer.bias
    return to_like(layer.weight, like), None if bias is None else to_like(bias, like)


_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's matrix product, as torch.compile calls it; None if this PyTorch has none."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; on the CPU, in fp32 and without gradients, computed by oneDNN.

    MKL, which `F.linear` calls there, took more than twice as long on the AMD CPU where both were tried.
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
    """With `autopad="causal_zero"`, as in ComfyUI since 0.33, leaves out the kernel's taps on zeros before the clip."""

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
