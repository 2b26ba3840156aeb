"""Gives the clips of a folder to worker processes: admission, retries, a record after every clip, a table at the end.

Each worker is an executor with a single process, so that a process that dies takes no other with it. Its clip is tried
once more, alone, with the smallest plan that gives the same frames.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from ...memory import leak, probe
from ...memory.budget import may_load
from ...memory.reading import size_text
from . import worker
from .admission import admit
from .jobs import Job
from .manifest import Manifest
from .worker import DISK_FULL, DONE, FAILED, NO_MODEL, OUT_OF_MEMORY, SMALL, STOPPED, ClipResult, WorkerSettings

FIRST_STEADY_CLIP = 3
"""Memory after the first clips still holds what libraries set up once."""

Say = Callable[[str], None]
Progress = Callable[[int, str, int, "int | None"], None]


@dataclass(frozen=True)
class FolderRun:
    """What to upscale and how.

    Attributes:
        jobs: all clips of the folder.
        settings: one per device, with that device in it.
        workers: how many in all; None for as many as fit.
        force: start that many even if they do not fit.
    """

    jobs: tuple[Job, ...]
    settings: tuple[WorkerSettings, ...]
    workers: int | None = None
    force: bool = False


@dataclass
class FolderReport:
    """How the clips of a folder turned out.

    Attributes:
        results: one per clip that was tried, in the order of the jobs.
        skipped: names of clips that an earlier run had finished.
        admissions: how many workers each device got, and why.
        redone: names of clips that were tried again after their worker died or ran out of memory.
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
        """One line per clip, then the totals."""
        rows = [("clip", "result", "frames", "fps", "peak", "after")]
        for result in self.results:
            fps = f"{result.frames / result.seconds:.2f}" if result.frames and result.seconds else "-"
            what = result.state if result.state == DONE else f"{result.state}: {result.error}"
            sizes = size_text(result.footprint), size_text(result.after)
            rows.append((result.name, what, str(result.frames), fps, *sizes))
        widths = [min(60, max(len(row[column]) for row in rows)) for column in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"{len(self.done)} done, {len(self.failed)} failed, {len(self.skipped)} finished before, "
            f"{self.seconds:.0f} s"
        )
        return "\n".join([*lines, *([self.stopped] if self.stopped else [])])


class _Slot:
    """One worker: an executor with a single process, bound to a device, and a pipe of its own to that process.

    Nothing is shared between workers. A queue or an event for all of them has a lock, and a worker that is killed while
    it holds that lock makes the others wait for ever.
    """

    def __init__(self, number: int, settings: WorkerSettings, progress: Progress) -> None:
        self.number, self.settings, self._progress = number, settings, progress
        self._executor: ProcessPoolExecutor | None = None
        self._pipe: tuple[Connection, Connection] | None = None
        self.job: Job | None = None
        self.future: Future[ClipResult] | None = None

    @property
    def started(self) -> bool:
        """Whether its process runs."""
        return self._executor is not None

    def submit(self, job: Job, small: bool = False) -> None:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            ours, theirs = self._pipe = context.Pipe()
            self._executor = ProcessPoolExecutor(1, context, worker.start, (self.settings, theirs))
            threading.Thread(target=self._listen, args=(ours,), daemon=True).start()
        plan = (SMALL,) if small else ()
        self.job = job
        self.future = self._executor.submit(worker.upscale, job.name, str(job.source), str(job.output), *plan)

    def stop(self) -> None:
        """Lets the worker stop at its next step."""
        if self._pipe is not None:
            with suppress(OSError):  # it is gone already
                self._pipe[0].send(None)

    def take(self) -> tuple[Job, ClipResult | None]:
        """Waits for the job and returns it with its result; None where the process died."""
        assert self.job is not None and self.future is not None
        job, future = self.job, self.future
        self.job = self.future = None
        try:
            return job, future.result()
        except BrokenProcessPool:
            self.close()
            return job, None

    def close(self) -> None:
        if self._executor is not None and self._pipe is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._pipe[1].close()  # the last copy: the listener's end
            self._executor = self._pipe = None

    def _listen(self, pipe: Connection) -> None:
        """Passes on what a worker tells, until it ends."""
        with pipe, suppress(EOFError, OSError):
            while True:
                self._progress(self.number, *pipe.recv())


def run_folder(run: FolderRun, manifest: Manifest, say: Say, progress: Progress = lambda *_: None) -> FolderReport:
    """Upscales every clip that the manifest does not call finished.

    Args:
        say: takes a line for the user.
        progress: called with worker number, clip, frames done, frames in all.

    Raises:
        KeyboardInterrupt: after the workers have stopped cleanly; a rerun goes on where this one ended.
    """
    started = time.monotonic()
    scheduler = _Scheduler(run, manifest, say, progress)
    report = scheduler.report
    try:
        scheduler.run_all()
    except KeyboardInterrupt:
        scheduler.stop_clean()
        raise
    finally:
        scheduler.stop_all()
        scheduler.close_all()
        order = {job.name: index for index, job in enumerate(run.jobs)}
        report.results.sort(key=lambda result: order[result.name])
        report.growth = _growth_of(report.results)
        report.seconds = time.monotonic() - started
    return report


class _Scheduler:
    """The workers of one run, and who does which clip.

    Attributes:
        waiting: clips that no worker has yet.
        again: clips to try once more, alone.
    """

    def __init__(self, run: FolderRun, manifest: Manifest, say: Say, progress: Progress) -> None:
        self.run, self.manifest, self.say, self.progress = run, manifest, say, progress
        self.waiting = deque(job for job in run.jobs if not manifest.finished(job))
        self.again: deque[Job] = deque()
        waiting = {job.name for job in self.waiting}
        self.report = FolderReport(skipped=[job.name for job in run.jobs if job.name not in waiting])
        self.slots: list[_Slot] = []
        for settings in run.settings:
            self._add_slot(settings)

    def run_all(self) -> None:
        admitted: set[str] = set()
        while (self.waiting or self._busy()) and not self.report.stopped:
            for slot in self.slots:
                # A device gets more workers once its first clip has shown how much memory one takes.
                if slot.job is None and self.waiting and self._may_start(slot):
                    slot.submit(self.waiting.popleft())
            for slot in self._finished():
                job, result = slot.take()
                if result is not None and result.state == DONE and slot.settings.device not in admitted:
                    admitted.add(slot.settings.device)
                    self._admit(slot.settings, result)
                if result is None or result.state == OUT_OF_MEMORY:
                    why = OUT_OF_MEMORY if result else "its worker died"
                    self.say(f"{job.name}: {why}; trying it again alone later")
                    self.again.append(job)
                else:
                    self._record(job, result)
        while self.again and not self.report.stopped:
            self._alone(self.again.popleft())

    def stop_clean(self) -> None:
        """Lets every worker stop at its next step and records the clips that were just finished."""
        self.report.stopped = "stopped by the user"
        self.stop_all()
        for slot in self._busy():
            job, result = slot.take()
            if result is not None and result.state == DONE:
                self._record(job, result)

    def stop_all(self) -> None:
        for slot in self.slots:
            slot.stop()

    def close_all(self) -> None:
        for slot in self.slots:
            slot.close()

    def _add_slot(self, settings: WorkerSettings) -> _Slot:
        slot = _Slot(len(self.slots), settings, self.progress)
        self.slots.append(slot)
        return slot

    def _busy(self) -> list[_Slot]:
        return [slot for slot in self.slots if slot.future is not None]

    def _finished(self) -> list[_Slot]:
        busy = self._busy()
        done, _ = wait([slot.future for slot in busy if slot.future], timeout=0.5, return_when=FIRST_COMPLETED)
        return [slot for slot in busy if slot.future in done]

    def _may_start(self, slot: _Slot) -> bool:
        """Whether there is room, as measured now, for a worker whose process does not run yet."""
        if slot.started or self.run.force or not self._busy():
            return True
        known = [result.footprint for result in self.report.results if result.footprint]
        answer = may_load(max(known, default=0), probe.read(slot.settings.device))
        return answer.allowed or answer.free is None

    def _admit(self, settings: WorkerSettings, result: ClipResult) -> None:
        """Adds as many workers for the device as fit, judging by its first clip."""
        cpu = torch.device(settings.device).type == "cpu"
        total = psutil.virtual_memory().total if cpu else probe.read(settings.device).total.bytes
        if total is None:
            self.report.admissions.append(f"{settings.device}: its memory cannot be read, so it gets one worker")
            return
        asked = None if self.run.workers is None else max(1, self.run.workers // len(self.run.settings))
        cores = (os.cpu_count() or 1) if cpu else None
        found = admit(result.footprint, total, asked=asked, force=self.run.force, cores=cores)
        self.report.admissions.append(f"{settings.device}: {found.reason}")
        self.say(self.report.admissions[-1])
        for _ in range(found.count - 1):
            self._add_slot(settings)

    def _record(self, job: Job, result: ClipResult) -> None:
        if result.state == STOPPED:
            return
        if result.state == NO_MODEL:
            self.report.stopped = f"The model could not be loaded: {result.error}"
            return
        if result.state == DISK_FULL:
            self.report.stopped = (
                f"{job.name}: {result.error} Finished clips are safe. Make room on the disk and run again."
            )
            self.stop_all()
        self.report.results.append(result)
        self.manifest.record(
            job, DONE if result.state == DONE else FAILED, frames=result.frames, error=result.error,
            seconds=round(result.seconds, 3),
        )  # fmt: skip
        self.say(f"{job.name}: {result.state}{f', {result.error}' if result.error else f', {result.frames} frames'}")

    def _alone(self, job: Job) -> None:
        """Tries a clip once more, with no other worker and the smallest plan. A second failure is final."""
        self.report.redone.append(job.name)
        self.close_all()
        slot = self._add_slot(self.run.settings[0])
        slot.submit(job, small=True)
        _, result = slot.take()
        slot.close()
        if result is None:
            result = ClipResult(job.name, FAILED, "its worker died twice (killed, out of memory, or a crash)")
        elif result.state == OUT_OF_MEMORY:
            result = replace(result, state=FAILED, error=f"out of memory even alone: {result.error}")
        self._record(job, result)


def _growth_of(results: Iterable[ClipResult]) -> dict[str, str]:
    """How the bytes that each worker holds after a clip grow from clip to clip, without its first two."""
    series: dict[int, list[int]] = {}
    for result in results:
        series.setdefault(result.pid, []).append(result.after)
    found = {}
    for number, values in enumerate(series.values()):
        growth = leak.fit(values[FIRST_STEADY_CLIP - 1 :])
        if growth is not None:
            found[f"worker {number}"] = str(growth)
    return found
