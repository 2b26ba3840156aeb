"""What a run will need, what fits, and what is in the way: plain numbers in, a plan out.

Nothing here knows a model. A caller that does passes its needs in bytes (models/flashvsr/footprint.py counts those of
FlashVSR from its shapes) and gets back a setting, an answer, or a refusal that names what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from .reading import GIB, MIB, Reading, size_text

RESERVE_BYTES = 256 * MIB
"""Left free on a card for the desktop and for peaks of other processes."""

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

    def __str__(self) -> str:
        parts = [f"{name} {size_text(size)}" for name, size in vars(self).items() if size]
        return f"{size_text(self.tensors)} ({', '.join(parts) or 'nothing'})"


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
    """Chooses the first of `settings` that fits: tiles, chunks or numbers of workers, best first.

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
    tried: list[tuple[Any, Need]] = []
    for setting in settings:
        tried.append((setting, found := need(setting)))
        if found.tensors <= budget:
            break
    if not tried:
        raise ValueError("budget: expected at least one setting to choose from; got none.")
    setting, smallest = min(tried, key=lambda each: each[1].tensors)
    fits = smallest.tensors <= budget
    return Fit(fits, setting if fits else None, smallest, tuple((each, its.tensors) for each, its in tried))


def workers(footprint: int, available: int, reserve: int = RESERVE_BYTES) -> int:
    """How many workers of this footprint run side by side on a card with that many bytes (2 × 11 GB on 16 GB: 1).

    Raises:
        ValueError: a footprint that is not positive.
    """
    if footprint <= 0:
        raise ValueError(f"budget.workers: expected a footprint above 0; got {footprint}.")
    return max(0, available - reserve) // footprint


@dataclass(frozen=True)
class Occupant:
    """Something that takes memory on a device.

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
    in_the_way: tuple[Occupant, ...]
    device: str
    source: str

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.device}: needs {size_text(self.needed)}; its free memory cannot be read"
        state = f"{self.device}: needs {size_text(self.needed)}, {size_text(self.free)} free ({self.source})"
        if self.allowed:
            return state
        names = ", ".join(
            f"{item.name} {size_text(item.bytes)}{'' if item.movable else ' (stays)'}" for item in self.in_the_way
        )
        return f"{state}, {size_text(self.short)} short · in the way: {names or 'nothing that is known here'}"


def may_load(needed: int, reading: Reading, ours: Sequence[Occupant] = ()) -> Admission:
    """Whether that many bytes can be loaded now, and if not, what is in the way.

    Args:
        reading: of the device, just taken.
        ours: our models on it, by the books; other processes are added from the reading.
    """
    free = reading.free
    others = [Occupant(f"{other.name} (pid {other.pid})", other.bytes or 0, False) for other in reading.others]
    in_the_way = tuple(sorted([*ours, *others], key=lambda item: -item.bytes))
    short = 0 if free is None else max(0, needed - free)
    return Admission(
        free is not None and short == 0, needed, free, short, in_the_way, reading.device, reading.used.source
    )


class Choice(NamedTuple):
    """The chosen device, and why."""

    device: str
    reason: str


def choose_device(needed: int, readings: Sequence[Reading], *, cpu_allowed: bool) -> Choice:
    """The device with the most free memory by measurement, if that is enough; else the CPU, where that is allowed.

    Raises:
        ValueError: nothing fits and the CPU is not allowed; names every device.
    """
    cards = [reading for reading in readings if reading.device != "cpu"]
    fitting = [card for card in cards if card.free is not None and card.free >= needed]
    if fitting:
        best = max(fitting, key=lambda card: card.free or 0)
        room = f"{size_text(best.free)} ({best.used.source}) ≥ {size_text(needed)}"
        return Choice(best.device, f"most free of {len(cards)}: {room}")
    seen = "; ".join(f"{card.device} {size_text(card.free)} free" for card in cards) or "no accelerator"
    if not cpu_allowed:
        raise ValueError(
            f"device auto: expected {size_text(needed)} free on one device; got {seen}. "
            "Free memory, choose a device by name, or allow the CPU."
        )
    return Choice("cpu", f"no device has {size_text(needed)} free: {seen}")


def gib(value: float) -> int:
    """GiB, as a widget gives them, in bytes."""
    return int(value * GIB)
