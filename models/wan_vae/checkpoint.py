"""Reads a Wan 2.1 VAE from one file."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..operations import cast_on_use
from .model import WanVAE

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

# What safetensors and torch.load raise on damaged files: torch lets most errors of its parser through.
DAMAGED = (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, ValueError,
           TypeError, LookupError, AttributeError, AssertionError)  # fmt: skip


def load_wan_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations=cast_on_use,
) -> WanVAE:
    """A `WanVAE` with the weights of a .safetensors or .pth file, in `dtype` (None: as stored) on `device`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a Wan 2.1 VAE, not readable as its suffix says, or a pickle that holds more than tensors.
    """
    path = Path(path)
    sd = _read_tensors(path)
    try:
        vae = WanVAE.from_state_dict(sd, operations)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return vae.to(device=device, dtype=dtype).eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: expected a Wan 2.1 VAE file; there is none at {path}.")
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in PICKLE_SUFFIXES:
        raise ValueError(f"{path.name}: expected .safetensors, {', '.join(PICKLE_SUFFIXES)}; got {path.suffix!r}.")
    try:
        if suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except DAMAGED as error:
        raise ValueError(
            f"{path.name}: expected a file of weights; it is damaged, or holds code, which is never run ({error}). "
            "Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path.name}: expected a dict of tensors; got something else. Choose a Wan 2.1 VAE file.")
    return loaded
