"""Decoding latents as they come, in tiles: the Wan decoder of FlashVSR's full path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiling.areas import Area
from .layers import CausalCache
from .model import FRAMES_PER_LATENT, PIXELS_PER_LATENT, WanVAE, frame_chunks

STREAM_TILE = 512
"""Side in pixels. Every tile's past is kept between latents, so smaller tiles would save little."""


class StreamCache:
    """The past of one stream: that of whole frames at latent resolution, and that of each tile.

    It rests on `device` (None: where it was computed).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.frame = device, CausalCache(device)
        self.tiles: list[CausalCache] = []

    def copy(self, device: torch.device | None = None) -> StreamCache:
        """An independent cache over the same tensors; with `device`, it rests there from now on."""
        copied = StreamCache(device or self.device)
        copied.frame, copied.tiles = self.frame.copy(device), [tile.copy(device) for tile in self.tiles]
        return copied


class StreamingDecoder:
    """Decodes one latent after another, each in tiles, with the result of the whole frame.

        decoder = StreamingDecoder(load_wan_vae("Wan2.1_VAE.pth"))
        frames = upscale_frames(model, clip, vae=decoder)

    Args:
        vae: the weights, on the device of the latents or in layers that cast on use.
        tile: largest side of a tile in pixels.
    """

    def __init__(self, vae: WanVAE, tile: int = STREAM_TILE) -> None:
        self.vae, self.tile = vae, tile

    def new_cache(self, device: torch.device | None = None) -> StreamCache:
        """Starts a stream. With `device`, its past rests there, and each layer fetches its part when its turn comes."""
        return StreamCache(device)

    def copy_cache(self, cache: StreamCache, device: torch.device | None = None) -> StreamCache:
        """A copy for `decode_stream` to change instead of `cache`; with `device`, it rests there from now on."""
        return cache.copy(device)

    @torch.no_grad()
    def decode_stream(self, latents: Tensor, cache: StreamCache) -> Tensor:
        """Decodes the next latents of a stream.

        Args:
            latents: NCTHW, normalised as the VAE expects.
            cache: left by the latents before; changed in place, and no longer usable after an exception.

        Returns:
            Frames NCTHW, nominally -1..1 and not clamped: 4T of them, or 4T - 3 at the start.
        """
        n, _, t, h, w = latents.shape
        height, width = h * PIXELS_PER_LATENT, w * PIXELS_PER_LATENT
        tiles = Area.whole(height, width).parts(self.tile, PIXELS_PER_LATENT)
        cache.tiles = cache.tiles or [CausalCache(cache.device) for _ in tiles]
        first = 0 if cache.frame.started else FRAMES_PER_LATENT - 1
        frames = latents.new_empty(n, 3, FRAMES_PER_LATENT * t - first, height, width)
        decoder = self.vae.decoder
        for i, (start, stop) in enumerate(frame_chunks(t, cache.frame.started)):
            with cache.frame.chunk():
                x = self.vae.conv2(self.vae.denormalise(latents[:, :, i : i + 1]))
                x = decoder.global_stage(x, cache.frame)
            for area, past in zip(tiles, cache.tiles, strict=True):
                with past.chunk():
                    read = decoder.local_areas(area)[0].of(x).contiguous()
                    area.of(frames)[:, :, start:stop] = decoder.local_stage(read, past, area)
        return frames
