"""Parts of a frame that tiles cover and layers read, without overlap or blending. Plain integers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """A part of one axis.

    Attributes:
        start, stop: the positions covered; `stop` is exclusive.
        length: of the whole axis.
    """

    start: int
    stop: int
    length: int

    def grown(self, before: int, after: int | None = None) -> Interval:
        """With `before` more positions in front and `after` (default: as many) behind, cut at the ends of the axis."""
        after = before if after is None else after
        return Interval(max(0, self.start - before), min(self.length, self.stop + after), self.length)

    def scaled(self, up: int, down: int = 1) -> Interval:
        """The same part at up / down times the resolution; its edges are multiples of `down`."""
        return Interval(*(value * up // down for value in self))

    def halved(self) -> Interval:
        """The smallest part at half the resolution that covers this one."""
        return Interval(self.start // 2, -(-self.stop // 2), self.length // 2)

    def parts(self, side: int, step: int) -> list[Interval]:
        """Cut at multiples of `step` into the fewest parts of at most `side`, as equal as they can be."""
        steps = -(-(self.stop - self.start) // step)
        count = -(-steps // max(1, side // step))
        edges = [self.start + step * (steps * i // count) for i in range(count)] + [self.stop]
        return [Interval(*pair, self.length) for pair in zip(edges, edges[1:], strict=False)]


class Area(NamedTuple):
    """A part of a frame at one resolution. Its methods do to both axes what those of `Interval` do to one."""

    rows: Interval
    columns: Interval

    @classmethod
    def whole(cls, height: int, width: int) -> Area:
        return cls(Interval(0, height, height), Interval(0, width, width))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def pixels(self) -> int:
        height, width = self.shape
        return height * width

    def grown(self, before: int, after: int | None = None) -> Area:
        return Area(self.rows.grown(before, after), self.columns.grown(before, after))

    def scaled(self, up: int, down: int = 1) -> Area:
        return Area(self.rows.scaled(up, down), self.columns.scaled(up, down))

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
        return f"rows {top}–{bottom}, columns {left}–{right}"
