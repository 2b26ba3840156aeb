"""Small folder runs for tests: clips of a second, the embedded network, workers as processes or as threads."""

from __future__ import annotations

import os
import queue
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from steadyvsr import cli
from steadyvsr.app import folder as batch
from steadyvsr.app import leash
from steadyvsr.app.clip import OutputOptions
from steadyvsr.app.folder import worker
from steadyvsr.models.flashvsr import StreamOptions
from steadyvsr.models.video import ClipWriter

WIDTH, HEIGHT, FRAMES = 48, 32, 9


class WorkerThread:
    """Stands in for the process of a worker."""

    def __init__(self, target, args, daemon):
        self._pipe = Connection(os.dup(args[0].fileno()))
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._stop = threading.Event()

    def start(self):
        for work in (self._listen, self._serve):
            threading.Thread(target=work, daemon=True).start()

    def kill(self):
        self._stop.set()

    def join(self, seconds):
        pass

    def _listen(self):
        with suppress(EOFError, OSError):
            while True:
                message = self._pipe.recv()
                self._stop.set() if message is leash.STOP else self._orders.put(message)
        self._orders.put(())  # no order: `serve` ends with an error

    def _serve(self):
        try:
            with suppress(ValueError, OSError, SystemExit):
                worker.serve(self._pipe, self._orders, self._stop)
        finally:
            # Not only closed: `_listen` waits for it, and so the other end would not hear of it.
            socket.socket(fileno=os.dup(self._pipe.fileno())).shutdown(socket.SHUT_RDWR)


def write_clip(path: Path, seed: int = 0, frames: int = FRAMES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ClipWriter(str(path), WIDTH, HEIGHT, 12) as writer:
        for frame in torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed)):
            writer.write(frame)
    return path


def settings(**changes) -> worker.WorkerSettings:
    plain = {"device": "cpu", "model": str(cli.NANO_FILE), "options": StreamOptions(scale=2.0)}
    return worker.WorkerSettings(**{**plain, "output": OutputOptions(crf=0), **changes})


def run(
    source: Path, output: Path, workers: int | None = 1, progress=lambda *_: None, chosen=None, **more
) -> batch.FolderReport:
    chosen = chosen or settings()
    jobs = tuple(batch.find_jobs(source, output))
    manifest = batch.Manifest(output, batch.folder_settings(chosen))
    return batch.run_folder(batch.FolderRun(jobs, (chosen,), workers, **more), manifest, lambda line: None, progress)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
