"""What one spatial tile of the transformer remembers, and how it is cut into smaller tiles in the middle of a run.

A tile can be cut between any two units of work: its caches, its waiting tokens and even the layers that a step has
already passed are cut along the attention blocks, and each part goes on from there alone. Tokens keep their positions
in the whole frame, so cached keys stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..operations import owned
from ..tiling import Span, Tile, blend_weights, grid_tiles
from .config import LATENT_STRIDE, PATCH
from .lq_projection import LQCache
from .transformer import LayerCache, TransformerState
from .windows import BLOCK_TOKENS, WINDOW

BLOCK_CELLS = WINDOW[1] * PATCH
"""Latent cells along one side of an attention block."""
TILE_OVERLAP_PIXELS = 128
RAM = torch.device("cpu")


@dataclass
class TileState:
    """One spatial tile between units of work; a run without tiling has one that covers the whole padded frame.

    Attributes:
        tile: what it covers, in latent cells of the whole frame.
        weights: fp32, rows × columns of latent cells: its share of the blended latents.
        transformer: what the transformer remembers.
        lq_cache: what the LQ projection remembers.
        tokens: of the current step, for each clip one BLD tensor per layer, in (frame, row, column) order.
        projected: how many input frames the LQ projection has seen.
        velocity: NCTHW of the current step, until it is added to the latents.
        steps: how many process steps have their latents.
    """

    tile: Tile
    weights: Tensor
    transformer: TransformerState = field(default_factory=TransformerState)
    lq_cache: LQCache | None = None
    tokens: list[list[Tensor]] = field(default_factory=list)
    projected: int = 0
    velocity: Tensor | None = None
    steps: int = 0

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column, in tokens, of its first token in the whole frame."""
        return self.tile.rows.start // PATCH, self.tile.columns.start // PATCH


def whole_frame(rows: int, columns: int, device: torch.device) -> TileState:
    """The only tile of a run without tiling; rows and columns count latent cells."""
    return TileState(Tile(Span(0, rows, 0, 0), Span(0, columns, 0, 0)), torch.ones(rows, columns, device=device))


def cut(state: TileState, side: int) -> list[TileState]:
    """Cuts a tile into overlapping ones of at most `side` pixels; returns it alone if it is no larger.

    The parts keep the transformer's caches in RAM; those of `state` are consumed, layer by layer.
    """
    rows, columns = (span.stop - span.start for span in state.tile)
    parts = grid_tiles(rows, columns, side // LATENT_STRIDE, TILE_OVERLAP_PIXELS // LATENT_STRIDE)
    if len(parts) == 1:
        return [state]
    shares = blend_weights(parts, rows, columns)
    made = [_part(state, part, weights) for part, weights in zip(parts, shares, strict=True)]
    layers = state.transformer.layers
    while layers:
        cache = layers.pop(0)
        for part, smaller in zip(parts, made, strict=True):
            blocks = _grid(state.tile, part, BLOCK_CELLS)
            tensors = (_inner(tensor, *blocks).to(RAM) for tensor in cache)
            smaller.transformer.layers.append(LayerCache(*tensors))
    return made


def _part(state: TileState, part: Tile, share: Tensor) -> TileState:
    """One part of a tile, without the layers' caches; `part` counts from the tile's corner."""
    old, tokens, blocks = state.transformer, _grid(state.tile, part, PATCH), _grid(state.tile, part, BLOCK_CELLS)
    transformer = TransformerState(pairs=old.pairs, slots=old.slots, device=RAM, part=old.part)
    if old.x is not None:
        transformer.x = _inner(old.x.unflatten(1, (-1, BLOCK_TOKENS)), *blocks).flatten(1, 2)
    lq_cache = state.lq_cache
    if lq_cache is not None:
        lq_cache = LQCache(*(owned(tensor[(..., *tokens[1:])]) for tensor in lq_cache))
    return TileState(
        Tile(*(span.shifted(around.start) for span, around in zip(part, state.tile, strict=True))),
        part.of(state.weights) * share.to(state.weights.device),
        transformer,
        lq_cache,
        [[_inner(layer, *tokens) for layer in clip] for clip in state.tokens],
        state.projected,
        None if state.velocity is None else owned(part.of(state.velocity)),
        state.steps,
    )


def _grid(tile: Tile, part: Tile, cells: int) -> tuple[tuple[int, int], slice, slice]:
    """The size of a tile, and the rows and columns of a part of it, in units of `cells` latent cells."""
    shape = [(span.stop - span.start) // cells for span in tile]
    rows, columns = (slice(span.start // cells, span.stop // cells) for span in part)
    return (shape[0], shape[1]), rows, columns


def _inner(tensor: Tensor, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """Cuts rows and columns out of axis 1, which runs over (anything, row, column) with this shape."""
    return owned(tensor.unflatten(1, (-1, *shape))[:, :, rows, columns]).flatten(1, 3)
