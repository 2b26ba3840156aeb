"""A night of fifty clips: healthy ones, one worker against two, then corrupt ones and a worker killed while it works.

    python -m steadyvsr.benchmarks.night [--clips 50] [--json FILE]
    python -m steadyvsr.benchmarks.night --kills 200 [--seed 0] [--json FILE]

Small clips and the embedded network at scale 2, so that it takes minutes; the processes, the record and the retries are
those of any night. Exit status 1 where a healthy clip is not done, or a corrupt one leaves more than an error.

With --kills, nights in which the parent or a worker is killed at random moments instead (benchmarks/kills.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from steadyvsr.app import folder as batch
from steadyvsr.app.clip import OutputOptions
from steadyvsr.benchmarks import frame, kills
from steadyvsr.memory import leak
from steadyvsr.models.flashvsr import StreamOptions
from steadyvsr.models.flashvsr.checkpoint import NANO_FILE
from steadyvsr.models.video import ClipWriter, open_clip

WIDTH, HEIGHT, FRAMES = 48, 32, 17
CORRUPT_EVERY = 10
LOSSLESS = OutputOptions(crf=0)
"""So that frames can be compared: x264 makes different files of the same frames from run to run (its macroblock tree
reads what it did not write, on frames of this size)."""


def write_clips(folder: Path, count: int, corrupt: bool) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index:02d}.mp4"
        with ClipWriter(str(path), WIDTH, HEIGHT, 12) as writer:
            for picture in torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(index)):
                writer.write(picture)
        if corrupt and index % CORRUPT_EVERY == CORRUPT_EVERY - 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def run(source: Path, output: Path, workers: int, progress=lambda *_: None) -> batch.FolderReport:
    settings = batch.WorkerSettings("cpu", str(NANO_FILE), StreamOptions(scale=2.0), LOSSLESS)
    manifest = batch.Manifest(output, batch.folder_settings(settings))
    jobs = tuple(batch.find_jobs(source, output))
    return batch.run_folder(batch.FolderRun(jobs, (settings,), workers), manifest, lambda line: None, progress)


def frames_of(path: Path) -> list[bytes]:
    """The pixels of every frame of a file."""
    return [picture.numpy().tobytes() for picture in open_clip(path).frames()]


class KillOnce:
    """Kills one worker process when a clip in the middle of the folder is being worked on."""

    def __init__(self, name: str) -> None:
        self.name, self.killed = name, ""

    def __call__(self, number: int, name: str, done: int, total: int | None) -> None:
        if self.killed or name < self.name:
            return
        workers = [c for c in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
        self.killed = name
        workers[0].kill()


def healthy_night(folder: Path, clips: int) -> dict[str, Any]:
    """All clips by one worker, then by two."""
    write_clips(folder / "healthy", clips, corrupt=False)
    one, two = (run(folder / "healthy", folder / name, workers) for name, workers in (("one", 1), ("two", 2)))
    after = [result.after for result in one.results][2:]
    return {
        "healthy": {
            "done": len(one.done),
            "out_of_memory": sum("memory" in result.error for result in one.failed),
            "after_from_clip_3": [min(after), max(after)],
            "growth": str(leak.fit(after)),
            "seconds": one.seconds,
        },
        "throughput": {
            "one_worker_seconds": one.seconds,
            "two_workers_seconds": two.seconds,
            "ratio": one.seconds / two.seconds,
            "seconds_beside_the_clips_one_worker": one.seconds - sum(result.seconds for result in one.results),
            "median_clip_seconds": {
                "one worker": median(result.seconds for result in one.results),
                "two workers": median(result.seconds for result in two.results),
            },
            "processes_on_the_machine_load": psutil.getloadavg()[0],
            "admission": two.admissions,
        },
    }


def bad_night(folder: Path, clips: int) -> dict[str, Any]:
    """Some clips are cut off and a worker is killed; afterwards the folder is run again."""
    write_clips(folder / "mixed", clips, corrupt=True)
    kill = KillOnce(f"{clips // 2:02d}.mp4")
    bad = run(folder / "mixed", folder / "bad", 2, kill)
    same = [frames_of(folder / "bad" / result.name) == frames_of(folder / "one" / result.name) for result in bad.done]
    time.sleep(1)
    left = [
        path.name for path in (folder / "bad").iterdir() if path.suffix != ".mp4" and path.name != ".steadyvsr.json"
    ]
    again = run(folder / "mixed", folder / "bad", 2)
    return {
        "done": len(bad.done),
        "failed": [f"{result.name}: {result.error}" for result in bad.failed],
        "killed_at": kill.killed,
        "redone": bad.redone,
        "bit_identical_to_single_runs": sum(same),
        "half_files": left,
        "rerun_tried": len(again.results),
        "rerun_skipped": len(again.skipped),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__, "--output")
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--kills", type=int, metavar="N", help="kill N parents and workers at random moments instead")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    if options.kills:
        return kills.report(options.json, options.kills, options.seed)
    with tempfile.TemporaryDirectory() as name:
        found = healthy_night(Path(name), options.clips)
        found["bad_night"] = bad = bad_night(Path(name), options.clips)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    corrupt = options.clips // CORRUPT_EVERY
    targets = {
        "healthy clips": found["healthy"]["done"] == options.clips,
        "clips beside corrupt ones": bad["done"] == bad["bit_identical_to_single_runs"] == options.clips - corrupt,
        "an error for each corrupt clip": len(bad["failed"]) == corrupt,
        "no half files": not bad["half_files"],
        "a second run tries the corrupt clips alone": bad["rerun_tried"] == corrupt,
    }
    return frame.finish(options.json, {"clips": options.clips, **found}, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
