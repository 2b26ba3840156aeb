"""A worker process: loads one model onto one device, upscales one clip after another, returns memory after each."""

from __future__ import annotations

import errno
import gc
import os
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ...memory import probe
from ...memory.host import fix_heap_growth, trim
from ...models.flashvsr import FlashVSR, StreamOptions
from ...models.flashvsr.checkpoint import load_flashvsr
from ...models.flashvsr.memory_plan import MemoryPlan
from ...models.video import open_clip
from ..clip import OutputOptions, choose_dtype, footage_of, open_writer, peak_rss_bytes, upscale_clip

DONE, FAILED, DISK_FULL, STOPPED = "done", "failed", "disk full", "stopped"
OUT_OF_MEMORY, NO_MODEL = "out of memory", "no model"
PROGRESS_SECONDS = 0.5
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
class ClipResult:
    """How a clip turned out, and what it took.

    Attributes:
        state: done | failed | disk full | stopped | out of memory | no model.
        error: why, where it is not done.
        footprint: peak bytes of the worker: on a card the allocator's pool and the driver's context, on the CPU
            resident memory.
        after, after_source: bytes that the worker holds after the clip, and where that number comes from.
        pid: of the worker.
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


class _Stopped(Exception):
    pass


@dataclass
class _Worker:
    settings: WorkerSettings
    model: FlashVSR
    device: torch.device
    dtype: torch.dtype
    pipe: Connection


_worker: _Worker | None = None
_failure = ""
"""Why there is no worker: of an error raised in `start`, an executor would only say that the process broke."""


def start(settings: WorkerSettings, pipe: Connection) -> None:
    """Turns this process into a worker and loads the model.

    Args:
        pipe: takes (clip, frames done, frames in all). Whatever comes from it stops the clip in work, its end too: then
            the parent is gone. Ctrl-C is the parent's business.
    """
    global _worker, _failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(settings.threads)
    fix_heap_growth()
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_dtype(settings.precision, device)
    try:
        model = load_flashvsr(settings.model, settings.version, settings.lq_cache_order, dtype=dtype, device=device)
    except (ValueError, OSError, RuntimeError) as error:
        _failure = str(error)
        return
    _worker = _Worker(settings, model, device, dtype, pipe)


def upscale(name: str, source: str, output: str, plan: MemoryPlan = MemoryPlan()) -> ClipResult:  # noqa: B008  frozen
    """Upscales one clip in this worker. Raises nothing: whatever goes wrong with the clip is in the result."""
    if _worker is None:
        return ClipResult(name, NO_MODEL, _failure)
    started = time.perf_counter()
    try:
        result = _upscale(_worker, name, Path(source), Path(output), plan)
    except _Stopped:
        result = ClipResult(name, STOPPED)
    except torch.OutOfMemoryError as error:
        result = ClipResult(name, OUT_OF_MEMORY, str(error).splitlines()[0])
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        result = ClipResult(name, DISK_FULL if full else FAILED, str(error))
    except (ValueError, RuntimeError, MemoryError) as error:
        result = ClipResult(name, FAILED, f"{error}" or type(error).__name__)
    footprint, (after, source_of_after) = _footprint(_worker.device), _returned(_worker.device)
    seconds = time.perf_counter() - started
    return replace(
        result, seconds=seconds, footprint=footprint, after=after, after_source=source_of_after, pid=os.getpid()
    )


def _upscale(worker: _Worker, name: str, source: Path, output: Path, plan: MemoryPlan) -> ClipResult:
    settings = worker.settings
    footage = footage_of(open_clip(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    # An older result is replaced by renaming, once the new one is complete.
    writer = open_writer(footage, output, settings.options.scale, replace(settings.output, force=True))
    said = 0.0

    def step(phase: str, done: int, total: int | None) -> None:
        nonlocal said
        if worker.pipe.poll():
            raise _Stopped
        if time.perf_counter() - said >= PROGRESS_SECONDS:
            said = time.perf_counter()
            worker.pipe.send((name, done, total or footage.count))

    report = upscale_clip(
        worker.model, footage, writer, settings.options, device=worker.device, dtype=worker.dtype, on_step=step,
        plan=plan,
    )  # fmt: skip
    if not report.complete:
        Path(report.output).unlink(missing_ok=True)
        return ClipResult(name, FAILED, report.notes[-1], notes=report.notes)
    return ClipResult(name, DONE, frames=report.frames, notes=report.notes)


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
