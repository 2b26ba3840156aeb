"""A night of fifty clips: healthy ones, one worker against two, then corrupt ones and a worker killed at its work.

    python -m steadyvsr.benchmarks.night [--clips 50] [--output JSON]

Small clips and the embedded network at scale 2, so that it takes minutes; the processes, the record and the retries are
those of any night.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from steadyvsr.app import folder as batch
from steadyvsr.app.clip import OutputOptions
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
            for frame in torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(index)):
                writer.write(frame)
        if corrupt and index % CORRUPT_EVERY == CORRUPT_EVERY - 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def run(source: Path, output: Path, workers: int, progress=lambda *_: None) -> batch.NightReport:
    settings = batch.WorkerSettings("cpu", str(NANO_FILE), StreamOptions(scale=2.0), LOSSLESS)
    manifest = batch.Manifest(output, batch.folder_settings(settings))
    jobs = tuple(batch.find_jobs(source, output))
    return batch.run_night(batch.Night(jobs, (settings,), workers), manifest, lambda line: None, progress)


def frames_of(path: Path) -> list[bytes]:
    """The pixels of every frame of a file."""
    return [frame.numpy().tobytes() for frame in open_clip(path).frames()]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args()
    found: dict = {"clips": options.clips}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder / "healthy", options.clips, corrupt=False)
        healthy = run(folder / "healthy", folder / "one", 1)
        after = [result.after for result in healthy.results]
        growth = leak.fit(after[2:])
        found["healthy"] = {
            "done": len(healthy.done),
            "out_of_memory": sum("memory" in result.error for result in healthy.failed),
            "after_from_clip_3": [min(after[2:]), max(after[2:])],
            "growth": str(growth),
            "seconds": healthy.seconds,
        }
        two = run(folder / "healthy", folder / "two", 2)
        start, clip = healthy.seconds - sum(r.seconds for r in healthy.results), median(r.seconds for r in two.results)
        found["throughput"] = {
            "one_worker_seconds": healthy.seconds,
            "two_workers_seconds": two.seconds,
            "ratio": healthy.seconds / two.seconds,
            "seconds_beside_the_clips_one_worker": start,
            "median_clip_seconds": {"one worker": median(r.seconds for r in healthy.results), "two workers": clip},
            "processes_on_the_machine_load": psutil.getloadavg()[0],
            "admission": two.admissions,
        }
        write_clips(folder / "mixed", options.clips, corrupt=True)
        kill = KillOnce(f"{options.clips // 2:02d}.mp4")
        bad = run(folder / "mixed", folder / "bad", 2, kill)
        same = [
            frames_of(folder / "bad" / result.name) == frames_of(folder / "one" / result.name) for result in bad.done
        ]
        time.sleep(1)
        left = [path.name for path in (folder / "bad").rglob("*") if ".part" in path.name]
        again = run(folder / "mixed", folder / "bad", 2)
        found["bad_night"] = {
            "done": len(bad.done),
            "failed": [f"{result.name}: {result.error}" for result in bad.failed],
            "killed_at": kill.killed,
            "redone": bad.redone,
            "bit_identical_to_single_runs": sum(same),
            "half_files": left,
            "rerun_tried": len(again.results),
            "rerun_skipped": len(again.skipped),
        }
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    bad_night, expected = found["bad_night"], options.clips // CORRUPT_EVERY
    good = (
        found["healthy"]["done"] == options.clips
        and bad_night["done"] == bad_night["bit_identical_to_single_runs"] == options.clips - expected
        and len(bad_night["failed"]) == expected
        and not bad_night["half_files"]
        and bad_night["rerun_tried"] == expected
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
