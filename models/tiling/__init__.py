"""Plans of overlapping tiles, and how they are blended."""

from .plan import Span, Tile, grid_tiles, ramp

__all__ = ["Span", "Tile", "grid_tiles", "ramp"]
