"""Exact paths: VAEs whose tiles, put together, are the result of the whole frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...memory import probe
from ...memory.reading import size_text
from ...models.image_vae import LayeredJob, map_bytes, predicted_bytes
from ...models.tiling import TileJob
from ...models.wan_vae import TiledDecode, TiledEncode, peak_bytes
from ...models.wan_vae.model import FRAMES_PER_LATENT
from .image import chain_of
from .wan import adopted

RAM_SHARE = 0.5
"""How much of the free RAM the images between the layers of an image VAE may take."""


@dataclass(frozen=True)
class ExactPath:
    """Attributes:
    job: (source, tile) → the work of computing the source in tiles of that side.
    predicted: tile → bytes that one takes on the device beside the weights.
    """

    job: Callable[[Tensor, int], TileJob]
    predicted: Callable[[int], int]


def exact_path(
    vae: Any, encodes: bool, size: tuple[int, int], frames: int, pixels: int
) -> tuple[ExactPath | None, str]:
    """Returns the exact path of a VAE (or None) and the reason.

    Args:
        vae: a ComfyUI VAE object whose weights are on its device.
        size: height and width of the frames in pixels.
        frames: frames to encode, or latent frames to decode.
        pixels: per latent along a side.
    """
    itemsize = vae.vae_dtype.itemsize
    options: dict[str, Any] = {"device": vae.device, "dtype": vae.vae_dtype}
    options |= {"prepare": vae.process_input} if encodes else {"finish": vae.process_output}
    found = adopted(vae.first_stage_model, vae.device, vae.vae_dtype)
    if found.vae is not None:
        network, tiled = found.vae, TiledEncode if encodes else TiledDecode
        latents = 1 + (frames - 1) // FRAMES_PER_LATENT if encodes else frames

        def wan_bytes(tile: int) -> int:
            return peak_bytes(network, encodes=encodes, latents=latents, size=size, tile=tile, itemsize=itemsize)

        return (
            ExactPath(lambda source, tile: tiled(network, source, tile, **options), wan_bytes),
            "Wan 2.1: its layers are known, and a trial clip came out the same",
        )
    if getattr(vae, "latent_dim", 2) != 2:
        return None, found.why_not
    steps, why_not = chain_of(vae, encodes, pixels)
    if not steps:
        return None, why_not
    between, free = map_bytes(steps, size, itemsize), probe.read(torch.device("cpu")).free
    if free is not None and between > RAM_SHARE * free:
        return None, f"the exact path would keep {size_text(between)} of {size_text(free)} free RAM between the layers"
    # On the CPU, the images between the layers are on the device, too.
    beside = between if vae.device.type == "cpu" else 0
    return (
        ExactPath(
            lambda source, tile: LayeredJob(steps, source, tile, **options),
            lambda tile: beside + predicted_bytes(steps, size, tile, itemsize),
        ),
        "SD or Flux kind: its layers are known, and a trial image came out the same",
    )
