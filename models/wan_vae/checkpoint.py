"""Reads a Wan 2.1 VAE from one file."""

from __future__ import annotations

import os

import torch

from ..operations import cast_on_use
from ..weight_file import CheckpointError, WeightFile
from .model import WanVAE
from .state_dict import strip_prefix


def load_wan_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations=cast_on_use,
) -> WanVAE:
    """A `WanVAE` with the weights of a .safetensors or .pth file, in `dtype` (None: as stored) on `device`.

    Raises:
        CheckpointError (a ValueError): no such file, not a Wan 2.1 VAE, damaged, holding NaN, or a pickle that holds
            more than tensors.
    """
    file = WeightFile.open(path)
    try:
        vae = WanVAE.from_state_dict(file.entries, operations)  # names and shapes, before a weight is read
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    sd = strip_prefix(dict(file.read(file.entries, dtype, device)))
    vae.load_state_dict(sd, strict=True, assign=True)
    return vae.eval()
