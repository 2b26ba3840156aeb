"""A FlashVSR model as ComfyUI holds it: one patcher per network, so that ComfyUI moves and counts the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import comfy.ops
import torch
from torch import Tensor

from ...models.flashvsr import FlashVSR, FlashVSRConfig
from ...models.flashvsr.checkpoint import load_flashvsr
from ...models.flashvsr.config import PRECISIONS
from ...patches.versions import patcher_class


class _Resolved:
    """A layer of ComfyUI's that gives its weights, as ComfyUI would use them, to code that computes without calling it.

    `layer.weight` may be another tensor: with dynamic VRAM it stays in RAM, and patches may change it on use.
    """

    def resolved(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        return comfy.ops.cast_bias_weight(self, like)


# manual_cast brings weights to the input's device and dtype at use, which partial loading on a small card needs.
OPERATIONS = SimpleNamespace(
    **{
        name: type(name, (_Resolved, getattr(comfy.ops.manual_cast, name)), {})
        for name in ("Linear", "Conv2d", "Conv3d", "LayerNorm")
    }
)


@dataclass(frozen=True, eq=False)
class LoadedFlashVSR:
    """What the FLASHVSR socket carries. The patchers are the only owners of the networks.

    Attributes:
        name: of the model set, for reports.
        transformer, lq_projection, decoder: ModelPatchers.
        prompt: the text context BLD, part of the model.
        version: v1 | v1.1.
        family: of the checkpoint.
        device, dtype: where and in what to compute.
        attention: auto, or the name of a backend.
    """

    name: str
    transformer: Any
    lq_projection: Any
    decoder: Any
    prompt: Tensor
    version: str
    family: str
    device: torch.device
    dtype: torch.dtype
    attention: str

    @property
    def config(self) -> FlashVSRConfig:
        return self.transformer.model.config

    def patchers(self, decoder: bool = True) -> list[Any]:
        """The patchers that a run needs; not the tiny decoder where a VAE decodes."""
        return [self.transformer, self.lq_projection, *([self.decoder] if decoder else [])]

    def networks(self) -> FlashVSR:
        """The networks as the engine takes them. Do not keep it beyond a run: it holds the weights."""
        return FlashVSR(
            transformer=self.transformer.model,
            lq_projection=self.lq_projection.model,
            decoder=self.decoder.model,
            prompt=self.prompt,
            version=self.version,
            family=self.family,
        )


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype; auto takes bf16 where the device is good at it, else fp16, else fp32 (the CPU)."""
    if precision != "auto":
        return PRECISIONS[precision]
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def load(
    name: str, path: Path, version: str, precision: str, device: str, attention: str, lq_cache_order: str
) -> LoadedFlashVSR:
    """Reads a checkpoint into RAM and wraps its networks; nothing is put on the device before a run."""
    load_device = mm.get_torch_device() if device == "auto" else torch.device(device)
    offload_device = torch.device("cpu") if load_device.type == "cpu" else mm.unet_offload_device()
    dtype = choose_dtype(precision, load_device)
    model = load_flashvsr(
        path,
        version=version,
        lq_cache_order=lq_cache_order,
        dtype=dtype,
        device=offload_device,
        operations=OPERATIONS,
    )
    patcher = patcher_class()
    transformer, lq_projection, decoder = (
        patcher(network, load_device=load_device, offload_device=offload_device)
        for network in (model.transformer, model.lq_projection, model.decoder)
    )
    return LoadedFlashVSR(
        name=name,
        transformer=transformer,
        lq_projection=lq_projection,
        decoder=decoder,
        prompt=model.prompt,
        version=model.version,
        family=model.family,
        device=load_device,
        dtype=dtype,
        attention=attention,
    )
