"""Encoder and decoder of an image VAE as ComfyUI builds them, in plain torch; by themselves they are very small."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4
CHANNELS, MULTIPLES, LATENT_CHANNELS = 8, (1, 1, 2), 4


class ResnetBlock(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.swish = nn.SiLU()
        self.norm1 = nn.GroupNorm(GROUPS, given, eps=1e-6)
        self.conv1 = nn.Conv2d(given, made, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, made, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1)
        if given != made:
            self.nin_shortcut = nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.swish(self.norm1(x)))
        h = self.conv2(self.dropout(self.swish(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return x + self.proj_out((scores @ v).transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.with_conv, self.conv = True, nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.with_conv, self.conv = True, nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _mid(width: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)
    return mid


class Encoder(nn.Module):
    def __init__(
        self,
        ch: int = CHANNELS,
        ch_mult: Sequence[int] = MULTIPLES,
        num_res_blocks: int = 1,
        z_channels: int = LATENT_CHANNELS,
        double_z: bool = False,
        **_: object,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        given = ch
        for index, multiple in enumerate(ch_mult):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(given, ch * multiple))
                given = ch * multiple
            if index < len(ch_mult) - 1:
                level.downsample = Downsample(given)
            self.down.append(level)
        self.mid = _mid(given)
        self.norm_out = nn.GroupNorm(GROUPS, given, eps=1e-6)
        self.conv_out = nn.Conv2d(given, (1 + double_z) * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(
        self,
        ch: int = CHANNELS,
        ch_mult: Sequence[int] = MULTIPLES,
        num_res_blocks: int = 0,
        z_channels: int = LATENT_CHANNELS,
        **_: object,
    ) -> None:
        super().__init__()
        given = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, given, 3, padding=1)
        self.mid = _mid(given)
        levels = []
        for index in reversed(range(len(ch_mult))):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(given, ch * ch_mult[index]))
                given = ch * ch_mult[index]
            if index:
                level.upsample = Upsample(given)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(GROUPS, given, eps=1e-6)
        self.conv_out = nn.Conv2d(given, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(list(self.up)):
            for block in level.block:
                h = block(h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))
