"""Folder runs whose parent or workers are killed at random moments: what is lost, half done, left alive, done again.

Clips as small as the network allows, two workers, SIGKILL. The parent is a fork of this process, so that only workers
have libraries to load; they are started as in any run. POSIX only.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from steadyvsr.app import folder as batch
from steadyvsr.app.clip import OutputOptions
from steadyvsr.app.folder.process import WorkerProcess
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr import StreamOptions
from steadyvsr.models.flashvsr.checkpoint import NANO_FILE
from steadyvsr.models.video import ClipWriter, VideoError, open_clip

SIDE, FRAMES, CLIPS = 16, 2, 6
ORPHAN_SECONDS = 5.0
MOST_RUNS = 5
"""A clip whose worker was killed twice is an error that a rerun tries again: so many reruns without a kill, at most."""


@dataclass
class Tally:
    """What became of clips and processes.

    Attributes:
        parents, workers: kills of each.
        nights: output folders.
        lost: clips without their result at the end of a night, however often it was run again.
        half_files: files under final names, seen right after a kill or at the end, whose frames are not the right ones.
        orphans: workers alive five seconds after their parent was killed.
        slowest_end: the longest time from a parent's kill to its last worker's end, in seconds.
        done_again: finished clips, with their record, that a later run did once more.
        begun_again: clips that were begun more than once, as what a killed worker had in hand must be.
        left_over: files and folders at the end of a night beside results and record.
    """

    parents: int = 0
    workers: int = 0
    nights: int = 0
    lost: int = 0
    half_files: int = 0
    orphans: int = 0
    slowest_end: float = 0.0
    done_again: int = 0
    begun_again: int = 0
    left_over: int = 0

    @property
    def kills(self) -> int:
        return self.parents + self.workers


class Nights:
    """One folder of clips, and nights over it until so many kills are counted.

    Args:
        folder: empty, for everything.
        seed: of the moments and of who is killed.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.source, self.folder, self.random = folder / "in", folder, random.Random(seed)
        self.tally = Tally()
        self.source.mkdir()
        for index in range(CLIPS):
            with ClipWriter(self.source / f"{index}.mp4", SIDE, SIDE, 12) as writer:
                for picture in torch.rand(FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(index)):
                    writer.write(picture)
        began = time.monotonic()
        self._finish(self._start(folder / "reference"))
        self.whole_seconds = time.monotonic() - began
        self.expected = {path.name: _frames(path) for path in (folder / "reference").glob("*.mp4")}
        self._known: dict[tuple[str, int, int], bool] = {}

    def run(self, kills: int) -> Tally:
        """Runs nights until that many kills are counted, or Ctrl-C, and the last of them to its end."""
        try:
            while self.tally.kills < kills:
                self._night(kills)
                print(asdict(self.tally), flush=True)
        except KeyboardInterrupt:
            self._kill(self._running)
            self._finish(self._running)
        return self.tally

    def _night(self, kills: int) -> None:
        self.tally.nights += 1
        output = self.folder / f"out{self.tally.nights}"
        while self.tally.kills < kills and not self._disturbed(output, kills):
            pass
        for _ in range(MOST_RUNS):
            if len(self._results(output)) < CLIPS:
                self._finish(self._start(output))
        self._end(output)

    def _disturbed(self, output: Path, kills: int) -> bool:
        """One run until it ends by itself (True) or its parent is killed (False); its workers are killed on the way."""
        parent = self._start(output)
        while self.tally.kills < kills:
            moment = time.monotonic() + self.random.uniform(0, self.whole_seconds)
            while time.monotonic() < moment:
                if parent.status() == psutil.STATUS_ZOMBIE:
                    self._finish(parent)
                    return True
                time.sleep(0.01)
            workers = _workers_of(parent)
            if workers and self.random.random() < 0.5:
                self._kill(self.random.choice(workers))
                self.tally.workers += 1
            else:
                began = time.monotonic()
                self._kill(parent)
                self._finish(parent)
                _, alive = psutil.wait_procs(workers, timeout=ORPHAN_SECONDS)
                self.tally.parents += 1
                self.tally.orphans += len(alive)
                self.tally.slowest_end = max(self.tally.slowest_end, time.monotonic() - began)
                for orphan in alive:
                    self._kill(orphan)
                self._check(output)
                return False
            self._check(output)
        self._finish(parent)
        return True

    def _start(self, output: Path) -> psutil.Process:
        pid = os.fork()
        if pid:
            self._running = psutil.Process(pid)
            return self._running
        code = 1
        try:
            os.nice(1)  # the process that kills is heard first
            _run(self.source, output, self.folder / f"{output.name}.begun")
            code = 0
        finally:
            os._exit(code)

    def _finish(self, parent: psutil.Process) -> None:
        with suppress(ChildProcessError):  # it was waited for already, before a Ctrl-C
            os.waitpid(parent.pid, 0)

    def _kill(self, process: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            process.kill()

    def _results(self, output: Path) -> list[Path]:
        return sorted(output.glob("*.mp4"))

    def _check(self, output: Path) -> None:
        """Every file under a final name is whole, at every moment."""
        for path in self._results(output):
            stat = path.stat()
            key = (str(path), stat.st_size, stat.st_mtime_ns)
            if key not in self._known:
                try:
                    self._known[key] = _frames(path) == self.expected[path.name]
                except (VideoError, OSError):
                    self._known[key] = False
                self.tally.half_files += not self._known[key]

    def _end(self, output: Path) -> None:
        self._check(output)
        self.tally.lost += CLIPS - len(self._results(output))
        names = {*(f"{index}.mp4" for index in range(CLIPS)), ".steadyvsr.json"}
        self.tally.left_over += sum(path.name not in names for path in output.iterdir())
        lines = (self.folder / f"{output.name}.begun").read_text().splitlines()
        begun, done = (Counter(line[2:] for line in lines if line[0] == kind) for kind in "bd")
        self.tally.begun_again += sum(begun.values()) - len(begun)
        self.tally.done_again += sum(done.values()) - len(done)


def _run(source: Path, output: Path, log: Path) -> None:
    """A folder run that writes down which clips it begins and finishes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    submit = WorkerProcess.submit

    def write(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def submitted(self: WorkerProcess, job: batch.Job, place: Path, small: bool = False) -> None:
        write(f"b {job.name}")
        submit(self, job, place, small)

    def say(line: str) -> None:
        name, _, what = line.partition(": ")
        if what.startswith("done"):
            write(f"d {name}")

    WorkerProcess.submit = submitted  # in this process alone, which is a fork
    settings = batch.WorkerSettings("cpu", str(NANO_FILE), StreamOptions(scale=2.0), OutputOptions(crf=0))
    manifest = batch.Manifest(output, batch.folder_settings(settings))
    jobs = tuple(batch.find_jobs(source, output))
    batch.run_folder(batch.FolderRun(jobs, (settings,), 2), manifest, say)


def _workers_of(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def _frames(path: Path) -> list[bytes]:
    return [picture.numpy().tobytes() for picture in open_clip(path).frames()]


def report(target: Path | None, kills: int, seed: int) -> int:
    """Runs, prints and writes the tally; returns the exit status: 1 where a target was missed."""
    torch.set_num_threads(1)  # a fork must not inherit the names of threads that it has not
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        tally = Nights(Path(name), seed).run(kills)
    seconds = time.monotonic() - began
    figures = {**asdict(tally), "kills": tally.kills, "seed": seed, "seconds": round(seconds)}
    print(frame.table([[key, str(value)] for key, value in figures.items()]))
    targets = {
        "no clip lost": tally.lost == 0,
        "no half file under a final name": tally.half_files == 0,
        "no worker alive 5 s after its parent": tally.orphans == 0,
        "at most one finished clip done again for each kill": tally.done_again <= tally.kills,
        "nothing left beside the results": tally.left_over == 0,
    }
    return frame.finish(target, figures, frame.unmet(targets))
