"""ComfyUI's Wan 2.1 VAE as the streaming decoder of FlashVSR's "full" path."""

from __future__ import annotations

import comfy.latent_formats
import comfy.ldm.wan.vae
import torch
from torch import Tensor

from ...models.wan_vae import StreamingDecoder, WanCosts
from ...models.wan_vae.streamed import StreamCache
from ..vae.wan import adopted

LATENT_CHANNELS = 16


class StreamingWanVAE:
    """Decodes one latent after another, in tiles, with a cache that the caller owns.

    ComfyUI's own `decode` takes a whole clip and starts a new cache each time; this class drives the same layers.

    Args:
        vae: a ComfyUI VAE object. Its weights must be loaded (`vae.patcher`) while `decode_stream` runs.
        node: display name, which errors begin with.

    Raises:
        ValueError: it is not a Wan 2.1 VAE with RGB output.
    """

    def __init__(self, vae, node: str) -> None:
        network = vae.first_stage_model
        if not isinstance(network, comfy.ldm.wan.vae.WanVAE):
            raise ValueError(
                f"{node}: expected a Wan 2.1 VAE; got {type(network).__name__}. "
                "Load Wan2.1_VAE.pth (or wan_2.1_vae.safetensors) with Load VAE, or choose the decoder tc."
            )
        latent_channels, frame_channels = network.conv2.in_channels, network.decoder.head[-1].out_channels
        if (latent_channels, frame_channels) != (LATENT_CHANNELS, 3):
            raise ValueError(
                f"{node}: expected a Wan 2.1 VAE with {LATENT_CHANNELS} latent and 3 image channels; "
                f"got {latent_channels} and {frame_channels}. Load Wan2.1_VAE.pth, or choose the decoder tc."
            )
        self.patcher = vae.patcher
        self.device = vae.device
        self.dtype = vae.vae_dtype
        self._node = node
        self._format = comfy.latent_formats.Wan21()
        self._decoder: StreamingDecoder | None = None

    def new_cache(self, device: torch.device | None = None) -> StreamCache:
        return StreamCache(device)

    def copy_cache(self, cache: StreamCache, device: torch.device | None = None) -> StreamCache:
        return cache.copy(device)

    def decode_stream(self, latents: Tensor, cache: StreamCache) -> Tensor:
        """Decodes the next latents of a stream.

        Args:
            latents: NCTHW, normalised (Wan's per-channel mean and deviation removed).
            cache: left by the latents before; changed in place.

        Returns:
            Frames NCTHW, nominally -1..1 and not clamped: 4T, or 4T - 3 at the start.

        Raises:
            ValueError: the network does not compute what Wan 2.1 does.
        """
        if self._decoder is None:
            found = adopted(self.patcher.model, self.device, self.dtype)
            if found.vae is None:
                raise ValueError(
                    f"{self._node}: expected a Wan 2.1 VAE; got another network: {found.why_not}. "
                    "Load Wan2.1_VAE.pth with Load VAE, or choose the decoder tc."
                )
            self._decoder = StreamingDecoder(found.vae)
        raw = self._format.process_out(latents.float()).to(device=self.device, dtype=self.dtype)
        return self._decoder.decode_stream(raw, cache).to(latents.device)

    def costs(self) -> WanCosts:
        """Its memory beside the weights, in a run that can be taken up again after an error."""
        return WanCosts(copies=2, itemsize=self.dtype.itemsize)
