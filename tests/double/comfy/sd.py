"""A VAE in ComfyUI's hands: its network, where it computes, and what its numbers mean."""

from __future__ import annotations

from typing import Any

import torch
from comfy import model_management, model_patcher
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan import vae as wan
from torch import Tensor


class VAE:
    """Of a state dict: Wan 2.1 is known by its keys, an image VAE is described by `config`."""

    def __init__(self, sd: dict[str, Tensor], config: dict[str, Any] | None = None) -> None:
        self.latent_channels, self.latent_dim, self.output_channels = 4, 2, 3
        self.downscale_ratio = self.upscale_ratio = 8  # type: Any
        self.working_dtypes = [torch.float32]
        self.disable_offload = self.not_video = False
        self.extra_1d_channel = None
        self.process_input = lambda pixels: pixels * 2.0 - 1.0
        self.process_output = lambda pixels: ((pixels + 1.0) / 2.0).clamp(0.0, 1.0)
        self.memory_used_encode = lambda shape, dtype: 1767 * shape[2] * shape[3] * dtype.itemsize
        self.memory_used_decode = lambda shape, dtype: 2178 * shape[2] * shape[3] * 64 * dtype.itemsize
        if "decoder.middle.0.residual.0.gamma" in sd:
            self.latent_channels, self.latent_dim = 16, 3
            self.upscale_ratio = (lambda latents: max(0, latents * 4 - 3), 8, 8)
            self.downscale_ratio = (lambda frames: max(0, (frames + 3) // 4), 8, 8)
            self.memory_used_encode = lambda shape, dtype: 6000 * shape[3] * shape[4] * dtype.itemsize
            self.memory_used_decode = lambda shape, dtype: 7000 * shape[3] * shape[4] * 64 * dtype.itemsize
            network: torch.nn.Module = wan.WanVAE(
                dim=sd["decoder.head.0.gamma"].shape[0], z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
                attn_scales=[], temperal_downsample=[False, True, True],
            )  # fmt: skip
        elif config is not None:
            network = AutoencoderKL(**config["params"])
        else:
            raise ValueError("the double knows Wan 2.1 by its keys, and image VAEs with a config")
        network.load_state_dict(sd)
        self.first_stage_model = network.eval().requires_grad_(False)
        self.device, self.output_device = model_management.vae_device(), model_management.intermediate_device()
        self.vae_dtype = model_management.vae_dtype(self.device, self.working_dtypes)
        self.patcher = model_patcher.ModelPatcher(network, self.device, model_management.CPU)
