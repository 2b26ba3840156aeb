"""How a folder run turned out: a table for people, plain values for machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...memory import leak
from ...memory.reading import size_text
from ...models.printable import printable
from .worker import DONE, ClipResult

FIRST_STEADY_CLIP = 3
"""Memory after the first clips still holds what libraries set up once."""
WIDEST_CELL = 60


@dataclass
class FolderReport:
    """How the clips of a folder turned out.

    Attributes:
        results: one per clip that was tried, in the order of the jobs.
        skipped: names of clips that an earlier run had finished.
        admissions: how many workers each device got, and why.
        redone: names of clips that were tried again after their worker died, hung or ran out of memory.
        growth: per worker, how the bytes after a clip grow, from the third clip on.
        stopped: why the run ended before its last clip, or "".
        seconds: of the whole run.
    """

    results: list[ClipResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    admissions: list[str] = field(default_factory=list)
    redone: list[str] = field(default_factory=list)
    growth: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    seconds: float = 0.0

    @property
    def done(self) -> list[ClipResult]:
        return [result for result in self.results if result.state == DONE]

    @property
    def failed(self) -> list[ClipResult]:
        return [result for result in self.results if result.state != DONE]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {**vars(self), "results": [asdict(result) for result in self.results]}

    def table(self) -> str:
        """One line per clip, then how memory grew, then the totals.

        "device" is the most of the device's memory that was seen in use during the clip, by all processes.
        """
        rows = [("clip", "result", "frames", "fps", "peak", "after", "device")]
        for result in self.results:
            fps = f"{result.frames / result.seconds:.2f}" if result.frames and result.seconds else "-"
            what = result.state if result.state == DONE else f"{result.state}: {result.error}"
            sizes = size_text(result.footprint), size_text(result.after)
            in_use = "-" if result.in_use is None else f"{result.in_use:.1%}"
            rows.append((printable(result.name), printable(what, len(what)), str(result.frames), fps, *sizes, in_use))
        widths = [min(WIDEST_CELL, max(map(len, column))) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{worker}, memory after its clips: {growth}" for worker, growth in self.growth.items()]
        lines.append(
            f"{len(self.done)} done, {len(self.failed)} failed, {len(self.skipped)} finished before, "
            f"{self.seconds:.0f} s"
        )
        return "\n".join([*lines, *([self.stopped] if self.stopped else [])])


def growth_of(results: Iterable[ClipResult]) -> dict[str, str]:
    """How the bytes that each worker holds after a clip grow from clip to clip, without its first two."""
    series: dict[int, list[int]] = {}
    for result in results:
        series.setdefault(result.pid, []).append(result.after)
    growths = {number: leak.fit(values[FIRST_STEADY_CLIP - 1 :]) for number, values in enumerate(series.values())}
    return {f"worker {number}": str(growth) for number, growth in growths.items() if growth is not None}
