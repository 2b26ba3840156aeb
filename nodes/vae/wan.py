"""ComfyUI's Wan 2.1 VAE behind our own interface: its layers and weights, our order of computing.

ComfyUI's `encode` and `decode` take whole frames of a whole clip. Its layers do not mind who calls them, so a
`models.wan_vae.WanVAE`, which can compute tiles and chunks, borrows them. Nothing is copied or changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.ldm.wan.vae
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.wan_vae import TiledDecode, TiledEncode, WanVAE, rms_norm
from ...models.wan_vae.layers import RMSNorm
from ...models.wan_vae.state_dict import check_keys, read_sizes
from ...patches.versions import frame_padding
from .trial import carried_out, differs, once

TRIAL_LATENTS, TRIAL_HEIGHT, TRIAL_WIDTH, TRIAL_TILE = 2, 2, 3, 16


class Adoption(NamedTuple):
    """
    Attributes:
        vae: the network behind our interface, with the network's own latents, not normalised; None where it is refused.
        why_not: the reason; empty where there is a VAE.
    """

    vae: WanVAE | None
    why_not: str


class _Conv3d(nn.Module):
    """One of ComfyUI's causal convolutions, without the frames that it would put before its input."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        # 0.3.64 pads frames, rows and columns in the method that is bypassed here.
        self.pads_itself = isinstance(layer._padding, tuple)

    def forward(self, x: Tensor, autopad: str | None = None) -> Tensor:
        if not self.pads_itself:
            compute = super(comfy.ldm.wan.vae.CausalConv3d, self.layer).forward
            return compute(x, autopad=autopad) if autopad else compute(x)
        weight, bias = comfy.ops.cast_bias_weight(self.layer, x)
        if autopad:
            weight = weight[:, :, -x.shape[2] :]
        return F.conv3d(x, weight, bias, self.layer.stride, (0, *frame_padding(self.layer)))


class _Norm(nn.Module):
    """ComfyUI's norm with fewer copies. The weight is looked up at each use, because ComfyUI may replace it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.layer.gamma)


def adopted(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Adoption:
    """The network behind our interface, if it is a Wan 2.1 VAE and computes what ours does.

    The structure is compared layer by layer. Then, once for each network, both encode and decode a small clip.

    Args:
        network: `first_stage_model` of a ComfyUI VAE whose weights are on `device`.
        device, dtype: of the trial.
    """
    if (type(network).__module__, type(network).__name__) != (comfy.ldm.wan.vae.__name__, "WanVAE"):
        return Adoption(None, f"{type(network).__name__} is not ComfyUI's Wan 2.1 VAE")
    try:
        vae = _around(network)
    except (ValueError, AttributeError) as error:
        return Adoption(None, f"its layers are not those of Wan 2.1: {error}")
    why_not = once(network, "clip", lambda: _trial(network, vae, device, dtype))
    return Adoption(None if why_not else vae, why_not)


def _around(network: Any) -> WanVAE:
    """
    Raises:
        ValueError: a weight or a layer is not as in Wan 2.1.
        AttributeError: a layer is missing.
    """
    sd = network.state_dict()
    if not {"decoder.head.2.weight", "conv2.weight"} <= sd.keys():
        raise ValueError("decoder.head.2.weight or conv2.weight is missing")
    dim, latent_channels = read_sizes(sd)
    with torch.device("meta"):
        vae = WanVAE(dim, latent_channels, latents_mean=(0,) * latent_channels, latents_std=(1,) * latent_channels)
    check_keys(vae, sd)
    for name, layer in list(vae.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Conv3d | RMSNorm):
            parent, _, key = name.rpartition(".")
            setattr(vae.get_submodule(parent), key, _borrowed(name, layer, network.get_submodule(name)))
    return vae


def _borrowed(name: str, layer: nn.Module, theirs: Any) -> nn.Module:
    if isinstance(layer, RMSNorm):
        if type(theirs).__name__ != "RMS_norm" or isinstance(theirs.bias, Tensor):
            raise ValueError(f"{name} is not its norm")
        return _Norm(theirs)
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    if not isinstance(theirs, nn.Conv3d if isinstance(layer, nn.Conv3d) else nn.Conv2d):
        raise ValueError(f"{name} is a {type(theirs).__name__}")
    ours = layer.kernel_size, layer.stride, layer.dilation, layer.groups, layer.padding[-2:]
    found = theirs.kernel_size, theirs.stride, theirs.dilation, theirs.groups, frame_padding(theirs)
    if ours != found:
        raise ValueError(f"{name} has kernel, stride, dilation, groups, padding {found}, not {ours}")
    return _Conv3d(theirs) if isinstance(layer, nn.Conv3d) else theirs


def _trial(network: Any, vae: WanVAE, device: torch.device, dtype: torch.dtype) -> str:
    """Empty, or how the two differ on a clip of two latent frames."""
    generator = torch.Generator().manual_seed(0)
    size = TRIAL_LATENTS, TRIAL_HEIGHT, TRIAL_WIDTH
    latents = torch.randn(1, vae.z_dim, *size, generator=generator)
    frames = torch.rand(1, 3, 4 * size[0] - 3, 8 * size[1], 8 * size[2], generator=generator) * 2 - 1

    def decoded(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        job = TiledDecode(vae, latents, TRIAL_TILE, device=device, dtype=dtype, finish=lambda x: x)
        return carried_out(job), network.decode(latents.to(device, dtype))

    def encoded(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        job = TiledEncode(vae, frames, TRIAL_TILE, device=device, dtype=dtype)
        return carried_out(job), network.encode(frames.to(device, dtype))

    with torch.no_grad():
        return differs("decoding a trial clip", decoded, network, device, dtype) or differs(
            "encoding a trial clip", encoded, network, device, dtype
        )
