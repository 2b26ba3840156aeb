"""Loading a Wan 2.1 VAE from one file."""

from __future__ import annotations

import os

import torch

from ..known_files import refuse_altered
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
    """Loads a `WanVAE` from a .safetensors or .pth file, in `dtype` (None: as stored) on `device`.

        vae = load_wan_vae("Wan2.1_VAE.pth", torch.bfloat16, "cuda")

    Raises:
        CheckpointError (a ValueError): there is no such file, it is not a Wan 2.1 VAE, is damaged or altered, holds
            NaN, or is a pickle of more than tensors.
    """
    file = WeightFile.open(path)
    refuse_altered(file)
    try:
        vae = WanVAE.from_state_dict(file.entries, operations)  # checks names and shapes before any weight is read
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    sd = strip_prefix(dict(file.read(file.entries, dtype, device)))
    vae.load_state_dict(sd, strict=True, assign=True)
    return vae.eval()
