"""The decoder over a whole clip at once, for training.

A memory block looks at its own input one time step earlier, never at its own output, so all time steps of a clip can
share one convolution call. Same weights and the same result as `TCDecoder.forward` from a fresh memory.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.flashvsr.tc_decoder import MemBlock, TCDecoder, condition_cells, phase_kernels, upsample_phases

_BLOCKS = ((5, 6, 7), (11, 12, 13), (17, 18, 19))
_TRANSITIONS = ((9, 10), (15, 16), (21, 22))
_FIRST_FRAMES = 3


def decode_clip(decoder: TCDecoder, latents: Tensor, condition: Tensor) -> Tensor:
    """latents NTCHW with T latents, condition NTCHW with 4T - 3 frames in -1..1 → frames NTCHW with 4T - 3 frames."""
    batch, time = latents.shape[:2]
    layers = decoder.decoder
    first = condition[:, :1].expand(-1, _FIRST_FRAMES, -1, -1, -1)
    cells = condition_cells(torch.cat([first, condition], 1))
    x = torch.cat([cells, latents], 2).flatten(0, 1)
    x = (3 * torch.tanh(x / 3)).contiguous(memory_format=torch.channels_last)
    x = F.relu(layers[3](F.relu(layers[1](x))))
    for blocks, (grow, conv) in zip(_BLOCKS, _TRANSITIONS, strict=True):
        for index in blocks:
            x = _remember(layers[index], x, batch)
        kernels = phase_kernels(layers[grow].conv.weight, layers[conv].weight, layers[grow].stride)
        x = F.pad(x, (1, 1, 1, 1))
        x = torch.stack([upsample_phases(x, kernel) for kernel in kernels], 1).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)
    x = layers[26](F.relu(layers[24](F.relu(x))))
    return x.unflatten(0, (batch, 4 * time))[:, _FIRST_FRAMES:]


def _remember(block: MemBlock, x: Tensor, batch: int) -> Tensor:
    steps = x.unflatten(0, (batch, -1))
    past = torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], 1)
    return block(x, past.flatten(0, 1).contiguous(memory_format=torch.channels_last))
