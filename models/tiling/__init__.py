"""Plans of overlapping tiles, and how they are blended."""

from .plan import Span, Tile, axis_spans, blend_weights, grid_tiles, ramp

__all__ = ["Span", "Tile", "axis_spans", "blend_weights", "grid_tiles", "ramp"]
