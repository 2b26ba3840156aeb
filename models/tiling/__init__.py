"""Plans of overlapping tiles, and how they are blended."""

from .blend import SQUARE, THREE_GRIDS, BlendDecode, BlendEncode
from .job import NotFinite, OnStep, TileJob
from .plan import Span, Tile, axis_spans, axis_weights, blend_weights, even_spans, feather, grid_tiles, ramp

__all__ = [
    "SQUARE", "THREE_GRIDS", "BlendDecode", "BlendEncode", "NotFinite", "OnStep", "Span", "Tile", "TileJob",
    "axis_spans", "axis_weights", "blend_weights", "even_spans", "feather", "grid_tiles", "ramp",
]  # fmt: skip
