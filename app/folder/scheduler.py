"""Gives the clips of a folder to worker processes: admission, retries, a record after every clip.

Each worker is a process of its own, so that one that dies takes no other with it. Its clip is tried once more, alone,
with the smallest plan that gives the same frames. A clip grows in a place of its own; only this process gives it its
final name, after it has recorded it.
"""

from __future__ import annotations

import errno
import glob
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import torch

from ...memory import probe
from ...memory.budget import may_load
from ...models.printable import printable
from .admission import admit
from .jobs import Job
from .lock import FolderLock
from .manifest import Manifest
from .process import SILENCE_SECONDS, WorkerProcess
from .report import FolderReport, growth_of
from .worker import DISK_FULL, DONE, FAILED, NO_MODEL, OUT_OF_MEMORY, STOPPED, ClipResult, Progress, WorkerSettings

TICK_SECONDS = 0.5
STOP_SECONDS = 2.0
"""So long the workers have for their last step once the user wants to stop; then they are ended."""
LOADING_DEATHS = 2
"""So many workers that died while they loaded the model, one after the other, end the run."""

Say = Callable[[str], None]
Show = Callable[[int, str, int, "int | None"], None]


@dataclass(frozen=True)
class FolderRun:
    """What to upscale and how.

    Attributes:
        jobs: all clips of the folder.
        settings: one per device, with that device in it.
        workers: how many in all; None for as many as fit.
        force: start that many even if they do not fit, and replace files that no earlier run made.
        silence: seconds without a finished step, at least, after which a worker is held to hang.
    """

    jobs: tuple[Job, ...]
    settings: tuple[WorkerSettings, ...]
    workers: int | None = None
    force: bool = False
    silence: float = SILENCE_SECONDS


def run_folder(run: FolderRun, manifest: Manifest, say: Say, progress: Show = lambda *_: None) -> FolderReport:
    """Upscales every clip that the manifest does not call finished.

    Args:
        say: takes a line for the user.
        progress: called with worker number, clip, frames done, frames in all.

    Raises:
        KeyboardInterrupt: within five seconds, after the workers have ended; a rerun goes on where this one stopped.
        ValueError: another run writes into the folder.
    """
    started = time.monotonic()
    with FolderLock(manifest.path.parent) as lock:
        manifest.read()
        scheduler = _Scheduler(run, manifest, lock, say, progress)
        report = scheduler.report
        try:
            scheduler.run_all()
        except KeyboardInterrupt:
            with _deaf():
                scheduler.stop_clean()
            raise
        finally:
            with _deaf():
                scheduler.end_workers()
    order = {job.name: index for index, job in enumerate(run.jobs)}
    report.results.sort(key=lambda result: order[result.name])
    report.growth = growth_of(report.results)
    report.seconds = time.monotonic() - started
    return report


@contextmanager
def _deaf() -> Iterator[None]:
    """No further Ctrl-C while things are put in order: that takes seconds at most, and half of it would be worse."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class _Scheduler:
    """The workers of one run, and who does which clip.

    Attributes:
        waiting: clips that no worker has yet.
        again: clips to try once more, alone.
    """

    def __init__(self, run: FolderRun, manifest: Manifest, lock: FolderLock, say: Say, progress: Show) -> None:
        self.run, self.manifest, self.lock, self.progress = run, manifest, lock, progress
        self.say = lambda text: say(printable(text, len(text)))
        self.waiting = deque(job for job in run.jobs if not manifest.finished(job))
        self.again: deque[Job] = deque()
        waiting = {job.name for job in self.waiting}
        self.report = FolderReport(skipped=[job.name for job in run.jobs if job.name not in waiting])
        self.workers: list[WorkerProcess] = []
        for settings in run.settings:
            self._add_worker(settings)
        self._admitted: set[str] = set()
        self._loading_deaths = 0
        self._looked = time.monotonic()

    def run_all(self) -> None:
        while not self.report.stopped and (self.waiting or self.again or self._busy()):
            self._hand_out()
            self._listen(TICK_SECONDS)
            self._end_hung()

    def stop_clean(self) -> None:
        """Gives every worker a moment to finish its step, and records the clips that were just finished."""
        self.report.stopped = "stopped by the user"
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            worker.stop()
        while any(worker.ready for worker in self._busy()) and time.monotonic() < deadline:
            self._listen(0.1)

    def end_workers(self) -> None:
        for worker in self.workers:
            worker.kill()

    def _add_worker(self, settings: WorkerSettings) -> WorkerProcess:
        worker = WorkerProcess(len(self.workers), settings, self.run.silence)
        self.workers.append(worker)
        return worker

    def _busy(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.job is not None]

    def _hand_out(self) -> None:
        for worker in self.workers:
            # A device gets more workers once its first clip has shown how much memory one takes.
            while worker.job is None and self.waiting and self._may_start(worker):
                self._begin(worker, self.waiting.popleft())
        while self.again and not self.waiting and not self._busy():
            job = self.again.popleft()
            self.report.redone.append(job.name)
            self.end_workers()
            self.workers = []
            self._begin(self._add_worker(self.run.settings[0]), job, small=True)

    def _begin(self, worker: WorkerProcess, job: Job, small: bool = False) -> None:
        if job.problem:
            self._finish(job, ClipResult(job.name, FAILED, job.problem))
        elif not self._may_write(job):
            self._finish(job, _taken(job))
        else:
            try:
                job.output.parent.mkdir(parents=True, exist_ok=True)
                place = self.lock.make_place(job.output.parent)
                worker.submit(job, place, small)
            except OSError as error:
                worker.kill()
                self._release(worker)
                self._finish(job, _failure(job, error))

    def _may_write(self, job: Job) -> bool:
        return self.run.force or self.manifest.may_write(job)

    def _listen(self, seconds: float) -> None:
        """Waits for messages, at most so long, and does what follows from them."""
        started = {worker.pipe: worker for worker in self.workers if worker.started}
        heard = wait(list(started), seconds)
        now = time.monotonic()
        if now - self._looked > 10 * TICK_SECONDS:
            # This process stood still (Ctrl-Z, a machine that slept), and so may have the workers.
            for worker in self.workers:
                worker.excuse(now - self._looked)
        self._looked = now
        for pipe in heard:
            worker = started[pipe]
            for message in worker.messages():
                if isinstance(message, Progress):
                    if worker.job is not None:
                        self.progress(worker.number, printable(worker.job.name), message.frames, message.total)
                elif message is None:
                    self._died(worker)
                else:
                    self._settle(worker, message)
        if any(worker.ready for worker in self.workers):
            self._loading_deaths = 0

    def _end_hung(self) -> None:
        for worker in self._busy():
            if worker.hangs():
                worker.kill()
                again = ", twice" if worker.small else ""
                self._try_again(worker, f"its worker hung: no step was finished for {worker.silent:.0f} s{again}")

    def _died(self, worker: WorkerProcess) -> None:
        ready = worker.ready
        worker.kill()
        if ready or worker.job is None:
            twice = " twice" if worker.small else ""
            self._try_again(worker, f"its worker died{twice} (killed, out of memory, or a crash)")
            return
        self._loading_deaths += 1
        died = "its worker died while loading it (killed, or out of memory)"
        self._not_loaded(worker, died, final=self._loading_deaths >= LOADING_DEATHS)

    def _not_loaded(self, worker: WorkerProcess, why: str, final: bool = True) -> None:
        """Gives the clip back: that a worker never had its model says nothing about the clip."""
        if worker.job is not None:
            (self.again if worker.small else self.waiting).appendleft(worker.job)
        self._release(worker)
        worker.kill()
        if any(other.ready for other in self.workers):
            self.workers.remove(worker)
            self.say(f"one more worker could not load the model, the others go on: {why}")
        elif final:
            self.report.stopped = f"The model could not be loaded: {why}"

    def _try_again(self, worker: WorkerProcess, why: str) -> None:
        job, small = worker.job, worker.small
        self._release(worker)
        if job is not None and small:
            self._finish(job, ClipResult(job.name, FAILED, why))
        elif job is not None:
            self.say(f"{job.name}: {why}; trying it again alone later")
            self.again.append(job)

    def _settle(self, worker: WorkerProcess, result: ClipResult) -> None:
        """What follows from the result of a clip."""
        job, place = worker.job, worker.place
        if result.state == NO_MODEL:
            self._not_loaded(worker, result.error)
        elif result.state == OUT_OF_MEMORY:
            self._try_again(worker, f"out of memory{' even alone' if worker.small else ''}: {result.error}")
        elif result.state != STOPPED and job is not None and place is not None:
            if result.state == DONE and worker.settings.device not in self._admitted:
                self._admitted.add(worker.settings.device)
                self._admit(worker.settings, result)
            self._finish(job, _with_real_names(result, place), place)
        self._release(worker)
        if result.spent:
            worker.kill()

    def _release(self, worker: WorkerProcess) -> None:
        if worker.place is not None:
            self.lock.remove_place(worker.place)
        worker.job = worker.place = None

    def _finish(self, job: Job, result: ClipResult, place: Path | None = None) -> None:
        """Records a clip, and gives its result its name."""
        if result.state == DONE and place is not None:
            result = self._publish(job, result, place / job.output.name)
        if result.state == DISK_FULL:
            self._stop_for_room(job, result.error)
        if result.state != DONE:
            try:
                self.manifest.record(job, FAILED, error=result.error, seconds=round(result.seconds, 3))
                result = self._keep_partial(job, result, place)
            except OSError as error:
                self._stop_for_room(job, str(error))
        self.report.results.append(result)
        self.say(f"{job.name}: {result.state}{f', {result.error}' if result.error else f', {result.frames} frames'}")

    def _stop_for_room(self, job: Job, why: str) -> None:
        self.report.stopped = f"{job.name}: {why} Finished clips are safe. Make room on the disk and run again."

    def _publish(self, job: Job, result: ClipResult, staged: Path) -> ClipResult:
        if not self._may_write(job):
            return _taken(job)
        try:
            self.manifest.record(job, DONE, staged, frames=result.frames, seconds=round(result.seconds, 3))
            os.replace(staged, job.output)
            self.manifest.drop_partial(job)
        except OSError as error:
            return _failure(job, error)
        return result

    def _keep_partial(self, job: Job, result: ClipResult, place: Path | None) -> ClipResult:
        """Takes over the readable part of a clip that turned out damaged, or that its container refused."""
        for staged in sorted(place.glob(f"{glob.escape(job.output.stem)}.partial*")) if place else ():
            kept = self.manifest.add_partial(job, staged)
            error = result.error.replace(str(job.output.with_name(staged.name)), str(kept))
            where = "" if str(kept) in error else f" The frames before that are in {kept}."
            return replace(result, error=f"{error}{where}")
        return result

    def _may_start(self, worker: WorkerProcess) -> bool:
        """Whether there is room, as measured now, for a worker whose process does not run yet."""
        if worker.started or self.run.force or not self._busy():
            return True
        known = [result.footprint for result in self.report.results if result.footprint]
        answer = may_load(max(known, default=0), probe.read(worker.settings.device))
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
            self._add_worker(settings)


def _taken(job: Job) -> ClipResult:
    return ClipResult(
        job.name, FAILED,
        f"{job.output}: expected a free name, or a result of an earlier run; got a file that none made, or that was"
        " changed since. Move it away, choose another OUT, or use --force.",
    )  # fmt: skip


def _failure(job: Job, error: OSError) -> ClipResult:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ClipResult(job.name, DISK_FULL if full else FAILED, str(error))


def _with_real_names(result: ClipResult, place: Path) -> ClipResult:
    """Errors name the file that the user knows, not the place where it grew."""
    grew, known = f"{place}{os.sep}", f"{place.parent}{os.sep}"
    return replace(result, error=result.error.replace(grew, known))
