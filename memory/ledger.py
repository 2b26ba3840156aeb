"""Readings over time: phases with before, peak and after, marks within them, warnings, and growth from run to run.

    with ledger.current().phase("sample"):
        …
        ledger.mark("sample", step=3)

`mark` and `current` use the one ledger of the process, which logs to steadyvsr.memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import leak, probe
from .process import shared
from .reading import Figure, Reading, size_text

log = logging.getLogger("steadyvsr.memory")

RING_MARKS = 4096
RING_PHASES = 512
SERIES = 64
"""How many different phases are watched for growth; beyond that, the one that ran longest ago is forgotten."""


@dataclass(frozen=True)
class Levels:
    """How full a card, all processes counted, must be for a warning.

    Attributes:
        warn, critical: shares of the card.
    """

    warn: float = 0.80
    critical: float = 0.92

    def __post_init__(self) -> None:
        for name in ("warn", "critical"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Levels.{name}: expected a share above 0 and up to 1; got {getattr(self, name)}.")

    def of(self, reading: Reading) -> str:
        """ "ok", "warn", "critical", or "unknown" where nobody tells how full the card is."""
        used, total = reading.used.bytes, reading.total.bytes
        if used is None or total is None:
            return "unknown"
        return "critical" if used >= self.critical * total else "warn" if used >= self.warn * total else "ok"


@dataclass(frozen=True)
class Mark:
    """A reading within a run.

    Attributes:
        kind: mark | step.
        index: of the step.
        phase: the innermost phase that was open, or "".
    """

    stage: str
    kind: str
    index: int | None
    phase: str
    reading: Reading


@dataclass(frozen=True)
class Peak:
    """The most that was read on one device; `allocated` comes from the allocator's own counter where it has one."""

    allocated: Figure = Figure()
    reserved: Figure = Figure()
    driver: Figure = Figure()

    def with_(self, reading: Reading) -> Peak:
        counted = reading.peak if reading.peak.bytes is not None else reading.allocated
        return Peak(
            _larger(self.allocated, counted),
            _larger(self.reserved, reading.reserved),
            _larger(self.driver, reading.driver),
        )

    def __str__(self) -> str:
        known = [(word, figure) for word, figure in vars(self).items() if figure.bytes is not None]
        return " · ".join(f"{size_text(figure.bytes)} {word} ({figure.source})" for word, figure in known) or "unknown"


@dataclass(frozen=True)
class Phase:
    """A part of a run that has ended.

    Attributes:
        before, after: one reading for each device.
        peaks: by device.
        failed: an exception left it.
        growth: over the last equal phases, by device, where there were enough.
    """

    name: str
    seconds: float
    before: tuple[Reading, ...]
    after: tuple[Reading, ...]
    peaks: dict[str, Peak]
    failed: bool
    growth: dict[str, leak.Growth]

    def __str__(self) -> str:
        parts = []
        for before, after in zip(self.before, self.after, strict=True):
            most, what = self.peaks[after.device].allocated, "allocated"
            if most.bytes is None:
                most, what = self.peaks[after.device].driver, "process"
            figures = (before.tensors, most, after.tensors)
            first, peak, last = (size_text(figure.bytes) for figure in figures)
            parts.append(f"{after.device} {what} {first} → peak {peak} → {last}")
        return f"{self.name}{' (failed)' if self.failed else ''}: {' · '.join(parts)} · {self.seconds:.2f} s"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        plain = asdict(self)
        for device, growth in self.growth.items():
            plain["growth"][device]["leaking"] = growth.leaking
        return {**plain, "peak": plain.pop("peaks")}


@dataclass
class _Open:
    name: str
    started: float
    before: tuple[Reading, ...]
    peaks: dict[str, Peak]


class Ledger:
    """Keeps a bounded number of marks and phases. Safe to use from several threads.

    Args:
        reader: what to read with; None is the probe of the process.
        devices: which to read, or None for the accelerator that torch uses now, else the CPU. Reading an accelerator
            that nothing else uses would start it.

    Attributes:
        levels: see `Levels`.
    """

    def __init__(self, reader: probe.Probe | None = None, devices: Sequence[probe.Device] | None = None) -> None:
        self.reader = reader
        self.devices = devices
        self.levels = Levels()
        self.marks: deque[Mark] = deque(maxlen=RING_MARKS)
        self.phases: deque[Phase] = deque(maxlen=RING_PHASES)
        self._lock = threading.RLock()
        self._open: list[_Open] = []
        self._sequence: _Open | None = None
        self._since_report: dict[str, Peak] = {}
        self._level: dict[str, str] = {}
        self._series: dict[tuple[str, str, str], deque[int]] = {}
        self._leaking: set[tuple[str, str, str]] = set()

    def mark(self, stage: str, *, step: int | None = None, quiet: bool = False) -> str:
        """Reads every device and returns one line for each, which is also logged at INFO.

        Args:
            step: its number, where the mark is one of many.
            quiet: keep the mark, but do not log it.
        """
        kind = "mark" if step is None else "step"
        with self._lock:
            readings = self._read(settled=False)
            phase = self._open[-1].name if self._open else ""
            self.marks.extend(Mark(stage, kind, step, phase, reading) for reading in readings)
        lines = [reading.line(stage if step is None else f"{stage} step {step}") for reading in readings]
        if len(lines) > 1:
            lines = [f"{line} · {reading.device}" for line, reading in zip(lines, readings, strict=True)]
        if not quiet:
            for line in lines:
                _say(line)
        return "\n".join(lines)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside is one phase. Phases of one name are compared for growth; phases may nest."""
        with self._lock:
            self._open.append(opened := self._begin(name))
        failed = True
        try:
            yield
            failed = False
        finally:
            with self._lock:
                self._end(opened, name, failed)
                self._open.remove(opened)

    def end_phase(self, name: str) -> Phase:
        """Ends the phase `name`, which began where the last one ended, or with `begin_sequence`.

        For phases that follow one another through a workflow, where no block of code encloses them.
        """
        with self._lock:
            opened = self._sequence = self._sequence or self._begin(name)
            ended = self._end(opened, name, failed=False)
            self._sequence = self._opened("", ended.after)
            return ended

    def begin_sequence(self) -> None:
        """Starts a sequence of phases for `end_phase`, such as a prompt: what came before belongs to none of them."""
        with self._lock:
            self._sequence = self._begin("")

    def running_peaks(self) -> dict[str, Peak]:
        """The most that was read on each device, now included, since the phase began that `end_phase` will end."""
        with self._lock:
            self._read(settled=False)
            return {} if self._sequence is None else dict(self._sequence.peaks)

    def open_phases(self) -> list[tuple[str, float]]:
        """Names of the phases that are open, outermost first, each with the moment of its first reading."""
        with self._lock:
            return [(opened.name, opened.before[0].moment) for opened in self._open if opened.before]

    def take_peaks(self) -> dict[str, Peak]:
        """The most that was read on each device since the last call."""
        with self._lock:
            readings = self._read(settled=False)
            peaks, self._since_report = self._since_report, {}
            self._reset_peaks(readings)
            return peaks

    def since(self, moment: float) -> Ledger:
        """A ledger with the phases that ended, and the marks that were made, after a moment of `time.perf_counter`."""
        with self._lock:
            later = Ledger(self.reader, self.devices)
            later.phases.extend(phase for phase in self.phases if all(item.moment >= moment for item in phase.after))
            later.marks.extend(mark for mark in self.marks if mark.reading.moment >= moment)
            return later

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`: all phases and marks that are still in the rings."""
        with self._lock:
            return {
                "phases": [phase.to_json() for phase in self.phases],
                "marks": [asdict(mark) for mark in self.marks],
            }

    def _read(self, *, settled: bool) -> tuple[Reading, ...]:
        """Readings of all devices, counted into every open peak, and checked against the warning levels."""
        reader = self.reader or probe.current()
        devices = [probe.default_device()] if self.devices is None else self.devices
        readings = tuple(probe.attempt(reader, device, settled=settled) for device in devices)
        for reading in readings:
            for peaks in self._all_peaks():
                peaks[reading.device] = peaks.get(reading.device, Peak()).with_(reading)
            self._watch(reading)
        return readings

    def _all_peaks(self) -> list[dict[str, Peak]]:
        sequence = [self._sequence] if self._sequence else []
        return [self._since_report, *(opened.peaks for opened in [*self._open, *sequence])]

    def _begin(self, name: str) -> _Open:
        return self._opened(name, self._read(settled=True))

    def _opened(self, name: str, readings: tuple[Reading, ...]) -> _Open:
        # The peaks of these readings are already counted for whoever watched before.
        self._reset_peaks(readings)
        fresh = {reading.device: Peak().with_(replace(reading, peak=reading.allocated)) for reading in readings}
        return _Open(name, time.perf_counter(), readings, fresh)

    def _reset_peaks(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            if reading.peak.bytes is not None:
                (self.reader or probe.current()).reset_peak(reading.device)

    def _end(self, opened: _Open, name: str, failed: bool) -> Phase:
        seconds = time.perf_counter() - opened.started
        after = self._read(settled=True)  # counted into the peaks of `opened`, which is still watched
        growth = {} if failed else {r.device: found for r in after if (found := self._follow(name, r))}
        known = {reading.device: reading for reading in opened.before}
        before = tuple(known.get(reading.device, reading) for reading in after)
        ended = Phase(name, seconds, before, after, dict(opened.peaks), failed, growth)
        self.phases.append(ended)
        return ended

    def _follow(self, name: str, reading: Reading) -> leak.Growth | None:
        """Adds the end of a phase to its series, and warns once when the series begins to grow."""
        figure = reading.tensors
        if figure.bytes is None:
            return None
        # A series never mixes what different sources counted.
        key = (name, reading.device, figure.source)
        values = self._series[key] = self._series.pop(key, deque(maxlen=leak.WINDOW_RUNS))
        values.append(figure.bytes)
        if len(self._series) > SERIES:
            del self._series[next(iter(self._series))]
        growth = leak.fit(list(values))
        if growth is None or not growth.leaking:
            self._leaking.discard(key)
        elif key not in self._leaking:
            self._leaking.add(key)
            log.warning("%s grows on %s: %s (%s)", name, reading.device, growth, figure.source)
        return growth

    def _watch(self, reading: Reading) -> None:
        level, order = self.levels.of(reading), ("unknown", "ok", "warn", "critical")
        if order.index(level) > max(1, order.index(self._level.get(reading.device, "ok"))):
            used, total = size_text(reading.used.bytes), size_text(reading.total.bytes)
            log.warning("%s: %s of %s in use (%s, %s)", reading.device, used, total, reading.used.source, level)
        self._level[reading.device] = level


def current() -> Ledger:
    """The ledger of the process."""
    return shared("ledger", Ledger)


def mark(stage: str, *, step: int | None = None, quiet: bool = False) -> str:
    """Reads every device of the ledger and logs one line, which is also returned; see `Ledger.mark`.

    `after VAE encode · 2.10 GiB allocated · 2.50 reserved · 3.02 driver (NVML)`
    """
    return current().mark(stage, step=step, quiet=quiet)


def _say(line: str) -> None:
    """Logs at INFO; in a program that has not set up logging, the line still reaches the terminal."""
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    log.info(line)


def _larger(first: Figure, second: Figure) -> Figure:
    if first.bytes is None or second.bytes is None:
        return second if first.bytes is None else first
    return second if second.bytes > first.bytes else first
