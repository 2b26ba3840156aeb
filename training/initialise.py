"""Analytic start of the nano network: before any training it already enlarges its condition nearly as bicubic does.

The decoder

Every transition of the decoder is "nearest ×2, then 3×3". Along one axis, with taps (p, q, r), the even output reads
p·previous + (q + r)·this and the odd one (p + q)·this + r·next. Two kinds of channels are used per axis and colour:
*a*, read with the tap on the left alone, and *b*, read with the tap in the middle alone:

    even_k = a_{k-1} + b_k        odd_k = a_k + b_k

Their filters over the condition of three cells (24 px) are the least-squares solution for a first-order
autoregressive signal under the degradation of `clips`, given the fixed bilinear taps of the two later transitions.
In two dimensions the filters are outer products: 2×2 kinds × 3 colours × 4 frames = 48 of the 64 first channels.
An offset keeps these channels positive, so that ReLUs pass them. One spare channel holds the constant 1: through it
each transition gives back the offset that zero padding takes from the image's border. Other spare channels keep a
random start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..app.drawn_clips import SCALE
from ..models.flashvsr.lq_projection import PIXELS_PER_TOKEN, CausalLQ4xProjection
from ..models.flashvsr.tc_decoder import TCDecoder
from ..models.flashvsr.transformer import Transformer

CELL = 8
FRAMES_PER_CELL = 4
_CORRELATION = 0.95
"""Of neighbouring pixels in the autoregressive model."""
_MEAN_POWER = 25.0
"""Power of the signal's mean over that of its variation: large, so that the solution keeps constants."""
_RIDGE = 0.02
_SMOOTH = torch.tensor([0.25, 0.5, 0.25])
"""Taps after nearest ×2 that make bilinear interpolation."""
_FIRST_OFFSET = 1.0
_OFFSET = 1.0
_IMAGE_CHANNELS = 3 * FRAMES_PER_CELL
_SPARE_SCALE = 0.5
_PATTERN, _NOISE_SCALE, _TOKEN_POWER = 2.0, 0.5, 0.05
"""Residual stream of the transformer: the constant pattern, the noise, and the tokens' share of the mean square."""
_BLOCK_SCALE = 0.2
_LATENT_SCALE = 3.0


def initialise_decoder(decoder: TCDecoder) -> None:
    """Writes the analytic start into a decoder of channels (≥ 48, ≥ 12, ≥ 6, ≥ 3), in place.

    The final convolution of every memory block becomes zero, so that its residual passes. Spare channels keep the
    values they have, scaled down. The latent channels of the first layer keep theirs for the spare channels only.
    """
    layers = decoder.decoder
    with torch.no_grad():
        _read_condition(layers[1], layers[3])
        for index in (5, 6, 7, 11, 12, 13, 17, 18, 19):
            nn.init.zeros_(layers[index].conv[4].weight)
            nn.init.zeros_(layers[index].conv[4].bias)
        _join_kinds(layers[10])
        _keep_constant(layers[10], 4 * _IMAGE_CHANNELS, _IMAGE_CHANNELS, _FIRST_OFFSET)
        layers[11].conv[4].bias[:_IMAGE_CHANNELS] = _OFFSET - 4 * _FIRST_OFFSET
        _pass_through(layers[9].conv, [list(range(layers[9].conv.in_channels))])
        _pass_through(layers[15].conv, _halves(layers[15].conv.in_channels, _IMAGE_CHANNELS))
        _interpolate(layers[16], _IMAGE_CHANNELS // 2)
        _keep_constant(layers[16], _IMAGE_CHANNELS // 2, _IMAGE_CHANNELS // 2, _OFFSET)
        _pass_through(layers[21].conv, _halves(layers[21].conv.in_channels, _IMAGE_CHANNELS // 2))
        _interpolate(layers[22], 3)
        _keep_constant(layers[22], 3, 3, _OFFSET)
        layers[24].weight.mul_(_SPARE_SCALE)
        layers[24].weight[:3] = 0
        layers[24].weight[range(3), range(3), 1, 1] = 1
        layers[26].weight.zero_()
        layers[26].weight[range(3), range(3), 1, 1] = 0.5
        layers[26].bias.fill_(0.5 - 0.5 * _OFFSET)


def cell_colours(condition: Tensor) -> Tensor:
    """Mean colour of each latent cell: condition NTCHW with 4T - 3 frames → NTCHW with 3 channels, T, H/8, W/8.

    The first cell holds frame 0 alone, as in the decoder.
    """
    batch, frames, colours = condition.shape[:3]
    small = F.avg_pool2d(condition.flatten(0, 1), CELL).unflatten(0, (batch, frames))
    rest = small[:, 1:].unflatten(1, (-1, FRAMES_PER_CELL)).mean(2)
    return torch.cat([small[:, :1], rest], 1)


def hand_over(decoder: TCDecoder, share: float) -> None:
    """Moves a share of the first layer's response to each cell's mean colour to latent channels 0, 1, 2, in place.

    Where these latents hold `cell_colours`, the decoder's result stays the same, up to the soft clamp before it.
    """
    cell = FRAMES_PER_CELL * CELL * CELL
    with torch.no_grad():
        weight = decoder.decoder[1].weight
        planes = weight[:, : 3 * cell].unflatten(1, (3, cell))
        response = planes.sum(2)
        planes -= share * response.unsqueeze(2) / cell
        weight[:, 3 * cell : 3 * cell + 3] = share * response


def axis_filters() -> tuple[Tensor, Tensor]:
    """The filters a, b over 24 px of condition (a cell and its two neighbours), float64."""
    cells, centre = 16, 8
    size, step = cells * CELL, CELL // SCALE
    identity = torch.eye(size, dtype=torch.float64)
    condition = _resize(_resize(identity, size // SCALE), size)
    enlarge = _bilinear(2 * size // SCALE) @ _bilinear(size // SCALE)
    position = torch.arange(size, dtype=torch.float64)
    covariance = _CORRELATION ** (position[:, None] - position).abs() + _MEAN_POWER
    middle = slice(centre * CELL, (centre + 1) * CELL)
    responses = []
    for kind in "ab":
        for tap in range(3 * CELL):
            small = torch.zeros(size // SCALE, size, dtype=torch.float64)
            for cell in range(1, cells - 1):
                sample = condition[CELL * (cell - 1) + tap]
                small[step * cell + 1] += sample
                small[step * (cell + 1) if kind == "a" else step * cell] += sample
            responses.append((enlarge @ small)[middle])
    response = torch.stack(responses)
    weighted = response @ covariance
    gram = torch.einsum("jin,kin->jk", weighted, response) + _RIDGE * torch.eye(len(response), dtype=torch.float64)
    target = weighted[:, range(CELL), range(middle.start, middle.stop)].sum(1)
    a, b = torch.linalg.solve(gram, target).split(3 * CELL)
    return a, b


def _resize(rows: Tensor, size: int) -> Tensor:
    return F.interpolate(rows[None, None], (size, rows.shape[1]), mode="bicubic", antialias=True)[0, 0]


def _bilinear(size: int) -> Tensor:
    matrix = torch.zeros(2 * size, size, dtype=torch.float64)
    for i in range(size):
        matrix[2 * i, i] = matrix[2 * i + 1, i] = 0.75
        matrix[2 * i, max(i - 1, 0)] += 0.25
        matrix[2 * i + 1, min(i + 1, size - 1)] += 0.25
    return matrix


def _read_condition(first: nn.Conv2d, second: nn.Conv2d) -> None:
    """Layers 1 and 3: channel (kind · 3 + colour) · 4 + frame, kind = 2 · (kind of row) + (kind of column)."""
    filters = [taps.float() for taps in axis_filters()]
    used = 4 * _IMAGE_CHANNELS
    assert first.bias is not None
    first.weight[used:] *= _SPARE_SCALE
    first.weight[: used + 1] = 0
    first.bias[:used] = _FIRST_OFFSET
    first.bias[used] = 1
    planes = first.weight[:, : _IMAGE_CHANNELS * CELL * CELL].unflatten(1, (_IMAGE_CHANNELS, CELL, CELL))
    for kind in range(4):
        rows, columns = (filters[i].view(3, CELL) for i in (kind // 2, kind % 2))
        kernel = torch.einsum("iy,jx->yxij", rows, columns)
        for plane in range(_IMAGE_CHANNELS):
            planes[kind * _IMAGE_CHANNELS + plane, plane] = kernel
    second.weight[used:] *= _SPARE_SCALE
    second.weight[: used + 1] = 0
    second.weight[range(used + 1), range(used + 1), 1, 1] = 1


def _join_kinds(conv: nn.Conv2d) -> None:
    """Layer 10: each kind through its own single tap. Output channel = colour · 4 + frame."""
    conv.weight.mul_(_SPARE_SCALE)
    conv.weight[:_IMAGE_CHANNELS] = 0
    for kind in range(4):
        row, column = kind // 2, kind % 2
        for plane in range(_IMAGE_CHANNELS):
            conv.weight[plane, kind * _IMAGE_CHANNELS + plane, row, column] = 1


def _keep_constant(conv: nn.Conv2d, source: int, images: int, offset: float) -> None:
    """Passes the constant channel on as channel `images`, and lets it restore the offset of the image channels."""
    conv.weight[images] = 0
    conv.weight[images, source, 1, 1] = 1
    taps = conv.weight[:images, :source].sum(1)
    conv.weight[:images, source] = -offset * taps
    conv.weight[:images, source, 1, 1] += offset * taps.sum((1, 2))


def _halves(channels: int, images: int) -> list[list[int]]:
    """Source channels of two time steps: the first or second half of each colour's frames, then the spare channels."""
    frames = images // 3
    steps = []
    for step in range(2):
        own = [c * frames + step * (frames // 2) + f for c in range(3) for f in range(frames // 2)]
        steps.append(own + list(range(images, channels)))
    return steps


def _pass_through(conv: nn.Conv2d, sources: list[list[int]]) -> None:
    conv.weight.mul_(_SPARE_SCALE / 2)
    channels = conv.in_channels
    for step, chosen in enumerate(sources):
        rows = conv.weight[step * channels : step * channels + len(chosen)]
        rows.zero_()
        rows[range(len(chosen)), chosen, 0, 0] = 1


def _interpolate(conv: nn.Conv2d, images: int) -> None:
    conv.weight.mul_(_SPARE_SCALE)
    conv.weight[:images] = 0
    conv.weight[range(images), range(images)] = torch.outer(_SMOOTH, _SMOOTH)


def initialise_transformer(transformer: Transformer, projection: CausalLQ4xProjection) -> None:
    """Starts the transformer so that noise - velocity holds no noise, but a projection of the LQ tokens, in place.

    The upper half of the residual stream carries the noise of a 2×2 patch, the lower half a constant pattern (which
    keeps the layer norm's scale steady) and the tokens. The head undoes the mean that the layer norm takes: with a
    lower half of mean zero it is 1/64 of the sum of the normalised noise. Blocks start close to the identity.
    """
    dim = transformer.config.dim
    half = dim // 2
    patch = transformer.config.in_dim * 4
    if patch != half:
        raise ValueError(f"initialise_transformer: expected a width of {2 * patch}; got {dim}.")
    with torch.no_grad():
        pattern = _PATTERN * (1 - 2 * (torch.arange(half) % 2).float())
        embedding = transformer.patch_embedding
        embedding.weight.zero_()
        embedding.weight.view(dim, patch)[half:] = _NOISE_SCALE * torch.eye(patch)
        embedding.bias.zero_()
        embedding.bias[:half] = pattern
        for block in transformer.blocks:
            block.self_attn.o.weight.mul_(_BLOCK_SCALE)
            block.cross_attn.o.weight.mul_(_BLOCK_SCALE)
            block.ffn[2].weight.mul_(_BLOCK_SCALE)
            for layer in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                layer.bias.zero_()
                layer.weight[half:] = 0
            block.modulation.zero_()
            block.modulation[:, (2, 5)] = 1
        for layer in (transformer.time_embedding[2], transformer.time_projection[1]):
            layer.weight.zero_()
            layer.bias.zero_()
        transformer.head.modulation.zero_()
        tokens = projection.linear_layers[0]
        tokens.weight[half:] = 0
        tokens.bias.zero_()
        # Unpatchify reads (row, column, channel), the patch embedding (channel, row, column).
        order = torch.arange(patch).view(-1, 2, 2).permute(1, 2, 0).flatten()
        deviation = (0.5 * _PATTERN**2 + 0.5 * _NOISE_SCALE**2 + _TOKEN_POWER) ** 0.5
        noise = (torch.eye(patch) + 1 / patch) * deviation / _NOISE_SCALE
        head = transformer.head.head
        head.weight[:, half:] = noise[order]
        mixing = nn.init.orthogonal_(torch.empty(patch, half)) * _LATENT_SCALE
        head.weight[:, :half] = -mixing
        head.bias.copy_(mixing @ pattern / deviation)


def initialise_projection(projection: CausalLQ4xProjection) -> None:
    """Makes the first filters constant over the 4×4 px that came from one input pixel, in place."""
    weight = projection.conv1.weight
    cells = PIXELS_PER_TOKEN // SCALE
    with torch.no_grad():
        blocks = weight.unflatten(1, (3, cells, SCALE, cells, SCALE))
        blocks.copy_(blocks.mean((3, 5), keepdim=True).expand_as(blocks) * SCALE)
        weight[..., 1, 1] *= 3
