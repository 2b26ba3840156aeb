"""How many bytes the weights of a file will take once loaded, counted from its header before the file is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import comfy.model_management as mm
import torch

from ...models.weight_file import HeaderEntry, read_header

# As the safetensors format spells them. Other formats (integers, packed ones) are kept as stored.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
QUANTISED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")
"""Ends of keys by which ComfyUI recognises weights that it keeps in the file's own format."""
DIFFUSION_MODEL, VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
"""Prefixes in a checkpoint; the rest is the text encoder."""


def of_diffusion_model(paths: Iterable[str | Path], weight_dtype: str = "default") -> int:
    """Bytes of the weights as UNETLoader will hold them; files without a header count as large as they are."""
    forced = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    dtype = forced.get(weight_dtype.removesuffix("_fast"))
    return sum(_size(path, lambda tensors: _diffusion_model(tensors, dtype)) for path in paths)


def of_text_encoder(paths: Iterable[str | Path]) -> int:
    """Bytes of the weights of text encoders: ComfyUI leaves the large ones in the file's format."""
    return sum(_size(path, _as_stored) for path in paths)


def of_vae(paths: Iterable[str | Path]) -> int:
    return sum(_size(path, _vae) for path in paths)


def of_checkpoint(path: str | Path) -> int:
    """Bytes of diffusion model, VAE and text encoder together."""

    def count(tensors: list[HeaderEntry]) -> int:
        model = [tensor for tensor in tensors if tensor.name.startswith(DIFFUSION_MODEL)]
        vae = [tensor for tensor in tensors if tensor.name.startswith(VAE)]
        rest = [tensor for tensor in tensors if not tensor.name.startswith((DIFFUSION_MODEL, *VAE))]
        return _diffusion_model(model, None) + _vae(vae) + _as_stored(rest)

    return _size(path, count)


def _size(path: str | Path, count) -> int:
    tensors = read_header(path)
    return Path(path).stat().st_size if tensors is None else count(tensors)


def _diffusion_model(tensors: list[HeaderEntry], dtype: torch.dtype | None) -> int:
    if any(tensor.name.endswith(QUANTISED) for tensor in tensors):
        return _as_stored(tensors)
    if dtype is None:
        numbers = Counter[str]()
        for tensor in tensors:
            numbers[tensor.dtype] += tensor.numel
        most = FLOATS.get(max(numbers, key=numbers.__getitem__, default=""))
        # Without a device, as ComfyUI asks when it loads: the choice does not depend on where the model then goes.
        dtype = mm.unet_dtype(model_params=numbers.total(), weight_dtype=most)
    return _converted(tensors, dtype)


def _vae(tensors: list[HeaderEntry]) -> int:
    return _converted(tensors, mm.vae_dtype(mm.vae_device(), [torch.bfloat16, torch.float32]))


def _converted(tensors: list[HeaderEntry], dtype: torch.dtype | None) -> int:
    if dtype is None:
        return _as_stored(tensors)
    return sum(t.numel * dtype.itemsize if t.dtype in FLOATS else t.nbytes for t in tensors)


def _as_stored(tensors: list[HeaderEntry]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
