"""What a run will need, what fits, and what is in the way: plain numbers in, a plan out.

Nothing here knows a model. Who knows one gives its needs in bytes (models/flashvsr/footprint.py counts FlashVSR's from
its shapes) or a `Line` through measurements, and gets a setting, an answer or a refusal that names what to change.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .reading import GIB, MIB, Reading, size_text

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
CONTEXT_BYTES = 512 * MIB
"""What a CUDA process takes beside its tensors: the context with loaded kernels is 300 to 600 MiB by common report;
the memory research of this project gives the same range. Predicted, not measured here."""
POOL_SHARE = 0.10
"""What the allocator's pool holds beyond live tensors at a peak. ComfyUI itself asks for 10 % more than a model's size
before a load (`load_models_gpu`: total · 1.1)."""
RESERVE_BYTES = 256 * MIB
"""Left alone on a card for the desktop and for other processes' moments."""
HISTORY = 256

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Need:
    """Bytes that a phase needs at its worst moment, by source.

    Attributes:
        weights: on the device.
        state: kept between steps (key/value cache, decoder memory).
        activations: at the worst moment, state excluded.
        decoder: beside the rest, where a VAE decodes.
    """

    weights: int = 0
    state: int = 0
    activations: int = 0
    decoder: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of live tensors."""
        return self.weights + self.state + self.activations + self.decoder

    @property
    def device(self) -> int:
        """Bytes taken from the card: live tensors and what the pool holds beyond them."""
        return int(self.tensors * (1 + POOL_SHARE))

    @property
    def worker(self) -> int:
        """Bytes of a process of its own: its context as well."""
        return self.device + CONTEXT_BYTES

    def __str__(self) -> str:
        parts = [f"{name} {size_text(size)}" for name, size in vars(self).items() if size]
        return f"{size_text(self.tensors)} ({', '.join(parts) or 'nothing'})"


@dataclass(frozen=True)
class Line:
    """Bytes = per_pixel · pixels + fixed.

    Attributes:
        source: where the coefficients come from: the command that measured them, or the shapes they were counted from.
        largest_error: of the measurements, as a share of each; 0 where the line was not fitted.
    """

    per_pixel: float
    fixed: float
    source: str
    largest_error: float = 0.0

    def at(self, pixels: int) -> int:
        return max(0, round(self.per_pixel * pixels + self.fixed))


def fit_line(measured: Mapping[int, int], source: str) -> Line:
    """The least-squares line through bytes by pixels, each weighted by 1 / bytes² (the error that counts is a share).

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(measured) < 2:
        raise ValueError(f"budget.fit_line: expected at least 2 sizes; got {len(measured)}. Measure another size.")
    rows = [(pixels, size, 1 / max(size, 1) ** 2) for pixels, size in measured.items()]
    total = sum(w for _, _, w in rows)
    mean_x = sum(w * x for x, _, w in rows) / total
    mean_y = sum(w * y for _, y, w in rows) / total
    spread = sum(w * (x - mean_x) ** 2 for x, _, w in rows)
    slope = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in rows) / spread
    line = Line(slope, mean_y - slope * mean_x, source)
    error = max(abs(line.at(x) - y) / max(y, 1) for x, y, _ in rows)
    return Line(line.per_pixel, line.fixed, source, error)


def weight_bytes(parameters: int, dtype: str) -> int:
    """Bytes of that many parameters.

    Raises:
        ValueError: a dtype that is not in `DTYPE_BYTES`.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"budget: expected a dtype of {', '.join(DTYPE_BYTES)}; got {dtype!r}.")
    return parameters * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Fit:
    """The first setting that fits, in the caller's order of preference.

    Attributes:
        fits: whether any does; `None` may be a setting, such as "no tiles".
        setting: None where none fits.
        need: of that setting, or of the smallest where none fits.
        tried: every setting up to it with its bytes.
    """

    fits: bool
    setting: Any | None
    need: Need
    tried: tuple[tuple[Any, int], ...]


def fit(budget: int, settings: Iterable[Setting], need: Callable[[Setting], Need], weights: int = 0) -> Fit:
    """Chooses tile, chunk or number of workers: whatever `settings` are, best first.

    Args:
        budget: bytes of live tensors that may be used.
        need: bytes of a setting.
        weights: the model's own, named in the error.

    Raises:
        ValueError: no settings, or a budget below the model's own weights.
    """
    if budget < weights:
        raise ValueError(
            f"budget: expected at least the model's own weights, {size_text(weights)}; got {size_text(budget)}. "
            "Raise the budget, or choose a smaller precision."
        )
    tried: list[tuple[Any, int]] = []
    smallest: Need | None = None
    for setting in settings:
        found = need(setting)
        tried.append((setting, found.tensors))
        if found.tensors <= budget:
            return Fit(True, setting, found, tuple(tried))
        if smallest is None or found.tensors < smallest.tensors:
            smallest = found
    if smallest is None:
        raise ValueError("budget: expected at least one setting to choose from; got none.")
    return Fit(False, None, smallest, tuple(tried))


def workers(footprint: int, available: int, reserve: int = RESERVE_BYTES) -> int:
    """How many workers of this footprint run side by side on a card with that many bytes (2 × 11 GB on 16 GB: 1).

    Raises:
        ValueError: a footprint that is not positive.
    """
    if footprint <= 0:
        raise ValueError(f"budget.workers: expected a footprint above 0; got {footprint}.")
    return max(0, available - reserve) // footprint


@dataclass(frozen=True)
class Resident:
    """Something on a device.

    Attributes:
        movable: whether it may be offloaded to make room (a pinned model or another process may not).
    """

    name: str
    bytes: int
    movable: bool = True


@dataclass(frozen=True)
class Admission:
    """The answer to `may_load`.

    Attributes:
        allowed: fits now.
        free: bytes that are free by measurement; None where nothing could be read.
        short: bytes that are missing.
        in_the_way: what is on the device, largest first.
        source: of the free bytes.
    """

    allowed: bool
    needed: int
    free: int | None
    short: int
    in_the_way: tuple[Resident, ...]
    device: str
    source: str

    @property
    def enough_if_moved(self) -> bool:
        """Whether it would fit once everything movable is gone."""
        return sum(item.bytes for item in self.in_the_way if item.movable) >= self.short

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.device}: needs {size_text(self.needed)}; how much is free cannot be read"
        state = f"{self.device}: needs {size_text(self.needed)}, {size_text(self.free)} free ({self.source})"
        if self.allowed:
            return state
        names = ", ".join(
            f"{item.name} {size_text(item.bytes)}{'' if item.movable else ' (stays)'}" for item in self.in_the_way
        )
        return f"{state}, {size_text(self.short)} short · in the way: {names or 'nothing that is known here'}"


def may_load(
    needed: int, reading: Reading, residents: Sequence[Resident] = (), limit: int | None = None, reserve: int = 0
) -> Admission:
    """Whether that many bytes can be loaded now, and if not, what is in the way.

    Args:
        reading: of the device, just taken.
        residents: our models on it, by the books; other processes are added from the reading.
        limit: bytes that all residents and the new load may have together, besides what is free.
        reserve: bytes to leave free.
    """
    free = reading.free
    source = reading.used.source
    if free is not None:
        free = max(0, free - reserve)
    if limit is not None:
        room = max(0, limit - sum(item.bytes for item in residents))
        if free is None or room < free:
            free, source = room, "budget"
    others = [Resident(f"{other.name} (pid {other.pid})", other.bytes or 0, False) for other in reading.others]
    in_the_way = tuple(sorted([*residents, *others], key=lambda item: -item.bytes))
    short = 0 if free is None else max(0, needed - free)
    return Admission(free is not None and short == 0, needed, free, short, in_the_way, reading.device, source)


@dataclass(frozen=True)
class Choice:
    """The chosen device, and why."""

    device: str
    reason: str


def choose_device(needed: int, readings: Sequence[Reading], *, cpu_allowed: bool) -> Choice:
    """The device with the most measured free memory that fits; the CPU only where that is allowed.

    Raises:
        ValueError: nothing fits and the CPU is not allowed; names every device.
    """
    cards = [reading for reading in readings if reading.device != "cpu"]
    fitting = [card for card in cards if card.free is not None and card.free >= needed]
    if fitting:
        best = max(fitting, key=lambda card: card.free or 0)
        return Choice(
            best.device, f"most free of {len(cards)}: {size_text(best.free)} ({best.used.source}) ≥ {size_text(needed)}"
        )
    seen = "; ".join(f"{card.device} {size_text(card.free)} free" for card in cards) or "no accelerator"
    if not cpu_allowed:
        raise ValueError(
            f"device auto: expected {size_text(needed)} free on one device; got {seen}. "
            "Free memory, choose a device by name, or allow the CPU."
        )
    return Choice("cpu", f"no device has {size_text(needed)} free: {seen}")


@dataclass(frozen=True)
class Comparison:
    """A prediction and what was then measured, in bytes."""

    setting: str
    predicted: int
    measured: int
    source: str

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / max(self.measured, 1)


class History:
    """The last comparisons of predicted and measured peaks."""

    def __init__(self) -> None:
        self._kept: deque[Comparison] = deque(maxlen=HISTORY)
        self._lock = threading.Lock()

    def add(self, setting: str, predicted: int, measured: int, source: str) -> Comparison:
        compared = Comparison(setting, predicted, measured, source)
        with self._lock:
            self._kept.append(compared)
        return compared

    def comparisons(self) -> tuple[Comparison, ...]:
        with self._lock:
            return tuple(self._kept)

    def worst(self) -> Comparison | None:
        return max(self.comparisons(), key=lambda item: abs(item.error), default=None)

    def table(self) -> str:
        """One line for each comparison."""
        rows = [("setting", "predicted", "measured", "error", "source")]
        rows += [
            (
                item.setting,
                size_text(item.predicted),
                size_text(item.measured),
                f"{100 * item.error:+.1f} %",
                item.source,
            )
            for item in self.comparisons()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def gib(value: float) -> int:
    """GiB, as a widget gives them, in bytes."""
    return int(value * GIB)
