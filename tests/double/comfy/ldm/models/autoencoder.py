"""Image VAEs of the kind of SD."""

from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn


class AutoencoderKL(nn.Module):
    def __init__(self, ddconfig: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x)).chunk(2, 1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
