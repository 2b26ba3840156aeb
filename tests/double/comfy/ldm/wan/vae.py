"""The Wan 2.1 VAE computed on a whole clip at once, without the caches of the released code: zeros stand before a clip,
the first frame is a latent of its own, and the second latent is doubled as if nothing had been before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from comfy import ops as comfy_ops
from torch import Tensor, nn

ops = comfy_ops.disable_weight_init


class CausalConv3d(ops.Conv3d):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        frames, rows, columns = self.padding
        self._padding = (columns, columns, rows, rows, 2 * frames, 0)
        self.padding = (0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self._padding))


class RMS_norm(nn.Module):
    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.scale, self.bias = channels**0.5, 0
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(given), nn.SiLU(), CausalConv3d(given, made, 3, padding=1),
            RMS_norm(made), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(made, made, 3, padding=1),
        )  # fmt: skip
        self.shortcut = CausalConv3d(given, made, 1) if given != made else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


def by_frame(layer: nn.Module, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2)
    made = layer(frames.flatten(0, 1))
    return made.unflatten(0, frames.shape[:2]).transpose(1, 2)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMS_norm(channels, 2)
        self.to_qkv, self.proj = ops.Conv2d(channels, 3 * channels, 1), ops.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + by_frame(self._attend, x)

    def _attend(self, frames: Tensor) -> Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.to_qkv(self.norm(frames)).chunk(3, 1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames.shape))


class Resample(nn.Module):
    def __init__(self, channels: int, up: bool, temporal: bool) -> None:
        super().__init__()
        if up:
            first: nn.Module = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            self.resample = nn.Sequential(first, ops.Conv2d(channels, channels // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(channels, channels, 3, stride=2))
        self.up = up
        if temporal:
            more = {"padding": (1, 0, 0)} if up else {"stride": (2, 1, 1)}
            self.time_conv = CausalConv3d(channels, channels * (2 if up else 1), (3, 1, 1), **more)

    def forward(self, x: Tensor) -> Tensor:
        temporal = hasattr(self, "time_conv")
        if self.up and temporal and x.shape[2] > 1:
            doubled = torch.stack(self.time_conv(x[:, :, 1:]).chunk(2, 1), 3).flatten(2, 3)
            x = torch.cat([x[:, :, :1], doubled], 2)
        x = by_frame(self.resample, x)
        if not self.up and temporal and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)
    )  # fmt: skip


def head(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(RMS_norm(given), nn.SiLU(), CausalConv3d(given, made, 3, padding=1))


class Encoder3d(nn.Module):
    def __init__(self, dim: int, made: int, widths: Sequence[int], blocks: int, temporal: Sequence[bool]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, dim, 3, padding=1)
        layers: list[nn.Module] = []
        given = dim
        for level, width in enumerate(widths):
            for _ in range(blocks):
                layers.append(ResidualBlock(given, width))
                given = width
            if level < len(widths) - 1:
                layers.append(Resample(width, up=False, temporal=temporal[level]))
        self.downsamples, self.middle, self.head = nn.Sequential(*layers), middle(given), head(given, made)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder3d(nn.Module):
    def __init__(self, dim: int, given: int, widths: Sequence[int], blocks: int, temporal: Sequence[bool]) -> None:
        super().__init__()
        width = widths[0]
        self.conv1, self.middle = CausalConv3d(given, width, 3, padding=1), middle(width)
        layers: list[nn.Module] = []
        for level, made in enumerate(widths):
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(width, made))
                width = made
            if level < len(widths) - 1:
                layers.append(Resample(made, up=True, temporal=temporal[level]))
                width = made // 2
        self.upsamples, self.head = nn.Sequential(*layers), head(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))


class WanVAE(nn.Module):
    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attn_scales: Sequence[float],
        temperal_downsample: Sequence[bool],
    ) -> None:
        super().__init__()
        widths, temporal = [dim * factor for factor in dim_mult], list(temperal_downsample)
        self.encoder = Encoder3d(dim, 2 * z_dim, widths, num_res_blocks, temporal)
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, 1), CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d(dim, z_dim, widths[::-1], num_res_blocks, temporal[::-1])

    def encode(self, x: Tensor) -> Tensor:
        """Frames NCTHW, T = 4k + 1, in -1..1 → latents."""
        return self.conv1(self.encoder(x)).chunk(2, 1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.conv2(z))
