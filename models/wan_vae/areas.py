"""Which part of a frame a tensor holds, and which part a layer has to read for it. Plain integers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """A part of one axis.

    Attributes:
        start, stop: what is covered.
        length: of the whole axis.
    """

    start: int
    stop: int
    length: int

    def grown(self, by: int) -> Interval:
        """With `by` more on both sides, as far as the axis goes."""
        return Interval(max(0, self.start - by), min(self.length, self.stop + by), self.length)

    def doubled(self) -> Interval:
        """The same part at twice the resolution."""
        return Interval(2 * self.start, 2 * self.stop, 2 * self.length)

    def halved(self) -> Interval:
        """The smallest part at half the resolution that covers it."""
        return Interval(self.start // 2, -(-self.stop // 2), self.length // 2)

    def parts(self, side: int, step: int) -> list[Interval]:
        """Cut into as few parts of at most `side` as there can be, of nearly equal size, at multiples of `step`."""
        steps = -(-(self.stop - self.start) // step)
        count = -(-steps // max(1, side // step))
        edges = [self.start + step * (steps * i // count) for i in range(count)] + [self.stop]
        return [Interval(*pair, self.length) for pair in zip(edges, edges[1:], strict=False)]


class Area(NamedTuple):
    """A part of a frame at one resolution."""

    rows: Interval
    columns: Interval

    @classmethod
    def whole(cls, height: int, width: int) -> Area:
        return cls(Interval(0, height, height), Interval(0, width, width))

    def grown(self, by: int) -> Area:
        return Area(self.rows.grown(by), self.columns.grown(by))

    def doubled(self) -> Area:
        return Area(self.rows.doubled(), self.columns.doubled())

    def halved(self) -> Area:
        return Area(self.rows.halved(), self.columns.halved())

    def parts(self, side: int, step: int) -> list[Area]:
        """Tiles that cover it without overlap, row by row; see `Interval.parts`."""
        columns = self.columns.parts(side, step)
        return [Area(rows, column) for rows in self.rows.parts(side, step) for column in columns]

    def of(self, x: Tensor) -> Tensor:
        """This part of x (…HW), which holds the whole frame; a view."""
        return x[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def inside(self, x: Tensor, around: Area) -> Tensor:
        """This part of x (…HW), which holds `around`; a view."""
        top, left = self.rows.start - around.rows.start, self.columns.start - around.columns.start
        height, width = self.shape
        return x[..., top : top + height, left : left + width]

    def __str__(self) -> str:
        (top, bottom, _), (left, right, _) = self
        return f"rows {top}…{bottom}, columns {left}…{right}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
