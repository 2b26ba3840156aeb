"""How many bytes a run needs beside the weights: activations at their peak, and the state between steps.

Plain integers from sizes. The terms are counted from the shapes in `transformer`, `lq_projection`, `tc_decoder` and
`stream`; the factors in capitals say how many such tensors are alive at the peak. tests/models/test_footprint.py
compares the result with a tracker of all live storages. Not counted: work space inside convolution and attention
kernels, and what an allocator keeps beyond live tensors.
"""

from __future__ import annotations

from ..tiling import grid_tiles
from ..wan_vae.costs import WanCosts
from .config import LATENT_STRIDE, FlashVSRConfig
from .lq_projection import PIXEL_CHANNELS, PIXELS_PER_TOKEN
from .memory_plan import MemoryPlan
from .plan import FIRST_STEP_LATENTS, STEP_FRAMES, STEP_LATENTS, padded_size
from .tc_decoder import CONDITION_CHANNELS, CPU_STRIP_PIXELS, FRAMES_PER_LATENT, STRIP_PIXELS
from .tiles import TILE_OVERLAP_PIXELS
from .transformer import FEED_FORWARD_TOKENS
from .windows import BLOCK_TOKENS

FP32_BYTES = 4
TOKEN_PIXELS = PIXELS_PER_TOKEN**2

ATTENTION_TENSORS = {2: 10.2, 4: 7.2}
"""Token tensors alive at the peak of self-attention, with fp32 copies of rotary and RMS norm, by bytes per number."""
CPU_ATTENTION_TENSORS = 12
"""The same, with the work space of the gathered attention."""
JOINED_ATTENTION_TENSORS = 8
"""The same where cached keys and values were joined to the new ones, which are counted separately."""
FEED_FORWARD_TENSORS = 3.5
"""Token tensors alive beside those of the feed-forward network itself."""
GATHER_ELEMENTS_PER_PIXEL, GATHER_ELEMENTS_PER_HEAD_CHANNEL = 7.4, 0.0635
"""Work space of the gathered attention on the CPU, one head at a time, in fp32 elements per pixel: measured at head
dims 32 and 128 with the tracker of benchmarks/budget_table.py."""
NORM_TENSORS = 3
"""Copies of a convolution's result while it is normalised."""
ENTRY_TENSORS = 3
"""Copies of the condition at latent resolution where it enters the decoder."""
BLOCK_TENSORS = 5
"""Maps inside a memory block of the decoder, beside those it remembers."""
COLOUR_TENSORS = 3
"""Copies of the frames in fp32 during the colour transfer."""
LAST_STAGE_TENSORS = 2
"""Maps of one strip at full resolution in the decoder's last stage."""


def activation_bytes(
    config: FlashVSRConfig,
    size: tuple[int, int],
    kv_ratio: float,
    itemsize: int,
    prompt_tokens: int = 512,
    on_cpu: bool = False,
    plan: MemoryPlan = MemoryPlan(),  # noqa: B008  frozen, so one shared default is safe
    wan_decoder: WanCosts | None = None,
) -> int:
    """Peak bytes of activations and state of a run.

    Args:
        config: sizes of the networks.
        size: width and height of the output, before padding.
        kv_ratio: see `StreamOptions`.
        itemsize: bytes per number of the compute dtype.
        prompt_tokens: length of the prompt context.
        on_cpu: whether it runs on the CPU: convolutions take other forms there, decoder strips are smaller, and what
            rests in RAM counts as well, the output included.
        plan: what rests in RAM, strips and tiles.
        wan_decoder: costs of the Wan decoder that replaces the TC decoder.
    """
    padded = width, height = padded_size(*size)
    pixels, cached = width * height, int(kv_ratio) * STEP_LATENTS
    tiles = _tile_sizes(padded, plan.tile)
    largest = max(tiles, key=lambda side: side[0] * side[1])
    tiled = [columns * rows for columns, rows in tiles]
    own = [] if (plan.kv_in_ram or len(tiled) > 1) and not on_cpu else tiled
    state = sum(lq_state_bytes(config, part, itemsize) for part in tiled)
    key_values = sum(cache_bytes(config, part, kv_ratio, itemsize) for part in own)
    state += prompt_tokens * config.dim * itemsize
    resting = plan.decoder_frames == 1 and not on_cpu
    decoder = decoder_state_bytes(config, 0 if resting else pixels, itemsize)
    decode = _decode_bytes(config, pixels, itemsize, on_cpu, plan)
    if wan_decoder is not None:
        decoder, decode = wan_decoder.device_bytes(padded, itemsize, resting)
    # A tile's tokens wait until its turn comes.
    waiting = _lq_tokens_bytes(config, sum(tiled) - max(tiled), itemsize)
    projecting = _project_bytes(config, size, largest, itemsize, on_cpu)
    # In the first step the decoder has no memory yet, but the step is three times as long.
    first = max(
        key_values
        + _transform_bytes(config, max(tiled), pixels, FIRST_STEP_LATENTS, 0, itemsize, on_cpu)
        + FIRST_STEP_LATENTS * waiting,
        projecting + (FIRST_STEP_LATENTS - STEP_LATENTS) * _lq_tokens_bytes(config, sum(tiled), itemsize),
    )
    transform = _transform_bytes(config, max(tiled), pixels, STEP_LATENTS, cached, itemsize, on_cpu)
    later = max(projecting + STEP_LATENTS * waiting, transform + STEP_LATENTS * waiting, decode)
    # The newest output frame belongs to the caller; on the CPU it is in the same memory.
    output = 3 * size[0] * size[1] * FP32_BYTES if on_cpu else 0
    return state + max(first, key_values + decoder + later) + output


def _tile_sizes(padded: tuple[int, int], tile: int | None) -> list[tuple[int, int]]:
    """Width and height of every spatial tile in pixels; the whole frame without tiling."""
    if tile is None:
        return [padded]
    columns, rows = (side // LATENT_STRIDE for side in padded)
    tiles = grid_tiles(rows, columns, tile // LATENT_STRIDE, TILE_OVERLAP_PIXELS // LATENT_STRIDE)
    spans = [part.scaled(LATENT_STRIDE) for part in tiles]
    return [(columns.stop - columns.start, rows.stop - rows.start) for rows, columns in spans]


def cache_bytes(config: FlashVSRConfig, pixels: int, kv_ratio: float, itemsize: int) -> int:
    """Bytes of the key/value cache of a frame or tile, pooled keys included."""
    cached = config.num_layers * 2 * int(kv_ratio) * STEP_LATENTS * (pixels // TOKEN_PIXELS) * config.dim
    return (cached + cached // 2 // BLOCK_TOKENS) * itemsize


def lq_state_bytes(config: FlashVSRConfig, pixels: int, itemsize: int) -> int:
    """Bytes of the LQ projection's cache of a frame or tile."""
    return 2 * (pixels // TOKEN_PIXELS) * (PIXEL_CHANNELS + config.lq_hidden[0]) * itemsize


def _lq_tokens_bytes(config: FlashVSRConfig, pixels: int, itemsize: int) -> int:
    """Tokens of the LQ projection for one latent frame."""
    return config.lq_layers * (pixels // TOKEN_PIXELS) * config.dim * itemsize


def decoder_state_bytes(config: FlashVSRConfig, pixels: int, itemsize: int) -> int:
    """Bytes of the TC decoder's memory: three maps at each of three resolutions, and the folded kernels."""
    c0, c1, c2, c3 = config.decoder_channels
    maps = 3 * (c0 * pixels // 64 + c1 * pixels // 16 + c2 * pixels // 4)
    kernels = 16 * (c0 * c1 + 2 * c1 * c2 + 2 * c2 * c3)
    return (maps + kernels) * itemsize


def _project_bytes(
    config: FlashVSRConfig, size: tuple[int, int], tile: tuple[int, int], itemsize: int, on_cpu: bool
) -> int:
    """One clip of 8 frames: resized and padded, then reduced to 4 and to 2 frames by a tile's LQ projection."""
    padded, (width, height) = padded_size(*size), tile
    pixels, tokens = padded[0] * padded[1], width * height // TOKEN_PIXELS
    hidden, features = config.lq_hidden
    # Each convolution reads its frames and two cached ones, with a replicated border of one token.
    bordered = (width // 16 + 2) * (height // 16 + 2)
    clip, tail = 3 * STEP_FRAMES * pixels, 2 * tokens * PIXEL_CHANNELS
    first_in, first_out = (STEP_FRAMES + 2) * PIXEL_CHANNELS * bordered, STEP_FRAMES // 2 * hidden * tokens
    second_in, second_out = (STEP_FRAMES // 2 + 2) * hidden * bordered, STEP_FRAMES // 4 * features * tokens
    first_work, second_work = NORM_TENSORS * first_out, NORM_TENSORS * second_out
    if not on_cpu:
        # Convolutions over time run as convolutions over space there, on a copy of every window of 4 frames.
        first_work = max(first_work, STEP_FRAMES // 2 * 4 * PIXEL_CHANNELS * bordered + first_out)
        second_work = max(second_work, STEP_FRAMES // 4 * 4 * hidden * bordered + second_out)
    first = first_in + max(first_work, first_out + second_in)
    second = first_out + second_in + second_work
    # Beside the padded clip in fp32: what it was padded from, or what it is converted to.
    unpadded = 3 * STEP_FRAMES * size[0] * size[1] * FP32_BYTES if padded != size else 0
    converted = clip * itemsize if itemsize != FP32_BYTES else 0
    resized = clip * FP32_BYTES + max(unpadded, converted)
    return max((clip + tail + max(first, second)) * itemsize, resized)


def _gather_bytes(config: FlashVSRConfig, pixels: int, cached_latents: int, itemsize: int) -> int:
    """What gathered attention adds on the CPU: work space, and fp32 copies of queries, keys and values."""
    per_pixel = GATHER_ELEMENTS_PER_PIXEL + GATHER_ELEMENTS_PER_HEAD_CHANNEL * config.head_dim
    copied = 0
    if itemsize != FP32_BYTES:
        copied = (2 * (cached_latents + STEP_LATENTS) + STEP_LATENTS) * pixels // TOKEN_PIXELS * config.dim
    return (int(per_pixel * pixels) + copied) * FP32_BYTES


def _transform_bytes(
    config: FlashVSRConfig,
    pixels: int,
    frame_pixels: int,
    latents: int,
    cached_latents: int,
    itemsize: int,
    on_cpu: bool,
) -> int:
    """One process step of the transformer on a tile: self-attention of all tokens, or the feed-forward of some."""
    tokens = latents * pixels // TOKEN_PIXELS
    attention = int((CPU_ATTENTION_TENSORS if on_cpu else ATTENTION_TENSORS[itemsize]) * tokens * config.dim)
    if cached_latents:
        joined = 2 * (cached_latents + latents) * pixels // TOKEN_PIXELS * config.dim
        attention = joined + JOINED_ATTENTION_TENSORS * tokens * config.dim
    feed_forward = int(FEED_FORWARD_TENSORS * tokens * config.dim)
    feed_forward += 2 * min(tokens, FEED_FORWARD_TOKENS) * config.ffn_dim
    lq_tokens = config.lq_layers * tokens * config.dim
    noise = 3 * config.in_dim * latents * frame_pixels // LATENT_STRIDE**2 * FP32_BYTES
    work = max(attention, feed_forward) * itemsize + lq_tokens * itemsize + noise
    return work + _gather_bytes(config, pixels, cached_latents, itemsize) * (on_cpu and cached_latents > 0)


def _decode_bytes(config: FlashVSRConfig, pixels: int, itemsize: int, on_cpu: bool, plan: MemoryPlan) -> int:
    """One latent in the TC decoder: the condition, then maps of growing size, one at a time."""
    _, c1, c2, c3 = config.decoder_channels
    frames = 3 * FRAMES_PER_LATENT * pixels
    quarter, half = c1 * pixels // 16, c2 * pixels // 4
    strip = min(pixels, CPU_STRIP_PIXELS if on_cpu else STRIP_PIXELS, plan.decoder_strip_pixels or pixels)
    entry = ENTRY_TENSORS * (CONDITION_CHANNELS + config.in_dim) * pixels // LATENT_STRIDE**2
    resting = plan.decoder_frames == 1 and not on_cpu
    blocks = BLOCK_TENSORS + resting
    if plan.decoder_strip_pixels is None:
        working = blocks * half
    else:
        working = 2 * half + blocks * c2 * min(pixels, plan.decoder_strip_pixels) // 4
    last = half + (c2 // 4 + LAST_STAGE_TENSORS * c3) * strip + frames
    kept_twice = plan.decoder_frames > 1 and itemsize != FP32_BYTES
    inputs = frames * (itemsize + FP32_BYTES * kept_twice)
    # At the end: the frames, their inputs, and two steps of the colour transfer in fp32.
    colour = COLOUR_TENSORS * 3 * plan.decoder_frames * pixels * FP32_BYTES + frames * itemsize
    return max(colour, inputs + max(entry, blocks * quarter, quarter + max(working, last)) * itemsize)
