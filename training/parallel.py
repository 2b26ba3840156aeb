"""The decoder over whole clips at once, for training.

A memory block looks at its own input one time step earlier, never at its own output, so all time steps of all clips
can share one convolution call. Same weights and the same result as `TCDecoder.forward` from a fresh memory.
Maps are (time · batch)CHW in channels-last memory, time first: the step before is then a shift along the first axis.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.flashvsr.tc_decoder import MemBlock, TCDecoder, condition_cells

_BLOCKS = ((5, 6, 7), (11, 12, 13), (17, 18, 19))
_TRANSITIONS = ((9, 10), (15, 16), (21, 22))
_FIRST_FRAMES = 3


def decode_clip(decoder: TCDecoder, latents: Tensor, condition: Tensor) -> Tensor:
    """latents NTCHW with T latents, condition NTCHW with 4T - 3 frames in -1..1 → frames NTHWC with 4T - 3 frames."""
    batch = len(latents)
    layers = decoder.decoder
    first = condition[:, :1].expand(-1, _FIRST_FRAMES, -1, -1, -1)
    cells = condition_cells(torch.cat([first, condition], 1))
    x = torch.cat([cells, latents], 2).transpose(0, 1).flatten(0, 1)
    x = 3 * torch.tanh(x.contiguous(memory_format=torch.channels_last) / 3)
    x = F.relu(layers[3](F.relu(layers[1](x))))
    for blocks, (grow, conv) in zip(_BLOCKS, _TRANSITIONS, strict=True):
        for index in blocks:
            x = _remember(layers[index], x, batch)
        x = _transition(x, layers[grow].conv.weight, layers[conv].weight, layers[grow].stride, batch)
    x = layers[26](F.relu(layers[24](F.relu(x))))
    return x.permute(0, 2, 3, 1).unflatten(0, (-1, batch))[_FIRST_FRAMES:].transpose(0, 1)


def _remember(block: MemBlock, x: Tensor, batch: int) -> Tensor:
    return block(x, torch.cat([torch.zeros_like(x[:batch]), x[:-batch]]))


def _transition(x: Tensor, grow: Tensor, conv: Tensor, stride: int, batch: int) -> Tensor:
    """Nearest ×2, 1×1 time growth and 3×3 convolution as one transposed convolution (4×4, stride 2)."""
    channels, outputs = conv.shape[1], conv.shape[0]
    mixed = torch.einsum("omyx,smc->csoyx", conv, grow.view(stride, channels, channels)).flatten(1, 2)
    kernel = _spread(_spread(mixed, -1), -2)
    x = F.conv_transpose2d(x, kernel, stride=2, padding=1)
    if stride == 1:
        return x
    steps = [step.unflatten(0, (-1, batch)) for step in x.split(outputs, 1)]
    return torch.stack(steps, 1).flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _spread(taps: Tensor, axis: int) -> Tensor:
    """Taps (p, q, r) after nearest ×2 → the four taps of a transposed convolution: (r, q + r, p + q, p)."""
    p, q, r = taps.unbind(axis)
    return torch.stack([r, q + r, p + q, p], axis)
