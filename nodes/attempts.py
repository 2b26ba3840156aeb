"""How a run reports its memory: the figures that were read, and what was tried when memory ran out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management as mm

from ..memory.ledger import Peak
from ..memory.reading import Figure, Reading, size_text

UNLOAD_OTHERS = "unload others"


class Attempts(list[dict[str, Any]]):
    """What did not fit in one run and what was tried next, as the report shows it.

    Each attempt says where the run was, with what settings, and also `free`, the bytes that were free then (None where
    that cannot be read), and `tried`, the rung that was taken next ("" at the bottom).

    Args:
        node: display name, which the error begins with.
        columns: key of an attempt → its heading in the table.
    """

    def __init__(self, node: str, columns: Mapping[str, str]) -> None:
        super().__init__()
        self.node, self.columns = node, columns

    def table(self) -> str:
        """One line each, below the headings."""
        rows = [list(self.columns.values())]
        for attempt in self:
            cells = attempt | {"free": size_text(attempt["free"]), "tried": attempt["tried"] or "error"}
            rows.append([str(cells[key]) for key in self.columns])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def exhausted(self, error: object, advice: str) -> Exception:
        """The error to raise when nothing is left to try."""
        return mm.OOM_EXCEPTION(
            f"{self.node}: the device is out of memory, and nothing is left to try ({error}).\n{self.table()}\n{advice}"
        )


def figures(reading: Reading) -> dict[str, Any]:
    """The figures of one moment as plain values."""
    return {name: _figure(getattr(reading, name)) for name in ("allocated", "reserved", "used", "process")}


def peak_figures(peak: Peak) -> dict[str, Any]:
    return {name: _figure(figure) for name, figure in vars(peak).items()}


def node_line(predicted: int, measured: int | None, budget: int | None, attempts: Attempts) -> dict[str, Any]:
    """What the node shows of its memory: bytes predicted, measured and allowed, and advice where they did not fit."""
    advice = "it did not fit at first: see the attempts in the report" if attempts else ""
    return {"predicted": predicted, "measured": measured, "budget": budget, "advice": advice}


def _figure(figure: Figure) -> dict[str, Any]:
    return {"bytes": figure.bytes, "source": figure.source or figure.note}
