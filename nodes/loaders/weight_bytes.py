"""How many bytes the weights of a file will take once loaded, counted from its header before the file is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import comfy.model_management as mm
import torch

from ...models.weight_file import HeaderEntry, read_header

# As the safetensors format spells them. Other formats (integers, packed ones) are kept as stored.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FORCED = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Choices of UNETLoader that override the file's format."""
QUANTISED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")
"""Ends of keys by which ComfyUI recognises weights that it keeps in the file's own format."""
DIFFUSION_MODEL, VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
"""Prefixes in a checkpoint; the rest is the text encoder."""


def total(paths: Iterable[str | Path], count: Callable[[list[HeaderEntry]], int]) -> int:
    """The sum of `count` (one of the functions below) over files; one without a header counts as large as it is."""
    headers = [(path, read_header(path)) for path in paths]
    return sum(os.path.getsize(path) if found is None else count(found) for path, found in headers)


def text_encoder(tensors: list[HeaderEntry]) -> int:
    """ComfyUI leaves large text encoders in the file's format."""
    return sum(tensor.nbytes for tensor in tensors)


def vae(tensors: list[HeaderEntry]) -> int:
    return _converted(tensors, mm.vae_dtype(mm.vae_device(), [torch.bfloat16, torch.float32]))


def checkpoint(tensors: list[HeaderEntry]) -> int:
    """Diffusion model, VAE and text encoder together."""
    model = [tensor for tensor in tensors if tensor.name.startswith(DIFFUSION_MODEL)]
    decoder = [tensor for tensor in tensors if tensor.name.startswith(VAE)]
    rest = [tensor for tensor in tensors if not tensor.name.startswith((DIFFUSION_MODEL, *VAE))]
    return diffusion_model(model) + vae(decoder) + text_encoder(rest)


def diffusion_model(tensors: list[HeaderEntry], weight_dtype: str = "default") -> int:
    """As UNETLoader will hold them."""
    if any(tensor.name.endswith(QUANTISED) for tensor in tensors):
        return text_encoder(tensors)
    dtype = FORCED.get(weight_dtype.removesuffix("_fast"))
    if dtype is None:
        numbers = Counter[str]()
        for tensor in tensors:
            numbers[tensor.dtype] += tensor.numel
        most = FLOATS.get(max(numbers, key=numbers.__getitem__, default=""))
        # Without a device, as ComfyUI asks when it loads: the choice does not depend on where the model then goes.
        dtype = mm.unet_dtype(model_params=numbers.total(), weight_dtype=most)
    return _converted(tensors, dtype)


def _converted(tensors: list[HeaderEntry], dtype: torch.dtype | None) -> int:
    return sum(t.numel * dtype.itemsize if dtype and t.dtype in FLOATS else t.nbytes for t in tensors)
