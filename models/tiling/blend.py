"""Encode or decode with any network in tiles that are blended: the way for networks of which nothing is known.

Each tile is seen alone, over all its frames, so what a network does across the frame (attention, normalisation) differs
from tile to tile; `image_vae` and `wan_vae` are the ways for networks that are known. Time is never split: a causal
network would start anew at every cut. The result is gathered in fp32 on the CPU; one tile at a time is on the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .job import NotFinite, OnStep
from .plan import Span, axis_weights, even_spans

CPU = torch.device("cpu")
MIN_CELLS = 2
"""Fewest latent cells along the side of a tile: one could not overlap and still advance."""

SQUARE = ((1.0, 1.0),)
THREE_GRIDS = ((1.0, 1.0), (0.5, 2.0), (2.0, 0.5))
"""Height and width of tiles of one area, as shares of their side. A network that looks across its tile errs differently
in each grid, so their mean errs less, at three times the work; ComfyUI's own tiled nodes do the same for images."""

Network = Callable[[Tensor], Tensor]
"""Maps one tile, NCHW or NCTHW with N = 1, to its result; the tile's device and dtype say where and how."""


class _Blend(ABC):
    """Attributes as of `TileJob`, and:

    Attributes:
        overlap: of neighbouring tiles, in pixels; at most half a tile.
        grid: tiles along the height and along the width, of the first grid.
        spot_db: PSNR of the result against one more tile, laid across the seams in its middle; None before that, or
            where there are no seams.
    """

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
        self.device, self.dtype, self.overlap = device, dtype, overlap
        self.result = torch.empty(0)
        self._network, self._prepare = network, prepare
        self._source, self._compression = source, compression
        self._cells = self._count_cells(source.shape[-2], source.shape[-1])
        self._done, self._spot, self._shapes = 0, spot, shapes
        self.spot_db: float | None = None
        self._grids = self._plan(tile)
        self.tile = tile

    @property
    def done(self) -> int:
        return self._done

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
        """Goes on in tiles of this side, with an overlap of half a tile at most.

        Tiles that are done are kept where the new grid is the old one, and computed again where it is not.

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
            self._grids, self._done, self.result = grids, 0, torch.empty(0)
        self.tile = tile

    def advance(self, on_step: OnStep) -> None:
        """Computes one tile of one sample.

        Raises:
            NotFinite: its result holds NaN or infinity.
            ValueError: the network's results do not fit together.
        """
        on_step()
        sample, position = divmod(self._done, self._tiles_of_sample)
        rows, columns = self._grids[0]
        if sample == self._source.shape[0]:
            self.spot_db = self._check_spot(_across(rows), _across(columns))
            self._done += 1
            return
        for rows, columns in self._grids:
            if position < len(rows) * len(columns):
                break
            position -= len(rows) * len(columns)
        row, column = rows[position // len(columns)], columns[position % len(columns)]
        tile = self._compute(self._cut_out(sample, row, column), f"sample {sample}, {self._words(row, column)}")
        scale = self._scale_of(tile, row, column)
        if self._done == 0:
            height, width = (cells * factor for cells, factor in zip(self._cells, scale, strict=True))
            self.result = torch.zeros(self._source.shape[0], *tile.shape[1:-2], height, width)
        elif tile.shape[1:-2] != self.result.shape[1:-2]:
            raise ValueError(
                f"tiles: expected results of one shape; got {tuple(tile.shape)} for {self._words(row, column)} after "
                f"{tuple(self.result.shape)}."
            )
        y, x = row.scaled(scale[0]), column.scaled(scale[1])
        tile *= self._weights(rows, scale[0], row)[:, None] / len(self._grids)
        tile *= self._weights(columns, scale[1], column)
        self.result[sample, ..., y.start : y.stop, x.start : x.stop] += tile[0]
        self._done += 1

    def _check_spot(self, row: Span, column: Span) -> float:
        """PSNR over the range of values, in the middle half of a tile of the first sample."""
        tile = self._compute(self._cut_out(0, row, column), f"the spot at {self._words(row, column)}")
        y, x = (
            span.scaled(factor) for span, factor in zip((row, column), self._scale_of(tile, row, column), strict=True)
        )
        found = self.result[0:1, ..., y.start : y.stop, x.start : x.stop]
        rows, columns = (slice(length // 4, length - length // 4) for length in tile.shape[-2:])
        wanted, found = tile[..., rows, columns], found[..., rows, columns]
        spread = float(wanted.max() - wanted.min()) or 1.0
        return -10 * math.log10(max(float((wanted - found).square().mean()) / spread**2, 1e-20))

    def _compute(self, cut: Tensor, name: str) -> Tensor:
        """The network's result for a tile, fp32 on the CPU."""
        result = self._network(self._prepare(cut.to(self.device, copy=True)).to(self.dtype))
        result = result.to(device=CPU, dtype=torch.float32, copy=True)
        if not torch.isfinite(result).all():
            reason = "" if torch.isfinite(cut).all() else " The values that go into it are not finite already."
            dtype = str(self.dtype).removeprefix("torch.")
            raise NotFinite(f"tiles: expected finite numbers; got NaN or infinity in {name}, in {dtype}.{reason}")
        return result

    def _plan(self, tile: int) -> list[tuple[list[Span], list[Span]]]:
        """Grids: spans in latent cells along the height and the width; grids that are the same once."""
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

    def _scale_of(self, result: Tensor, row: Span, column: Span) -> tuple[int, int]:
        """Positions of the result per latent cell along the height and the width, as the network made them."""
        if result.ndim == self._source.ndim and result.shape[0] == 1:
            scale = []
            for count, span in zip(result.shape[-2:], (row, column), strict=True):
                factor, rest = divmod(count, span.stop - span.start)
                scale.append(0 if rest else factor)
            if all(scale):
                return scale[0], scale[1]
        cells = (row.stop - row.start, column.stop - column.start)
        raise ValueError(
            f"tiles: expected a result of a whole number of positions for each of {cells[0]}×{cells[1]} latent cells; "
            f"got {tuple(result.shape)}."
        )

    def _words(self, row: Span, column: Span) -> str:
        row, column = row.scaled(self._compression), column.scaled(self._compression)
        return f"rows {row.start}–{row.stop}, columns {column.start}–{column.stop}"

    @abstractmethod
    def _count_cells(self, height: int, width: int) -> tuple[int, int]: ...

    @abstractmethod
    def _cut_out(self, sample: int, row: Span, column: Span) -> Tensor: ...


class BlendEncode(_Blend):
    """Encodes frames in tiles that begin at multiples of the compression.

    Args:
        network: maps a tile of pixels to latents.
        source: NCHW or NCTHW on the CPU; height and width are multiples of the compression.
        tile, overlap: in pixels.
        compression: pixels per latent along a side.
        device, dtype: of the computation.
        prepare: brings a tile to the numbers that the network expects, on the device, before it is cast.
        spot: computes one more tile at the end, to compare.
        shapes: of the tiles of each grid; the result is the mean of all grids.

    Raises:
        ValueError: one of these.
    """

    def _count_cells(self, height: int, width: int) -> tuple[int, int]:
        size = self._compression
        if height % size or width % size:
            raise ValueError(f"tiles: expected a height and width in multiples of {size}; got {height}×{width}.")
        return height // size, width // size

    def _cut_out(self, sample: int, row: Span, column: Span) -> Tensor:
        row, column = row.scaled(self._compression), column.scaled(self._compression)
        return self._source[sample : sample + 1, ..., row.start : row.stop, column.start : column.stop]


class BlendDecode(_Blend):
    """Decodes latents in tiles.

    Args:
        network: maps a tile of latents to pixels.
        source: NCHW or NCTHW latents.
        tile, overlap: in output pixels.
        compression: output pixels per latent along a side.
        device, dtype: of the computation.
        prepare: brings a tile to the numbers that the network expects, on the device, before it is cast.
        spot: computes one more tile at the end, to compare.
        shapes: of the tiles of each grid; the result is the mean of all grids.

    Raises:
        ValueError: one of these.
    """

    def _count_cells(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def _cut_out(self, sample: int, row: Span, column: Span) -> Tensor:
        return self._source[sample : sample + 1, ..., row.start : row.stop, column.start : column.stop]


def _across(spans: list[Span]) -> Span:
    """A tile halfway between the first two of an axis."""
    if len(spans) == 1:
        return spans[0]
    shift = (spans[1].start - spans[0].start + 1) // 2
    return Span(spans[0].start + shift, spans[0].stop + shift, 0, 0)
