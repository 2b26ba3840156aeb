"""The streaming one-step transformer: Wan 2.1's blocks with block-sparse self-attention and a key/value cache.

The module holds weights only, under the official keys. What a stream remembers is a `TransformerState` owned by the
caller; what depends on the prompt alone is a `Constants`, made once by `prepare`. Layout BLD, in window order.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..operations import cast_on_use, to_like, weight_and_bias
from .attention import choose_backend, local_window, pool, select_blocks, sparse_attention
from .config import LATENT_STRIDE, PATCH, FlashVSRConfig, StreamOptions
from .plan import step_latents
from .rotary import rotate, rotation
from .windows import BLOCK_TOKENS, WINDOW, Grid, patchify, to_windows, unpatchify

log = logging.getLogger("steadyvsr.transformer")

EPS = 1e-6
TIMESTEP = 1000.0
"""The only noise level: one step from pure noise (sigma = 1)."""
FEED_FORWARD_TOKENS = 1 << 14
"""Tokens whose feed-forward activations exist at once; these are nearly six times as wide as a token."""
LAYER_PARTS = 3
"""Adding the LQ tokens, self-attention, the rest. Each part of a layer is done or not done, never half."""


class LayerCache(NamedTuple):
    """Keys (after rotary), values and pooled keys of one layer's last frame pairs, in ring slots.

    Attributes:
        keys, values: HBTD with B = slots · blocks.
        pooled: heads × B × head dim: the mean key of each block, computed once.
    """

    keys: Tensor
    values: Tensor
    pooled: Tensor


@dataclass
class TransformerState:
    """What the transformer remembers of one stream. Frame pair g is in ring slot g modulo `slots`.

    It changes only between the parts of a layer: after an exception, calling `Transformer.forward` again with the same
    arguments resumes the step at the part that failed.

    Attributes:
        layers: one cache per transformer layer; empty before the first step.
        pairs: frame pairs seen so far.
        slots: frame pairs that the caches hold.
        device: where the caches rest; None: where the transformer computes.
        part: how many parts of the current step are done, `LAYER_PARTS` per layer.
        x: BLD, their result; None between two steps.
    """

    layers: list[LayerCache] = field(default_factory=list)
    pairs: int = 0
    slots: int = 0
    device: torch.device | None = None
    part: int = 0
    x: Tensor | None = None

    @property
    def cached_pairs(self) -> int:
        return min(self.pairs, self.slots)

    def move(self, device: torch.device | None, computing: torch.device) -> None:
        """Moves the caches to `device` (None: `computing`), layer by layer, and keeps them there from now on."""
        self.device = device
        for index, cache in enumerate(self.layers):
            self.layers[index] = LayerCache(*(tensor.to(device or computing) for tensor in cache))
            del cache


@dataclass(frozen=True)
class Constants:
    """What depends on nothing but the prompt and the single noise level.

    Attributes:
        time: 1 × D, embedding of the noise level.
        modulation: 1 × 6 × D.
        text: BLD prompt. Each layer computes its keys and values when it needs them: kept, they would take 94 MB of the
            card for the 1.3 B model in bf16; computed, they cost less than 1 % of a step at 768 × 1280.
    """

    time: Tensor
    modulation: Tensor
    text: Tensor


@dataclass(frozen=True)
class _Step:
    """What all layers of one process step share."""

    grid: Grid
    cos: Tensor
    sin: Tensor
    window: Tensor
    topk_ratio: float
    backend: str


class RMSNorm(nn.Module):
    """Over the last axis, all heads together; computed in fp32, returned in x's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight.to(device=x.device, dtype=torch.float32)
        return F.rms_norm(x.float(), x.shape[-1:], gain, EPS).to(x.dtype)


class Attention(nn.Module):
    """The projections of a self- or cross-attention; the attention itself is in `Block`."""

    def __init__(self, dim: int, operations) -> None:
        super().__init__()
        self.q = operations.Linear(dim, dim)
        self.k = operations.Linear(dim, dim)
        self.v = operations.Linear(dim, dim)
        self.o = operations.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn_dim: int, operations) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_attn = Attention(dim, operations)
        self.cross_attn = Attention(dim, operations)
        self.norm3 = operations.LayerNorm(dim, eps=EPS)
        self.ffn = nn.Sequential(
            operations.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), operations.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def attend(self, x: Tensor, step: _Step, constants: Constants, state: TransformerState, layer: int) -> Tensor:
        """x BLD of one step plus its self-attention; puts the step's keys and values into the layer's cache."""
        shift, scale, gate = self._modulation(x, constants)[:3]
        attended, new = self._attend(_modulate(x, shift, scale), step, state, layer)
        x = x + gate * self.self_attn.o(attended)
        # Last: an exception before this leaves the cache as it was.
        _remember(state, layer, new, step.grid.blocks)
        return x

    def feed(self, x: Tensor, constants: Constants) -> Tensor:
        """x BLD plus its attention to the prompt, then through the feed-forward network."""
        shift, scale, gate = self._modulation(x, constants)[3:]
        x = x + self.cross_attn.o(self._attend_prompt(self.norm3(x), constants.text))
        parts = x.split(FEED_FORWARD_TOKENS, 1)
        return torch.cat([part + gate * self.ffn(_modulate(part, shift, scale)) for part in parts], 1)

    def _modulation(self, x: Tensor, constants: Constants) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then those of the feed-forward network."""
        return (to_like(self.modulation, x) + constants.modulation).unbind(1)

    def _blocks(self, x: Tensor) -> Tensor:
        """L × heads × head dim → HBTD."""
        return rearrange(x, "(b t) h d -> h b t d", t=BLOCK_TOKENS).contiguous()

    def _attend(self, x: Tensor, step: _Step, state: TransformerState, layer: int) -> tuple[Tensor, LayerCache]:
        """The attention's result BLD, and the step's own keys and values."""
        attn, heads = self.self_attn, (self.num_heads, -1)
        queries = self._blocks(rotate(attn.norm_q(attn.q(x))[0].unflatten(-1, heads), step.cos, step.sin))
        keys = self._blocks(rotate(attn.norm_k(attn.k(x))[0].unflatten(-1, heads), step.cos, step.sin))
        values = self._blocks(attn.v(x)[0].unflatten(-1, heads))
        new = LayerCache(keys, values, pool(keys))
        seen = _join(state, layer, new, step.grid.blocks)
        mask = select_blocks(pool(queries), seen.pooled, step.window, step.topk_ratio)
        if layer == 0 and state.pairs == 0:
            log.info("attention: %s selects %.1f %% of the block pairs", step.backend, 100 * mask.float().mean().item())
        attended = sparse_attention(queries, seen.keys, seen.values, mask, step.backend)
        return rearrange(attended, "h b t d -> 1 (b t) (h d)"), new

    def prompt_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, BLD."""
        attn = self.cross_attn
        return attn.norm_k(attn.k(text)), attn.v(text)

    def _attend_prompt(self, x: Tensor, text: Tensor) -> Tensor:
        attn = self.cross_attn
        parts = (attn.norm_q(attn.q(x)), *self.prompt_keys_values(text))
        queries, keys, values = (rearrange(part, "n l (h d) -> n h l d", h=self.num_heads) for part in parts)
        return rearrange(F.scaled_dot_product_attention(queries, keys, values), "n h l d -> n l (h d)")


class Head(nn.Module):
    def __init__(self, dim: int, out_features: int, operations) -> None:
        super().__init__()
        self.head = operations.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (to_like(self.modulation, x) + time[:, None]).unbind(1)
        return self.head(_modulate(x, shift, scale))


class Transformer(nn.Module):
    """FlashVSR's transformer. State-dict keys are the official ones.

    Args:
        config: sizes.
        operations: namespace with `Linear`, `Conv3d` and `LayerNorm`; see `models.operations`.
    """

    def __init__(self, config: FlashVSRConfig, operations=cast_on_use) -> None:
        super().__init__()
        dim, patch = config.dim, (1, PATCH, PATCH)
        self.config = config
        self.patch_embedding = operations.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            operations.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), operations.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(config.freq_dim, dim), nn.SiLU(), operations.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            [Block(dim, config.num_heads, config.ffn_dim, operations) for _ in range(config.num_layers)]
        )
        self.head = Head(dim, config.out_dim * PATCH**2, operations)

    def prepare(self, context: Tensor) -> Constants:
        """Computes once what every step needs of the prompt and the noise level.

        Args:
            context: BLD prompt embedding, B = 1, D = text_dim. The result takes its device and dtype.
        """
        half = self.config.freq_dim // 2
        angles = TIMESTEP * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        time = self.time_embedding(to_like(torch.cat([angles.cos(), angles.sin()])[None], context))
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        text = self.text_embedding(context)
        return Constants(time, modulation, text)

    def forward(
        self,
        latent: Tensor,
        lq_tokens: list[Tensor] | None,
        step: int,
        state: TransformerState,
        options: StreamOptions,
        constants: Constants,
        corner: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Runs one process step, or the rest of one that an exception interrupted.

        Args:
            latent: NCTHW noise of the step, N = 1, T = 6 in step 0 and 2 after that, H and W multiples of 16.
            lq_tokens: one tensor for each of the first layers, BLD in (frame, row, column) order, added before it.
            step: index of the process step; it fixes the frames' positions.
            state: changed in place.
            options: top-k, local range, cache length and attention backend.
            constants: from `prepare`, on the latent's device and in its dtype.
            corner: row and column, in tokens, of the latent's first token in the whole frame.

        Returns:
            The velocity, NCTHW like `latent`.

        Raises:
            ValueError: the latent has the wrong batch, number of frames or size.
        """
        batch, _, frames, height, width = latent.shape
        first, last = step_latents(step)
        grid = Grid(frames, height // PATCH, width // PATCH)
        if batch != 1 or frames != last - first or height % (PATCH * WINDOW[1]) or width % (PATCH * WINDOW[2]):
            raise ValueError(
                f"Transformer: expected latents of shape (1, C, {last - first}, 16a, 16b) in step {step}; "
                f"got {tuple(latent.shape)}."
            )
        shared = _Step(
            grid,
            *rotation(grid, first, self.config.head_dim, latent.device, corner),
            local_window(grid, options.local_range, latent.device),
            options.block_pair_ratio(height * LATENT_STRIDE, width * LATENT_STRIDE),
            choose_backend(options.attention, latent.device, latent.dtype),
        )
        state.slots = options.cached_pairs
        if state.x is None:
            weight, bias = weight_and_bias(self.patch_embedding, latent)
            state.part, state.x = 0, F.linear(patchify(latent, grid), weight.flatten(1), bias)
        assert state.x is not None
        while state.part < LAYER_PARTS * len(self.blocks):
            layer, part = divmod(state.part, LAYER_PARTS)
            block = cast(Block, self.blocks[layer])
            if part == 0 and lq_tokens is not None and layer < len(lq_tokens):
                state.x = state.x + to_windows(lq_tokens[layer], grid)
            elif part == 1:
                state.x = block.attend(state.x, shared, constants, state, layer)
            elif part == 2:
                state.x = block.feed(state.x, constants)
            state.part += 1
        velocity = unpatchify(self.head(state.x, constants.time), grid)
        state.pairs += grid.groups
        state.x = None
        return velocity


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _join(state: TransformerState, layer: int, new: LayerCache, blocks: int) -> LayerCache:
    """The cached frame pairs in slot order, then the new ones; attention does not depend on the order of its keys."""
    if state.pairs == 0:
        return new
    old, filled = state.layers[layer], state.cached_pairs * blocks
    device = new.keys.device
    joined = (torch.cat([kept[:, :filled].to(device), added], 1) for kept, added in zip(old, new, strict=True))
    return LayerCache(*joined)


def _remember(state: TransformerState, layer: int, new: LayerCache, blocks: int) -> None:
    """Writes the newest frame pairs over the oldest slots: drops one pair per step, as the released code does."""
    heads, count, tokens, head_dim = new.keys.shape
    if layer == len(state.layers):
        room, where = state.slots * blocks, state.device or new.keys.device
        shapes = ((heads, room, tokens, head_dim),) * 2 + ((heads, room, head_dim),)
        state.layers.append(LayerCache(*(new.keys.new_empty(shape, device=where) for shape in shapes)))
    cache = state.layers[layer]
    pairs, where = count // blocks, cache.keys.device
    for pair in range(max(0, pairs - state.slots), pairs):
        slot = (state.pairs + pair) % state.slots * blocks
        span = slice(pair * blocks, (pair + 1) * blocks)
        # Move first, write last: only moving can fail.
        moved = [tensor[:, span].detach().to(where) for tensor in new]
        for kept, tensor in zip(cache, moved, strict=True):
            kept[:, slot : slot + blocks].copy_(tensor)
