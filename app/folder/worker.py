"""A worker process: loads one model onto one device, upscales one clip after another, returns memory after each."""

from __future__ import annotations

import errno
import gc
import os
import queue
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...memory import probe
from ...memory.host import fix_heap_growth, trim
from ...models.flashvsr import FlashVSR, StreamOptions
from ...models.flashvsr.checkpoint import load_flashvsr
from ...models.flashvsr.memory_plan import MemoryPlan
from ...models.video import open_clip
from ..clip import OutputOptions, choose_dtype, footage_of, is_memory_error, open_writer, peak_rss_bytes, upscale_clip

DONE, FAILED, DISK_FULL, STOPPED = "done", "failed", "disk full", "stopped"
OUT_OF_MEMORY, NO_MODEL = "out of memory", "no model"
READY = "ready"
"""What a worker says once its model is loaded."""
PROGRESS_SECONDS = 0.5
ERROR_CHARACTERS = 1000
SMALL = MemoryPlan(kv_in_ram=True, decoder_frames=1)
"""The smallest plan that gives the same frames: for a clip whose worker died."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with: plain values, because they go to another process.

    Attributes:
        device: as torch spells it.
        model: path of the weights.
        threads: torch threads on the CPU.
        version, lq_cache_order, precision: as the command line spells them.
    """

    device: str
    model: str
    options: StreamOptions
    output: OutputOptions
    version: str = "auto"
    lq_cache_order: str = "fixed"
    precision: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Progress:
    """What a worker says every half second while it works on a clip, and before a step that may take longer than told.

    Attributes:
        frames, total: done, and in all (None where nothing says how many).
        usual: seconds that the longest step of the kind that begins now took in this clip; None for the first.
        in_use: part of the device's memory that is in use, by all processes, as measured; None if it cannot be read.
    """

    frames: int
    total: int | None
    usual: float | None
    in_use: float | None


@dataclass(frozen=True)
class ClipResult:
    """How a clip turned out, and what it took.

    Attributes:
        state: done | failed | disk full | stopped | out of memory | no model.
        error: why, where it is not done.
        footprint: peak bytes of the worker: on a card the allocator's pool and the driver's context, on the CPU
            resident memory.
        after, after_source: bytes that the worker holds after the clip, and where that number comes from.
        pid: of the worker.
        in_use: the most of the device's memory that was seen in use during the clip, as a part of the whole.
        spent: whether the worker is better replaced: the error may have broken its device or its heap.
    """

    name: str
    state: str
    error: str = ""
    frames: int = 0
    seconds: float = 0.0
    footprint: int = 0
    after: int = 0
    after_source: str = ""
    pid: int = 0
    notes: tuple[str, ...] = ()
    in_use: float | None = None
    spent: bool = False


class _Stopped(Exception):
    pass


@dataclass
class _Worker:
    settings: WorkerSettings
    model: FlashVSR
    device: torch.device
    dtype: torch.dtype
    pipe: Connection
    stop: threading.Event


def serve(pipe: Connection, orders: queue.SimpleQueue[Any], stop: threading.Event) -> None:
    """Loads the model, says `READY`, and upscales what is ordered, for ever. The parent ends this process.

    Args:
        pipe: takes READY, `Progress` and `ClipResult`; one with state NO_MODEL comes instead of READY.
        orders: the settings as plain values first, then for each clip its name, its path, that of its result, and
            whether to take the smallest plan.
        stop: set to end the clip in work at its next step.
    """
    plain = orders.get()
    try:
        options, output = StreamOptions(**plain["options"]), OutputOptions(**plain["output"])
        worker = _load(WorkerSettings(**{**plain, "options": options, "output": output}), pipe, stop)
    except Exception as error:  # whatever it is, it would be the same for every clip
        pipe.send(ClipResult("", NO_MODEL, _text_of(error)))
        return
    pipe.send(READY)
    while True:
        name, source, output, small = orders.get()
        pipe.send(upscale(worker, name, Path(source), Path(output), SMALL if small else MemoryPlan()))


def _load(settings: WorkerSettings, pipe: Connection, stop: threading.Event) -> _Worker:
    torch.set_num_threads(settings.threads)
    fix_heap_growth()
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_dtype(settings.precision, device)
    model = load_flashvsr(settings.model, settings.version, settings.lq_cache_order, dtype=dtype, device=device)
    return _Worker(settings, model, device, dtype, pipe, stop)


def upscale(worker: _Worker, name: str, source: Path, output: Path, plan: MemoryPlan) -> ClipResult:
    """Upscales one clip in this worker. Raises nothing: whatever goes wrong with the clip is in the result."""
    started = time.perf_counter()
    try:
        result = _upscale(worker, name, source, output, plan)
    except _Stopped:
        result = ClipResult(name, STOPPED)
    except Exception as error:  # one odd clip must not end the night
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        state = OUT_OF_MEMORY if is_memory_error(error) else DISK_FULL if full else FAILED
        result = ClipResult(name, state, _text_of(error), spent=isinstance(error, (RuntimeError, MemoryError)))
    footprint, (after, source_of_after) = _footprint(worker.device), _returned(worker.device)
    seconds = time.perf_counter() - started
    return replace(
        result, seconds=seconds, footprint=footprint, after=after, after_source=source_of_after, pid=os.getpid()
    )


def _text_of(error: Exception) -> str:
    """What an error says; of one that only names a fault, its type as well."""
    text = str(error)
    plain = isinstance(error, (ValueError, OSError, RuntimeError)) and text
    return (text if plain else f"{type(error).__name__}: {text}")[:ERROR_CHARACTERS]


def _upscale(worker: _Worker, name: str, source: Path, output: Path, plan: MemoryPlan) -> ClipResult:
    settings = worker.settings
    footage = footage_of(open_clip(source))
    writer = open_writer(footage, output, settings.options.scale, settings.output)
    watch = _StepWatch()

    def step(phase: str, done: int, total: int | None) -> None:
        if worker.stop.is_set():
            raise _Stopped
        if watch.begin(phase):
            worker.pipe.send(watch.progress(done, total or footage.count, worker.device))

    report = upscale_clip(
        worker.model, footage, writer, settings.options, device=worker.device, dtype=worker.dtype, on_step=step,
        plan=plan,
    )  # fmt: skip
    result = ClipResult(name, DONE, frames=report.frames, notes=report.notes, in_use=watch.most_in_use)
    if report.complete:
        return result
    return replace(result, state=FAILED, error=report.notes[-1])


class _StepWatch:
    """How long the steps of one clip take, by kind, and when to tell the parent of it."""

    def __init__(self) -> None:
        self.most_in_use: float | None = None
        self._longest: dict[str, float] = {}
        self._phase, self._began = "", 0.0
        self._told, self._usual = 0.0, 0.0

    def begin(self, phase: str) -> bool:
        """A step of that kind begins, and so the one before it is done. Says whether the parent should hear of it."""
        now = time.perf_counter()
        if self._phase:
            self._longest[self._phase] = max(now - self._began, self._longest.get(self._phase, 0.0))
        self._phase, self._began = phase, now
        usual = self._longest.get(phase)
        # A step that the parent takes for a shorter one would look like a worker that hangs.
        longer = usual is None or usual > max(self._usual, PROGRESS_SECONDS)
        return longer or now - self._told >= PROGRESS_SECONDS

    def progress(self, done: int, total: int | None, device: torch.device) -> Progress:
        """What to tell now."""
        usual = self._longest.get(self._phase)
        self._told, self._usual = self._began, usual or 0.0
        in_use = _share_in_use(device)
        self.most_in_use = max((share for share in (in_use, self.most_in_use) if share is not None), default=None)
        return Progress(done, total, usual, in_use)


def _share_in_use(device: torch.device) -> float | None:
    reading = probe.read(device)
    return reading.used.bytes / reading.total.bytes if reading.used.bytes and reading.total.bytes else None


def _footprint(device: torch.device) -> int:
    if device.type != "cuda":
        return peak_rss_bytes()
    reading = probe.read(device)
    reserved = torch.cuda.max_memory_reserved(device)
    # The context is what the driver counts beyond the pool. Without its count only the pool is known.
    context = max(0, (reading.process.bytes or 0) - (reading.reserved.bytes or 0))
    return reserved + context


def _returned(device: torch.device) -> tuple[int, str]:
    """Returns freed memory to the system; gives the bytes that this worker still holds and their source."""
    gc.collect()
    probe.empty_cache(device)
    trim()
    reading = probe.read(device, settled=True)
    figure = reading.driver if device.type == "cpu" or reading.process.bytes is not None else reading.reserved
    return figure.bytes or 0, figure.source
