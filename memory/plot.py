"""A plot of a ledger: allocated, reserved and driver bytes over time, with the phases. Drawn with numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .ledger import Ledger
from .reading import GIB, MIB, Reading

WIDTH, HEIGHT = 960, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 40, 40
BACKGROUND, GRID, INK = (24, 26, 30), (58, 62, 70), (214, 218, 224)
BANDS = ((32, 36, 44), (40, 45, 54))
LINES = (("allocated", (90, 200, 250)), ("reserved", (250, 190, 90)), ("driver", (240, 110, 120)))
GRID_LINES = 4
GLYPH_WIDTH, GLYPH_HEIGHT, GLYPH_STEP = 5, 7, 6

# Seven rows of five pixels; each row is a number whose highest of five bits is the left pixel.
GLYPHS = {
    "0": (14, 17, 19, 21, 25, 17, 14), "1": (4, 12, 4, 4, 4, 4, 14), "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (30, 1, 1, 14, 1, 1, 30), "4": (2, 6, 10, 18, 31, 2, 2), "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14), "7": (31, 1, 2, 4, 8, 8, 8), "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12), "A": (14, 17, 17, 31, 17, 17, 17), "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14), "D": (28, 18, 17, 17, 17, 18, 28), "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16), "G": (14, 17, 16, 23, 17, 17, 15), "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14), "J": (7, 2, 2, 2, 2, 18, 12), "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31), "M": (17, 27, 21, 21, 17, 17, 17), "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14), "P": (30, 17, 17, 30, 16, 16, 16), "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17), "S": (15, 16, 16, 14, 1, 1, 30), "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14), "V": (17, 17, 17, 17, 17, 10, 4), "W": (17, 17, 17, 21, 21, 21, 10),
    "X": (17, 17, 10, 4, 10, 17, 17), "Y": (17, 17, 10, 4, 4, 4, 4), "Z": (31, 1, 2, 4, 8, 16, 31),
    ".": (0, 0, 0, 0, 0, 12, 12), ":": (0, 12, 12, 0, 12, 12, 0), "-": (0, 0, 0, 14, 0, 0, 0),
    "(": (2, 4, 8, 8, 8, 4, 2), ")": (8, 4, 2, 2, 2, 4, 8), "/": (1, 1, 2, 4, 8, 16, 16),
    "%": (24, 25, 2, 4, 8, 19, 3), "_": (0, 0, 0, 0, 0, 0, 31), "+": (0, 4, 4, 31, 4, 4, 0), " ": (0,) * 7,
}  # fmt: skip
UNKNOWN_GLYPH = (31, 17, 17, 17, 17, 17, 31)


def draw(ledger: Ledger, device: str | None = None) -> Tensor:
    """The plot of one device: THWC fp32 in 0..1, T = 1, as ComfyUI's IMAGE.

    Args:
        device: as its readings name it; None takes the first that was read.
    """
    readings = [reading for phase in ledger.phases for reading in (*phase.before, *phase.after)]
    readings += [mark.reading for mark in ledger.marks]
    device = device or (readings[0].device if readings else "cpu")
    readings = sorted((item for item in readings if item.device == device), key=lambda item: item.moment)
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, np.uint8)
    if not readings:
        _write(canvas, LEFT, HEIGHT // 2, f"nothing was read on {device}", INK)
        return _image(canvas)
    start, end = readings[0].moment, max(readings[-1].moment, readings[0].moment + 1e-3)
    highest = max(_value(item, name) or 0 for item in readings for name, _ in LINES)
    top = max(highest * 1.05, 1.0)
    unit, unit_name = (GIB, "GiB") if highest >= GIB // 2 else (MIB, "MiB")

    def column(moment: float) -> int:
        return LEFT + round((moment - start) / (end - start) * (WIDTH - LEFT - RIGHT - 1))

    def row(amount: float) -> int:
        return HEIGHT - BOTTOM - 1 - round(amount / top * (HEIGHT - TOP - BOTTOM - 1))

    _draw_phases(canvas, ledger, device, column)
    for line in range(GRID_LINES + 1):
        amount = top * line / GRID_LINES
        canvas[row(amount), LEFT : WIDTH - RIGHT] = GRID
        _write(canvas, 6, row(amount) - 3, f"{amount / unit:.2f} {unit_name}", INK)
    for name, colour in LINES:
        points = [(column(item.moment), row(value)) for item in readings if (value := _value(item, name)) is not None]
        _draw_line(canvas, points, colour)
    x = LEFT
    for text, colour in [(device, INK), *LINES]:
        x = _write(canvas, x, 8, text, colour) + 3 * GLYPH_STEP
    _write(canvas, WIDTH - RIGHT - 10 * GLYPH_STEP, 8, f"{end - start:.1f} s", INK)
    return _image(canvas)


def _value(reading: Reading, name: str) -> int | None:
    return getattr(reading, name).bytes


def _draw_phases(canvas: np.ndarray, ledger: Ledger, device: str, column) -> None:
    """A band for each phase, with its name where there is room; names alternate between two rows."""
    for index, phase in enumerate(ledger.phases):
        moments = [column(item.moment) for item in (*phase.before, *phase.after) if item.device == device]
        if not moments:
            continue
        first, last = moments[0], moments[-1]
        canvas[TOP : HEIGHT - BOTTOM, first : last + 1] = BANDS[index % 2]
        room = max(0, (WIDTH - RIGHT - first) // GLYPH_STEP)
        _write(canvas, first + 2, HEIGHT - BOTTOM + 6 + 12 * (index % 2), phase.name[:room], INK)


def _draw_line(canvas: np.ndarray, points: Sequence[tuple[int, int]], colour: tuple[int, int, int]) -> None:
    """Two pixels thick, and straight between two readings, where nothing is known."""
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], *points[-1:]], strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        xs = np.linspace(x0, x1, steps + 1).round().astype(int)
        ys = np.linspace(y0, y1, steps + 1).round().astype(int)
        for shift in (0, 1):
            canvas[np.clip(ys + shift, 0, HEIGHT - 1), np.clip(xs, 0, WIDTH - 1)] = colour


def lettering(text: str) -> np.ndarray:
    """The dots of a line of text in capitals: bool, 7 rows × 6 columns per letter."""
    glyphs = [GLYPHS.get(letter, UNKNOWN_GLYPH) for letter in text.upper()]
    rows = np.array(glyphs, np.uint8).reshape(-1, GLYPH_HEIGHT, 1)
    dots = np.unpackbits(rows, axis=2)[..., 8 - GLYPH_WIDTH :]
    spaced = np.pad(dots, ((0, 0), (0, 0), (0, GLYPH_STEP - GLYPH_WIDTH)))
    return spaced.transpose(1, 0, 2).reshape(GLYPH_HEIGHT, -1).astype(bool)


def _write(canvas: np.ndarray, x: int, y: int, text: str, colour: tuple[int, int, int]) -> int:
    """Writes text and returns where it ended; what leaves the canvas is cut."""
    rows, columns = np.nonzero(lettering(text))
    rows, columns = rows + y, columns + x
    inside = (rows >= 0) & (rows < HEIGHT) & (columns >= 0) & (columns < WIDTH)
    canvas[rows[inside], columns[inside]] = colour
    return x + GLYPH_STEP * len(text)


def _image(canvas: np.ndarray) -> Tensor:
    return torch.from_numpy(canvas).float()[None] / 255
