"""Memory that decoding and encoding with a Wan 2.1 VAE takes beside the weights: plain integers from sizes."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiling.areas import Area
from .live import REACH, tile_numbers
from .model import PIXELS_PER_LATENT, WanVAE
from .streamed import STREAM_TILE
from .tiled import is_large

RELEASED_DIM = 96
DECODE_FRAME, ENCODE_FRAME = (2720, 9632, 10432), (2688, 8896, 9664)
"""For the stages that see whole frames, in a clip of 1, 2 and more latents: numbers per latent pixel that are alive at
once at the released size, counted on the meta device (`benchmarks.wan_tiles`). The first also holds where their past is
in RAM. An attention kernel that materialises its scores takes up to 24 MiB more: part of the workspace that callers
leave free."""
DECODE_MARGIN = 14
"""Pixels by which the count below takes each side of a tile to be longer, for what is read around it."""

# The streamed decoder, counted from shapes with the tracker of `benchmarks.budget_table`; the same at every size.
STREAM_CACHE = 2364
"""Numbers in its cache per output pixel."""
STREAM_TILE_WORK, STREAM_FRAME_WORK = 1000, 30
"""Numbers alive beside the cache: per pixel that a tile reads, and per pixel of the frame."""


def peak_bytes(vae: WanVAE, *, encodes: bool, latents: int, size: tuple[int, int], tile: int, itemsize: int) -> int:
    """The most bytes that a `TiledDecode` or `TiledEncode` will need on its device at once, beside the weights.

    Args:
        latents: latent frames of the clip.
        size: height and width of the frames in pixels.
        tile: largest side of a tile in pixels.
        itemsize: bytes per number.
    """
    length = min(latents, 3)  # the second chunk fills the caches, the third works with full ones
    largest = max(Area.whole(*size).parts(tile, PIXELS_PER_LATENT), key=lambda area: area.grown(REACH).pixels)
    of_tile = tile_numbers(vae, largest, encodes=encodes, latents=length, itemsize=itemsize)
    per_latent = (ENCODE_FRAME if encodes else DECODE_FRAME)[0 if is_large(size, tile) else length - 1]
    tokens = (size[0] // PIXELS_PER_LATENT) * (size[1] // PIXELS_PER_LATENT)
    return max(of_tile, per_latent * tokens * vae.dim // RELEASED_DIM) * itemsize


@dataclass(frozen=True)
class WanCosts:
    """What a `StreamingDecoder` of the released width needs on its device beside the weights.

    Attributes:
        copies: of the cache that exist while it decodes. 2 in a run that can be taken up again after an error: the old
            cache is kept until the new one is complete.
        itemsize: bytes per number; None: those of the run's compute dtype.
    """

    copies: int = 1
    itemsize: int | None = None

    def device_bytes(self, size: tuple[int, int], itemsize: int, resting: bool) -> tuple[int, int]:
        """Bytes of the cache, and of everything else while a latent is decoded.

        Args:
            size: width and height of the output, padded.
            itemsize: of the compute dtype.
            resting: whether the cache rests in RAM.
        """
        itemsize = self.itemsize or itemsize
        width, height = size
        read = (min(width, STREAM_TILE) + DECODE_MARGIN) * (min(height, STREAM_TILE) + DECODE_MARGIN)
        work = (STREAM_TILE_WORK * read + STREAM_FRAME_WORK * width * height) * itemsize
        if resting:
            return 0, work
        cache = STREAM_CACHE * width * height * itemsize
        return cache, work + (self.copies - 1) * cache
