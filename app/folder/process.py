"""A worker as the scheduler sees it: a process of its own, a pipe to it, and how long it has been silent.

Nothing is shared between workers. A queue or an event for all of them has a lock, and a worker that is killed while it
holds that lock makes the others wait for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import types
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import leash
from . import worker
from .jobs import Job
from .worker import READY, ClipResult, Progress, WorkerSettings

SILENCE_SECONDS = 120.0
"""So long a worker may be silent at least. A step of a large clip on a slow machine takes its time."""
SILENCE_STEPS = 20
"""And so many times the longest step of the kind that it is at."""
UNMEASURED = 10
"""Times as much where nothing was measured: in the first step of a kind, while a model loads, a file is checked, or an
index is written."""
KILL_SECONDS = 2.0

_context: Any = multiprocessing.get_context("spawn")


class WorkerProcess:
    """One worker on one device; its process is started with its first clip and again after it died.

    Args:
        silence: see `SILENCE_SECONDS`.

    Attributes:
        number: of the worker, from 0.
        job, place: the clip in work and the folder that its result grows in; None without one.
        small: whether that clip is tried again, with the smallest plan.
        ready: whether the model is loaded.
    """

    def __init__(self, number: int, settings: WorkerSettings, silence: float) -> None:
        self.number, self.settings = number, settings
        self.job: Job | None = None
        self.place: Path | None = None
        self.small = self.ready = False
        self._silence = silence
        self._heard = 0.0
        self._usual: float | None = None
        self._process: Any = None
        self._pipe: Any = None

    @property
    def started(self) -> bool:
        """Whether its process runs."""
        return self._process is not None

    @property
    def pipe(self) -> Any:
        """For `multiprocessing.connection.wait`: it has a message, or its end."""
        return self._pipe

    def submit(self, job: Job, place: Path, small: bool = False) -> None:
        """Orders a clip; its result grows in `place`, under its final name."""
        self.job, self.place, self.small = job, place, small
        if not self.started:
            self._start()
        self._heard, self._usual = time.monotonic(), None
        self._send((job.name, str(job.source), str(place / job.output.name), small))

    def messages(self) -> list[Progress | ClipResult | None]:
        """What it has said since; None at the end if its process has died."""
        heard: list[Progress | ClipResult | None] = []
        try:
            while self._pipe.poll():
                message = self._pipe.recv()
                self._listen(message)
                if message != READY:
                    heard.append(message)
        except (EOFError, OSError):
            heard.append(None)
        return heard

    @property
    def silent(self) -> float:
        """Seconds since it was last heard."""
        return time.monotonic() - self._heard

    def hangs(self) -> bool:
        """Whether no step was finished for much longer than steps take."""
        if self._usual is None:
            return self.silent > UNMEASURED * self._silence
        return self.silent > max(self._silence, SILENCE_STEPS * self._usual)

    def excuse(self, seconds: float) -> None:
        """Does not count so much of its silence."""
        self._heard += seconds

    def stop(self) -> None:
        """Lets the clip stop at its next step."""
        if self.started:
            with suppress(OSError):  # it is gone already
                self._pipe.send(leash.STOP)

    def kill(self) -> None:
        """Ends the process at once. What it wrote so far is the caller's to remove."""
        if self.started:
            self._process.kill()
            self._process.join(KILL_SECONDS)
            self._pipe.close()
        self._process = self._pipe = None
        self.ready = False

    def _start(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=leash.begin, args=(theirs, os.getpid(), worker.__name__), daemon=True)
        # A worker needs nothing of the program that started it. Left to itself, multiprocessing imports that program
        # again in the worker, before any line of ours, and with it torch: seconds without a leash.
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
            theirs.close()  # now the worker has the only copy, and its end can be heard
        self._send(asdict(self.settings))

    def _send(self, value: object) -> None:
        with suppress(OSError):  # it died: the next look at its messages says so
            self._pipe.send(value)

    def _listen(self, message: Progress | ClipResult | str) -> None:
        self._heard = time.monotonic()
        if isinstance(message, Progress):
            # After the last frame the file is completed: of that no step tells.
            self._usual = message.usual if message.frames != message.total else None
        elif message == READY:
            self.ready = True
