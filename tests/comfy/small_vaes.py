"""Small random VAEs that ComfyUI computes with: Wan 2.1, SD (4 channels) and Flux (16), for scripts that have found it.

The double has the first two."""

from __future__ import annotations

import inspect

import comfy.ldm.wan.vae as wan
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

WAN_VAE_SIZES = {
    "dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}  # fmt: skip
SD_SIZES = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def random_weights(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Norms 1, biases 0, the rest normal with the deviation that keeps a signal's size."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, value in network.state_dict().items():
        if value.ndim <= 1 or "gamma" in name:
            made[name] = (torch.zeros if name.endswith("bias") else torch.ones)(value.shape)
        else:
            made[name] = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
    return made


def wan_vae(seed: int = 0) -> comfy.sd.VAE:
    whole = wan.WanVAE
    sd = random_weights(whole(**WAN_VAE_SIZES), seed)
    if "image_channels" not in inspect.signature(whole.__init__).parameters:  # 0.3.64 knows one width alone
        wan.WanVAE = lambda **keywords: whole(**{**keywords, "dim": 8})
    try:
        return comfy.sd.VAE(sd=sd)
    finally:
        wan.WanVAE = whole


def sd_vae(seed: int = 0) -> comfy.sd.VAE:
    sizes = {"ddconfig": SD_SIZES, "embed_dim": 4}
    return comfy.sd.VAE(sd=random_weights(AutoencoderKL(**sizes), seed), config={"params": sizes})


def flux_vae(seed: int = 0) -> comfy.sd.VAE:
    """Built by hand: ComfyUI's own detection takes files of the full width alone."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    sizes = {**SD_SIZES, "z_channels": 16}
    model = "comfy.ldm.modules.diffusionmodules.model"
    network = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{model}.Encoder", "params": sizes},
        decoder_config={"target": f"{model}.Decoder", "params": sizes},
    )
    network.load_state_dict(random_weights(network, seed))
    vae = sd_vae()
    vae.first_stage_model = network.eval()
    vae.latent_channels = 16
    vae.patcher = type(vae.patcher)(vae.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    return vae


def flux2_vae(seed: int = 0) -> comfy.sd.VAE | None:
    """Four positions of the encoder in one latent, with fixed statistics; None where ComfyUI does not know it."""
    sizes = {"ddconfig": {**SD_SIZES, "z_channels": 8, "batch_norm_latent": True}, "embed_dim": 8}
    network = AutoencoderKL(**sizes)
    if getattr(network, "bn", None) is None:
        return None
    vae = comfy.sd.VAE(sd=random_weights(network, seed), config={"params": sizes})
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = 32, 16, 16
    return vae


def taesd_vae(seed: int = 0) -> comfy.sd.VAE:
    """A network of another kind, without a norm."""
    from comfy.taesd.taesd import TAESD

    fixed = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=random_weights(TAESD(latent_channels=4), seed) | fixed)


SMALL_VAES = {"wan": wan_vae, "sd": sd_vae, "flux": flux_vae, "taesd": taesd_vae}


class Local(nn.Module):
    """A network that treats every 8×8 block alone, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.largest = 0
        self.calls = 0

    def _look(self, x: Tensor, unit: int) -> None:
        self.calls += 1
        self.largest = max(self.largest, unit * max(x.shape[-2:]))

    def encode(self, x: Tensor) -> Tensor:
        self._look(x, 1)
        z = F.avg_pool3d(x[:, :, ::4], (1, 8, 8)) if x.ndim == 5 else F.avg_pool2d(x, 8)
        return torch.cat([z] * 6, 1)[:, :16] if x.ndim == 5 else torch.cat([z, z], 1)[:, :4]

    def decode(self, z: Tensor) -> Tensor:
        self._look(z, 8)
        x = z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return x.repeat_interleave(4, 2)[:, :, 3:] if z.ndim == 5 else x


def local_vae(kind: str) -> comfy.sd.VAE:
    """The shell of one of them around a network of that kind."""
    vae = SMALL_VAES[kind]()
    vae.first_stage_model = Local()
    vae.patcher = type(vae.patcher)(vae.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    return vae
