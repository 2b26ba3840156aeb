"""One reading of one device: every number with its source and with what it covers. Plain values, no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MIB, GIB = 1 << 20, 1 << 30

EXACT = "exact"
"""Counts what it says, and nothing else."""
WHOLE_DEVICE = "whole device"
"""Includes other processes: a difference of two such numbers is a hint, not a proof."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Figure:
    """A number of bytes as it was read.

    Attributes:
        bytes: None where nothing could be read; never a guess.
        source: who said it, such as "torch.cuda", "NVML", "USS".
        confidence: exact | whole device | unknown.
        note: why it is unknown, or what to know about it.
    """

    bytes: int | None = None
    source: str = ""
    confidence: str = UNKNOWN
    note: str = ""


def exact(value: int, source: str) -> Figure:
    return Figure(int(value), source, EXACT)


def unknown(note: str) -> Figure:
    return Figure(note=note)


@dataclass(frozen=True)
class OtherProcess:
    """Another process on the same card, by NVML; `bytes` is None where the driver tells no number."""

    pid: int
    name: str
    bytes: int | None


@dataclass(frozen=True)
class Reading:
    """What one device holds at one moment.

    Attributes:
        device: as torch writes it, such as "cuda:0".
        allocated: bytes of live tensors.
        peak: most bytes of live tensors since the last reset of the counter.
        reserved: what the allocator's pool holds, allocated bytes included.
        inactive_split: part of the pool that is free but cannot be given back (fragmentation).
        dynamic: weights outside torch's allocator (ComfyUI's dynamic VRAM).
        used, total: of the whole device, every process counted.
        process: what the driver or system says this process uses.
        others: other processes on the card.
        notes: what could not be read, and why.
        moment: seconds of `time.perf_counter`.
    """

    device: str
    allocated: Figure = Figure()
    peak: Figure = Figure()
    reserved: Figure = Figure()
    inactive_split: Figure = Figure()
    dynamic: Figure = Figure()
    used: Figure = Figure()
    total: Figure = Figure()
    process: Figure = Figure()
    others: tuple[OtherProcess, ...] = ()
    notes: tuple[str, ...] = ()
    moment: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def driver(self) -> Figure:
        """What the driver says: of this process where it tells that, else of the whole device."""
        return self.process if self.process.bytes is not None else self.used

    @property
    def tensors(self) -> Figure:
        """The best number for what we hold: live tensors and dynamic weights, else the process."""
        if self.allocated.bytes is None:
            return self.process
        if self.dynamic.bytes is None:
            return self.allocated
        return exact(self.allocated.bytes + self.dynamic.bytes, f"{self.allocated.source} + {self.dynamic.source}")

    @property
    def free(self) -> int | None:
        """Bytes that the device can still give: total - used, plus what lies unused in our own pool."""
        if self.total.bytes is None or self.used.bytes is None:
            return None
        pool = (self.reserved.bytes or 0) - (self.allocated.bytes or 0) - (self.inactive_split.bytes or 0)
        return max(0, self.total.bytes - self.used.bytes + max(0, pool))

    def line(self, stage: str) -> str:
        """`after VAE encode · 2.10 GiB allocated · 2.50 reserved · 3.02 driver (NVML)`, every number as it was read."""
        parts = [(self.allocated, "allocated"), (self.dynamic, "dynamic"), (self.reserved, "reserved")]
        parts = [(figure, word) for figure, word in parts if figure.bytes is not None]
        driver = self.driver
        if driver.bytes is not None:
            scope = "" if driver.confidence == EXACT else f", {driver.confidence}"
            word = "process" if self.device == "cpu" else "driver"
            parts.append((driver, f"{word} ({driver.source}{scope})"))
        numbers = spelled([figure.bytes or 0 for figure, _ in parts])
        words = [f"{number} {word}" for number, (_, word) in zip(numbers, parts, strict=True)]
        if self.allocated.bytes is None:
            words.append("allocated unknown")
        # Users name a stage "after audio" as often as "audio".
        return " · ".join([f"after {stage.removeprefix('after ')}", *words])

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)


def spelled(amounts: Sequence[int]) -> list[str]:
    """Amounts in one unit that suits the largest; the unit stands behind the first: ["2.10 GiB", "2.50", "3.02"]."""
    largest = max((abs(amount) for amount in amounts), default=0)
    unit, name = (GIB, "GiB") if largest >= GIB // 2 else (MIB, "MiB")
    texts = [f"{amount / unit:.2f}" for amount in amounts]
    return [f"{text} {name}" if index == 0 else text for index, text in enumerate(texts)]


def size_text(amount: int | None) -> str:
    """`6.10 GiB`, `12.00 MiB`, or `unknown`."""
    return "unknown" if amount is None else spelled([amount])[0]
