"""How many bytes a run needs beside the weights: activations at their worst moment, and the state between steps.

Plain integers from sizes. The terms are counted from the shapes in `transformer`, `lq_projection`, `tc_decoder` and
`stream`; the factors in capitals are how many such tensors are alive at the worst moment. tests/test_footprint.py
compares the result with a tracker of all live storages. Not counted: work space inside convolution and attention
kernels, and what an allocator keeps beyond live tensors.
"""

from __future__ import annotations

from .config import BLOCK_PIXELS, LATENT_STRIDE, FlashVSRConfig
from .plan import FIRST_STEP_LATENTS, STEP_LATENTS, padded_size
from .tc_decoder import STRIP_PIXELS
from .transformer import FEED_FORWARD_TOKENS

FP32_BYTES = 4
CLIP_FRAMES = 8
"""Frames of one call of the LQ projection."""
LATENT_FRAMES = 4
"""Frames of one call of the decoder."""
CONDITION_CHANNELS = 768
TOKEN_PIXELS = 256

TRANSFORM_TENSORS = 12
"""Token tensors alive at the worst moment of self-attention, among them the fp32 copies of rotary and RMS norm."""
FEED_FORWARD_TENSORS = 4
"""Token tensors alive beside the feed-forward's own."""
FRAME_COPIES = 3
"""fp32 copies of a clip while it is resized, clamped and padded."""
HALF_STAGE_TENSORS = 2.5
"""Maps at half resolution alive while the decoder's last stage runs."""
LAST_STAGE_TENSORS = 3
"""Maps at full resolution, of one strip."""

WAN_DECODER_ELEMENTS_PER_PIXEL = 5650
"""Feature cache (2,364) and activations of ComfyUI's Wan 2.1 decoder (dim 96), one latent at a time, in elements per
output pixel; counted with the same tracker, the same at every size."""


def activation_bytes(
    config: FlashVSRConfig, size: tuple[int, int], kv_ratio: float, itemsize: int, prompt_tokens: int = 512
) -> int:
    """Peak bytes of activations and state of a run with the TC decoder, without tiling.

    Args:
        size: width and height of the output, before padding.
        kv_ratio: see `StreamOptions`.
        itemsize: bytes of one number of the compute dtype.
        prompt_tokens: length of the prompt context.
    """
    width, height = padded_size(*size)
    pixels = width * height
    state = state_bytes(config, (width, height), kv_ratio, itemsize, prompt_tokens)
    decoder = decoder_state_bytes(config, pixels, itemsize)
    # Before the first frame the decoder remembers nothing, but that step is three times as long.
    first = state - decoder + _transform_bytes(config, pixels, FIRST_STEP_LATENTS, 0, itemsize)
    joined = int(kv_ratio) * STEP_LATENTS
    later = max(
        _project_bytes(config, width, height, itemsize),
        _transform_bytes(config, pixels, STEP_LATENTS, joined, itemsize),
        _decode_bytes(config, pixels, itemsize),
    )
    return max(first, state + later)


def state_bytes(
    config: FlashVSRConfig, padded: tuple[int, int], kv_ratio: float, itemsize: int, prompt_tokens: int = 512
) -> int:
    """Bytes kept between process steps: key/value cache, LQ cache, decoder memory, the prompt's keys and values."""
    pixels = padded[0] * padded[1]
    tokens = pixels // TOKEN_PIXELS
    prompt = config.num_layers * 2 * prompt_tokens * config.dim
    cached = config.num_layers * 2 * int(kv_ratio) * STEP_LATENTS * tokens * config.dim
    pooled = cached // 2 * STEP_LATENTS * TOKEN_PIXELS // BLOCK_PIXELS**2
    lq = 2 * tokens * (CONDITION_CHANNELS + config.lq_hidden[0])
    return (prompt + cached + pooled + lq) * itemsize + decoder_state_bytes(config, pixels, itemsize)


def decoder_state_bytes(config: FlashVSRConfig, pixels: int, itemsize: int) -> int:
    """Bytes of the TC decoder's memory: three maps at each of three resolutions, and its folded kernels."""
    c0, c1, c2, c3 = config.decoder_channels
    maps = 3 * (c0 * pixels // 64 + c1 * pixels // 16 + c2 * pixels // 4)
    kernels = 16 * (c0 * c1 + 2 * c1 * c2 + 2 * c2 * c3)
    return (maps + kernels) * itemsize


def wan_decoder_bytes(size: tuple[int, int], itemsize: int) -> int:
    """Peak bytes of a streamed Wan 2.1 decoder of full width (dim 96), state included, for an output of `size`."""
    width, height = padded_size(*size)
    return width * height * WAN_DECODER_ELEMENTS_PER_PIXEL * itemsize


def _project_bytes(config: FlashVSRConfig, width: int, height: int, itemsize: int) -> int:
    """One clip of 8 frames in the LQ projection: 4 half-latent frames, then 2 latent frames."""
    pixels, tokens = width * height, width * height // TOKEN_PIXELS
    hidden, features = config.lq_hidden
    clip = 3 * CLIP_FRAMES * pixels
    border = (width + 32) * (height + 32) / pixels
    # Each convolution reads windows of 4 frames, once more with a replicated border.
    first = CLIP_FRAMES // 2 * tokens * (4 * CONDITION_CHANNELS * (1 + border) + hidden)
    first += (CLIP_FRAMES + 2) * tokens * CONDITION_CHANNELS
    second = CLIP_FRAMES // 4 * tokens * (4 * hidden * (1 + border) + features)
    second += (CLIP_FRAMES // 2 + CLIP_FRAMES // 2 + 2) * tokens * hidden
    resized = FRAME_COPIES * clip * FP32_BYTES
    return max(resized, int((2 * clip + max(first, second)) * itemsize))


def _transform_bytes(config: FlashVSRConfig, pixels: int, latents: int, cached_latents: int, itemsize: int) -> int:
    """One process step of the transformer: self-attention of all tokens, or the feed-forward of a part of them."""
    tokens = latents * pixels // TOKEN_PIXELS
    joined = 2 * (cached_latents + latents) * pixels // TOKEN_PIXELS * config.dim if cached_latents else 0
    attention = TRANSFORM_TENSORS * tokens * config.dim
    if joined:
        attention = joined + TRANSFORM_TENSORS // 2 * tokens * config.dim
    feed_forward = FEED_FORWARD_TENSORS * tokens * config.dim + 2 * min(tokens, FEED_FORWARD_TOKENS) * config.ffn_dim
    lq_tokens = config.lq_layers * tokens * config.dim
    noise = 3 * config.in_dim * latents * pixels // LATENT_STRIDE**2 * FP32_BYTES
    return (max(attention, feed_forward) + lq_tokens) * itemsize + noise


def _decode_bytes(config: FlashVSRConfig, pixels: int, itemsize: int) -> int:
    """One latent in the TC decoder: the condition of 4 frames, half-resolution maps, one strip at full resolution."""
    _, _, c2, c3 = config.decoder_channels
    frames = 3 * LATENT_FRAMES * pixels
    strip = min(pixels, STRIP_PIXELS)
    return int(
        frames * (FP32_BYTES + 2 * itemsize)
        + HALF_STAGE_TENSORS * c2 * pixels / 4 * itemsize
        + LAST_STAGE_TENSORS * c3 * strip * itemsize
    )
