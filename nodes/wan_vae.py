"""ComfyUI's Wan 2.1 VAE as the streaming decoder of FlashVSR's "full" path."""

from __future__ import annotations

from dataclasses import replace

import comfy.latent_formats
import comfy.ldm.wan.vae
import torch
from torch import Tensor

from ..models.flashvsr.footprint import COMFYUI_WAN, WanCosts

LATENT_CHANNELS = 16


class StreamingWanVAE:
    """Decodes one latent after another with a feature cache that the caller owns.

    ComfyUI's own `decode` takes a whole clip and makes its cache anew each time; this drives the same layers.

    Args:
        vae: a ComfyUI VAE object. Its weights must be loaded (`vae.patcher`) while `decode_stream` runs.
        node: the display name that an error begins with.

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
        self._format = comfy.latent_formats.Wan21()

    def decode_stream(self, latents: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        """Decodes the next latents of a stream.

        Args:
            latents: NCTHW, normalised (Wan's per-channel mean and deviation removed).
            cache: of the latents before, changed in place; None starts a stream.

        Returns:
            Frames NCTHW, nominally -1..1 and not clamped: 4T, or 4T - 3 at the start; and the cache.
        """
        network = self.patcher.model
        raw = self._format.process_out(latents.float()).to(device=self.device, dtype=self.dtype)
        hidden = network.conv2(raw)
        if cache is None:
            slots = sum(isinstance(layer, comfy.ldm.wan.vae.CausalConv3d) for layer in network.decoder.modules())
            cache = [None] * slots
        cache[:] = self.copy_cache(cache, self.device)
        frames = []
        for step in range(hidden.shape[2]):
            before = list(cache)
            decoded = network.decoder(hidden[:, :, step : step + 1], feat_cache=cache, feat_idx=[0])
            _keep_two_frames(cache, before)
            # Newer versions return the decoded pieces as a list.
            frames += decoded if isinstance(decoded, list) else [decoded]
        return torch.cat(frames, 2).to(latents.device), cache

    def costs(self) -> WanCosts:
        """What it needs beside its weights."""
        return replace(COMFYUI_WAN, itemsize=self.dtype.itemsize)

    def copy_cache(self, cache: list, device: torch.device | None = None) -> list:
        """A cache that `decode_stream` may change in place of this one, its tensors on `device` if that is given."""
        return [slot.to(device) if isinstance(slot, Tensor) and device is not None else slot for slot in cache]


def _keep_two_frames(cache: list, before: list) -> None:
    """Makes each slot hold its convolution's last two input frames in memory of its own.

    Since 0.33 ComfyUI decodes two latents at a time and a slot holds whatever the last call had: after a single latent
    that is one frame, and the frame before it would be taken for the zeros of a clip's start. The slots are views
    there, too, each of which would keep a whole activation alive.
    """
    for slot, (now, past) in enumerate(zip(cache, before, strict=True)):
        if not isinstance(now, Tensor) or now is past:
            continue
        if now.shape[2] == 1 and isinstance(past, Tensor):
            cache[slot] = torch.cat([past[:, :, -1:].to(now), now], 2)
        elif now.untyped_storage().nbytes() > now.numel() * now.element_size():
            cache[slot] = now.clone()
