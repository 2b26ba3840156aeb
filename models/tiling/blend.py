"""Encoding or decoding in blended tiles, with any network: the way for networks about which nothing is known.

The network sees each tile alone, over all its frames, so what it does across the frame (attention, normalisation)
differs from tile to tile; for networks that are known, see `image_vae` and `wan_vae`. Time is never split: a causal
network would start afresh at every cut. The result is gathered in fp32 on the CPU, with one tile on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .job import NotFinite, OnStep
from .plan import Span, Tile, axis_weights, even_spans

CPU = torch.device("cpu")
MIN_CELLS = 2
"""Fewest latent cells along the side of a tile: a single one could not overlap and still advance."""

SQUARE = ((1.0, 1.0),)
THREE_GRIDS = ((1.0, 1.0), (0.5, 2.0), (2.0, 0.5))
"""Height and width of tiles of one area, as shares of their side. A network that looks across its tile errs differently
in each grid, so their mean errs less, at three times the work. ComfyUI's own tiled nodes do the same for images."""

Network = Callable[[Tensor], Tensor]
"""Maps a tile, NCHW or NCTHW with N = 1, to its result, computed on the tile's device and in its dtype."""


class BlendJob:
    """A `TileJob` that computes overlapping tiles and blends them.

    Args:
        network: maps a tile of the source to its result.
        source: NCHW or NCTHW, on the CPU; what is encoded has a height and width in multiples of the compression.
        tile, overlap: in pixels of the frames.
        compression: pixels per latent along a side.
        device, dtype: of the computation.
        prepare: brings a tile into the range that the network expects, on the device, before it is cast.
        spot: computes one more tile at the end, to compare.
        shapes: of the tiles of each grid; the result is the mean of all grids.

    Raises:
        ValueError: one of these does not fit the others.

    Attributes, beside those of `TileJob`:
        overlap: of neighbouring tiles, in pixels; at most half a tile.
        grid: tiles along the height and along the width, of the first grid.
        spot_db: PSNR of the result against one more tile, laid across the seams in its middle; None until then, or
            where there are no seams.
    """

    _encodes: bool

    def __init__(
        self,
        network: Network,
        source: Tensor,
        tile: int,
        overlap: int,
        compression: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Network = lambda tile: tile,
        spot: bool = False,
        shapes: Sequence[tuple[float, float]] = SQUARE,
    ) -> None:
        if source.ndim not in (4, 5) or 0 in source.shape:
            raise ValueError(f"tiles: expected NCHW or NCTHW without an empty axis; got {tuple(source.shape)}.")
        if not 0 <= overlap <= tile // 2:
            raise ValueError(f"tiles: expected an overlap from 0 to half the tile of {tile}; got {overlap}.")
        height, width = source.shape[-2:]
        per_cell = compression if self._encodes else 1
        if height % per_cell or width % per_cell:
            raise ValueError(f"tiles: expected a height and width in multiples of {per_cell}; got {height}×{width}.")
        self.device, self.dtype, self.overlap = device, dtype, overlap
        self.result = torch.empty(0)
        self.done = 0
        self.spot_db: float | None = None
        self._network, self._prepare = network, prepare
        self._source, self._compression, self._per_cell = source, compression, per_cell
        self._cells = height // per_cell, width // per_cell
        self._spot, self._shapes = spot, shapes
        self._grids = self._plan(tile)
        self.tile = tile

    @property
    def total(self) -> int:
        count = self._tiles_of_sample
        return self._source.shape[0] * count + (self._spot and count > 1)

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self._grids[0]
        return len(rows), len(columns)

    @property
    def _tiles_of_sample(self) -> int:
        return sum(len(rows) * len(columns) for rows, columns in self._grids)

    def cut(self, tile: int) -> None:
        """Goes on in tiles of this side, with an overlap of at most half a tile.

        Finished tiles are kept if the new grid is the old one, and computed again otherwise.

        Raises:
            ValueError: the tile is smaller than two latent cells.
        """
        overlap = self.overlap
        self.overlap = min(overlap, tile // 2)
        try:
            grids = self._plan(tile)
        except ValueError:
            self.overlap = overlap
            raise
        if grids != self._grids:
            self._grids, self.done, self.result = grids, 0, torch.empty(0)
        self.tile = tile

    def advance(self, on_step: OnStep) -> None:
        """Computes one tile of one sample.

        Raises:
            NotFinite: its result holds NaN or infinity.
            ValueError: the network's results do not fit together.
        """
        on_step()
        sample, position = divmod(self.done, self._tiles_of_sample)
        rows, columns = self._grids[0]
        if sample == self._source.shape[0]:
            self.spot_db = self._check_spot(Tile(_across(rows), _across(columns)))
            self.done += 1
            return
        for rows, columns in self._grids:
            if position < len(rows) * len(columns):
                break
            position -= len(rows) * len(columns)
        tile = Tile(rows[position // len(columns)], columns[position % len(columns)])
        made = self._compute(sample, tile, f"sample {sample}, {tile.scaled(self._compression)}")
        scale = self._scale_of(made, tile)
        if self.done == 0:
            height, width = (cells * factor for cells, factor in zip(self._cells, scale, strict=True))
            self.result = torch.zeros(self._source.shape[0], *made.shape[1:-2], height, width)
        elif made.shape[1:-2] != self.result.shape[1:-2]:
            raise ValueError(
                f"tiles: expected results of one shape; got {tuple(made.shape)} for {tile.scaled(self._compression)} "
                f"after {tuple(self.result.shape)}."
            )
        made *= self._weights(rows, scale[0], tile.rows)[:, None] / len(self._grids)
        made *= self._weights(columns, scale[1], tile.columns)
        tile.scaled(*scale).of(self.result[sample]).add_(made[0])
        self.done += 1

    def _check_spot(self, spot: Tile) -> float:
        """PSNR over the range of values, in the middle half of a tile of the first sample."""
        made = self._compute(0, spot, f"the spot at {spot.scaled(self._compression)}")
        found = spot.scaled(*self._scale_of(made, spot)).of(self.result[0:1])
        rows, columns = (slice(length // 4, length - length // 4) for length in made.shape[-2:])
        wanted, found = made[..., rows, columns], found[..., rows, columns]
        spread = float(wanted.max() - wanted.min()) or 1.0
        return -10 * math.log10(max(float((wanted - found).square().mean()) / spread**2, 1e-20))

    def _compute(self, sample: int, tile: Tile, name: str) -> Tensor:
        """The network's result for a tile, fp32 on the CPU."""
        cut = tile.scaled(self._per_cell).of(self._source[sample : sample + 1])
        result = self._network(self._prepare(cut.to(self.device, copy=True)).to(self.dtype))
        result = result.to(device=CPU, dtype=torch.float32, copy=True)
        if not torch.isfinite(result).all():
            reason = "" if torch.isfinite(cut).all() else " The values that go into it are not finite already."
            dtype = str(self.dtype).removeprefix("torch.")
            raise NotFinite(f"tiles: expected finite numbers; got NaN or infinity in {name}, in {dtype}.{reason}")
        return result

    def _plan(self, tile: int) -> list[tuple[list[Span], list[Span]]]:
        """The different grids: spans in latent cells along the height and along the width."""
        cells, overlap = tile // self._compression, self.overlap // self._compression
        if cells < MIN_CELLS:
            raise ValueError(
                f"tiles: expected at least {MIN_CELLS * self._compression} pixels for {MIN_CELLS} latent cells of "
                f"{self._compression}; got {tile}."
            )
        grids = []
        for shape in self._shapes:
            sides = [max(MIN_CELLS, int(cells * share)) for share in shape]
            rows, columns = (
                even_spans(length, side, min(overlap, side // 2))
                for length, side in zip(self._cells, sides, strict=True)
            )
            if (rows, columns) not in grids:
                grids.append((rows, columns))
        return grids

    def _weights(self, spans: list[Span], factor: int, span: Span) -> Tensor:
        return axis_weights([item.scaled(factor) for item in spans])[spans.index(span)]

    def _scale_of(self, result: Tensor, tile: Tile) -> tuple[int, int]:
        """Positions of the result per latent cell along the height and the width, as the network made them."""
        cells = [span.stop - span.start for span in tile]
        if result.ndim == self._source.ndim and result.shape[0] == 1:
            scale, rests = zip(*(divmod(*pair) for pair in zip(result.shape[-2:], cells, strict=True)), strict=True)
            if all(scale) and not any(rests):
                return scale
        raise ValueError(
            f"tiles: expected a result of a whole number of positions for each of {cells[0]}×{cells[1]} latent cells; "
            f"got {tuple(result.shape)}."
        )


class BlendEncode(BlendJob):
    """Encodes frames in blended tiles that begin at multiples of the compression; arguments as of `BlendJob`."""

    _encodes = True


class BlendDecode(BlendJob):
    """Decodes latents in blended tiles; arguments as of `BlendJob`."""

    _encodes = False


def _across(spans: list[Span]) -> Span:
    """A tile halfway between the first two of an axis."""
    return spans[0].shifted((spans[1].start - spans[0].start + 1) // 2) if len(spans) > 1 else spans[0]
