"""Which VAEs can be computed in tiles with the result of the whole frame, and how."""

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
"""Of the free RAM, for the images between the layers of an image VAE."""


@dataclass(frozen=True)
class ExactPath:
    """Attributes:
    job: begins the computation of a source in tiles of a side.
    predicted: bytes of a tile of a side on the device, beside the weights.
    """

    job: Callable[[Tensor, int], TileJob]
    predicted: Callable[[int], int]


def exact_path(
    vae: Any, encodes: bool, size: tuple[int, int], frames: int, pixels: int
) -> tuple[ExactPath | None, str]:
    """The exact path of a VAE, or None; and in words why.

    Args:
        vae: a ComfyUI VAE object, its weights on its device.
        size: height and width of the frames in pixels.
        frames: of the source: frames to encode, or latents to decode.
        pixels: per latent along a side.
    """
    place = {"device": vae.device, "dtype": vae.vae_dtype}
    found = adopted(vae.first_stage_model, vae.device, vae.vae_dtype)
    if found.vae is not None:
        network = found.vae

        def wan_job(source: Tensor, tile: int) -> TileJob:
            if encodes:
                return TiledEncode(network, source, tile, **place, prepare=vae.process_input)
            return TiledDecode(network, source, tile, **place, finish=vae.process_output)

        latents = 1 + (frames - 1) // FRAMES_PER_LATENT if encodes else frames

        def wan_bytes(tile: int) -> int:
            itemsize = vae.vae_dtype.itemsize
            return peak_bytes(network, encodes=encodes, latents=latents, size=size, tile=tile, itemsize=itemsize)

        return ExactPath(wan_job, wan_bytes), "Wan 2.1: its layers are known, and a trial clip came out the same"
    if getattr(vae, "latent_dim", 2) != 2:
        return None, found.why_not
    steps, why_not = chain_of(vae, encodes, pixels)
    if not steps:
        return None, why_not
    between, free = map_bytes(steps, size, vae.vae_dtype.itemsize), probe.read(torch.device("cpu")).free
    if free is not None and between > RAM_SHARE * free:
        return None, f"the exact path would keep {size_text(between)} of {size_text(free)} free RAM between the layers"

    def image_job(source: Tensor, tile: int) -> TileJob:
        if encodes:
            return LayeredJob(steps, source, tile, **place, prepare=vae.process_input)
        return LayeredJob(steps, source, tile, **place, finish=vae.process_output)

    # On the CPU what lies between the layers is on the device, too.
    beside = between if vae.device.type == "cpu" else 0
    return (
        ExactPath(image_job, lambda tile: beside + predicted_bytes(steps, size, tile, vae.vae_dtype.itemsize)),
        "SD or Flux kind: its layers are known, and a trial image came out the same",
    )
