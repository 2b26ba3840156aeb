"""The encoder and decoder of an image VAE as a chain of layers, read from the modules themselves.

The modules are those of the latent diffusion code (Rombach et al., 2022), which the VAEs of SD, SDXL, SD3 and Flux use.
They are known by their names: `conv_in`, `down` or `up` with `block`s, `mid`, `norm_out`, `conv_out`. Anything built
differently is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from .layered import Step, attend


def decoder_steps(decoder: nn.Module, pixels: int) -> list[Step]:
    """The chain of a decoder.

    Args:
        pixels: pixels per latent along a side.

    Raises:
        ValueError, AttributeError: the decoder is not built as expected.
    """
    _expect(not getattr(decoder, "tanh_out", False), "it ends in a tanh")
    _expect(not getattr(decoder, "give_pre_end", False), "it ends before its last layer")
    steps = [_conv("conv_in", decoder.conv_in, pixels), *_mid(decoder.mid, pixels)]
    levels: Any = decoder.up
    for index in reversed(range(len(levels))):
        steps += _level(f"up.{index}", levels[index], pixels)
        if index:
            steps.append(_resize(f"up.{index}.upsample", levels[index].upsample, pixels, up=2))
            pixels //= 2
    _expect(pixels == 1, f"it ends at {pixels} pixels per position")
    return [*steps, _conv("conv_out", decoder.conv_out, 1, decoder.norm_out)]


def encoder_steps(encoder: nn.Module, pixels: int) -> list[Step]:
    """The chain of an encoder; see `decoder_steps`."""
    at, levels = 1, list(encoder.down)  # type: ignore[arg-type]
    steps = [_conv("conv_in", encoder.conv_in, at)]
    for index, level in enumerate(levels):
        steps += _level(f"down.{index}", level, at)
        if index < len(levels) - 1:
            steps.append(_resize(f"down.{index}.downsample", level.downsample, at, down=2))
            at *= 2
    _expect(at == pixels, f"it ends at {at} pixels per latent, not {pixels}")
    return [*steps, *_mid(encoder.mid, pixels), _conv("conv_out", encoder.conv_out, pixels, encoder.norm_out)]


def _level(name: str, level: Any, pixels: int) -> Iterator[Step]:
    _expect(len(level.attn) == 0, f"{name} has attention")
    for index, block in enumerate(level.block):
        yield from _residual(f"{name}.block.{index}", block, pixels)


def _mid(mid: Any, pixels: int) -> Iterator[Step]:
    yield from _residual("mid.block_1", mid.block_1, pixels)
    attention = mid.attn_1
    layers = [attention.q, attention.k, attention.v, attention.proj_out]
    _expect(all(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) for layer in layers), "mid.attn_1")
    _expect(isinstance(attention.norm, nn.GroupNorm), "mid.attn_1.norm is no GroupNorm")
    width = layers[0].in_channels
    yield Step("mid.attn_1", partial(attend, attention.norm, *layers), (width, width), pixels, whole=True)
    yield from _residual("mid.block_2", mid.block_2, pixels)


def _residual(name: str, block: Any, pixels: int) -> Iterator[Step]:
    _expect(not hasattr(block, "temb_proj") and not hasattr(block, "conv_shortcut"), name)
    _expect(set(dict(block.named_children())) <= {"swish", "norm1", "conv1", "norm2", "dropout", "conv2",
                                                  "nin_shortcut"}, name)  # fmt: skip
    _expect(isinstance(block.swish, nn.SiLU), f"{name}.swish")
    shortcut = getattr(block, "nin_shortcut", None)
    _expect(shortcut is None or shortcut.kernel_size == (1, 1), f"{name}.nin_shortcut")
    yield _conv(f"{name}.conv1", block.conv1, pixels, block.norm1, keeps=True)
    yield _conv(f"{name}.conv2", block.conv2, pixels, block.norm2, adds=True, shortcut=shortcut)


def _conv(
    name: str,
    conv: Any,
    pixels: int,
    norm: Any = None,
    *,
    keeps: bool = False,
    adds: bool = False,
    shortcut: nn.Module | None = None,
) -> Step:
    _expect(isinstance(conv, nn.Conv2d), f"{name} is no Conv2d")
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    _expect(shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"), f"{name} is {shape}")
    _expect(norm is None or (isinstance(norm, nn.GroupNorm) and norm.affine), f"the norm of {name} is no GroupNorm")
    channels = (conv.in_channels, conv.out_channels)
    return Step(name, conv, channels, pixels, 1, 1, norm=norm, keeps=keeps, adds=adds, shortcut=shortcut)


def _resize(name: str, layer: Any, pixels: int, up: int = 1, down: int = 1) -> Step:
    """Doubles the positions by repetition, or halves them by a stride of 2, after a row and a column of zeros."""
    conv = layer.conv
    _expect(layer.with_conv and isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3), name)
    _expect((conv.stride, conv.padding) == (((1, 1), (1, 1)) if up == 2 else ((2, 2), (0, 0))), name)
    _expect(up == 1 or getattr(layer, "scale_factor", 2.0) == 2.0, name)
    return Step(name, layer, (conv.in_channels, conv.out_channels), pixels, up - 1, 1, up=up, down=down)


def _expect(condition: bool, words: str) -> None:
    if not condition:
        raise ValueError(words)
