"""How a run spends memory, and what it gives up first when memory runs short. Plain values, no tensors.

What it gives up is a ladder: every rung but the last leaves the result as it is. The engine can step down in the middle
of a run, and goes on from the layer or frame that did not fit; see `stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .config import check_tile
from .plan import padded_size

CHUNK_FRAMES = 4
"""Output frames that are decoded and coloured at once by default: those of one latent."""
STRIP_PIXELS = (1 << 18, 1 << 16)
"""Pixels of the decoder's strips, from the first rung of that kind to the last."""
TILE_PIXELS = (1024, 768, 512, 384, 256)
"""Sides of the transformer's tiles, from the first rung of that kind to the last."""

KV_CACHE, DECODER_CHUNKS, DECODER_STRIPS, TILES = (
    "KV cache in RAM", "decoder in smaller chunks", "decoder strips", "spatial tiles",
)  # fmt: skip
HELPS = {
    KV_CACHE: ("set up", "project", "transform", "decode"),
    DECODER_CHUNKS: ("set up", "project", "transform", "decode"),
    DECODER_STRIPS: ("decode",),
    TILES: ("project", "transform"),
}
"""Rungs from the top down, each with the phases that need less memory after it. The set-up itself never does; but where
memory is short that early, the rungs that leave the result as it is are taken at once, and no tile is."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where the state of a run rests, and how much is computed at once.

    Attributes:
        kv_in_ram: the key/value cache rests in RAM; each layer fetches its part when its turn comes.
        decoder_frames: 4, or 1: frames get their colours one by one, and the decoder's memory rests in RAM.
        decoder_strip_pixels: full-resolution pixels of the strips in which the TC decoder computes its two largest
            stages. None: only the last stage, in strips of the default size.
        tile: side of spatial transformer tiles in output pixels, a multiple of 128 of at least 256; None: whole frames.
            The only field that changes the result. The caches of tiles rest in RAM.
    """

    kv_in_ram: bool = False
    decoder_frames: int = CHUNK_FRAMES
    decoder_strip_pixels: int | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.decoder_frames not in (1, CHUNK_FRAMES):
            raise ValueError(f"MemoryPlan.decoder_frames: expected 1 or {CHUNK_FRAMES}; got {self.decoder_frames!r}.")
        if self.decoder_strip_pixels is not None and self.decoder_strip_pixels < 1:
            raise ValueError(
                f"MemoryPlan.decoder_strip_pixels: expected None or at least 1; got {self.decoder_strip_pixels!r}."
            )
        check_tile(self.tile, "MemoryPlan.tile")

    def __str__(self) -> str:
        parts = [KV_CACHE] if self.kv_in_ram else []
        parts += [DECODER_CHUNKS] if self.decoder_frames == 1 else []
        parts += [f"{DECODER_STRIPS} of {self.decoder_strip_pixels} pixels"] if self.decoder_strip_pixels else []
        parts += [f"{TILES} of {self.tile}"] if self.tile else []
        return ", ".join(parts) or "everything on the device"


def smaller(plan: MemoryPlan, phase: str | None, size: tuple[int, int]) -> tuple[str, MemoryPlan] | None:
    """The name and the plan of the next rung; None at the bottom.

        smaller(MemoryPlan(), "decode", (1280, 768))  # ("KV cache in RAM", MemoryPlan(kv_in_ram=True))

    Args:
        phase: what did not fit (set up | project | transform | decode): rungs that cannot help it are skipped. None
            skips none.
        size: width and height of the output.
    """
    for rung, phases in HELPS.items():
        if phase is None or phase in phases:
            changed = _step_down(plan, rung, size)
            if changed is not None:
                return rung, changed
    return None


def plans(start: MemoryPlan, size: tuple[int, int]) -> Iterator[tuple[str, MemoryPlan]]:
    """Yields ("as planned", start), then each rung below it on top of those before."""
    found: tuple[str, MemoryPlan] | None = ("as planned", start)
    while found is not None:
        yield found
        found = smaller(found[1], None, size)


def _step_down(plan: MemoryPlan, rung: str, size: tuple[int, int]) -> MemoryPlan | None:
    if rung == KV_CACHE:
        return None if plan.kv_in_ram else replace(plan, kv_in_ram=True)
    if rung == DECODER_CHUNKS:
        return None if plan.decoder_frames == 1 else replace(plan, decoder_frames=1)
    if rung == DECODER_STRIPS:
        now = plan.decoder_strip_pixels
        below = [pixels for pixels in STRIP_PIXELS if now is None or pixels < now]
        return replace(plan, decoder_strip_pixels=below[0]) if below else None
    now = plan.tile or max(padded_size(*size))
    below = [tile for tile in TILE_PIXELS if tile < min(now, max(padded_size(*size)))]
    return replace(plan, tile=below[0]) if below else None
