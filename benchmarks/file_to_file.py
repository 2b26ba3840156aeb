"""What reading and writing cost beside the engine, from file to file.

    python -m steadyvsr.benchmarks.file_to_file [--size 256] [--frames 41] [--rounds 4] [--json FILE]

First a reader, an engine and a writer that sleep for known times: together they should take little longer than the
slowest of them. Then the embedded network on this machine, a clip from file to file, with the threads of
`app.clip.write_footage` and without, in turn: on a CPU, where all three want the same cores, nothing should be lost.
Exit status 1 where that is not so.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steadyvsr.app.clip import Footage, OutputOptions, footage_of, open_video, write_footage
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from steadyvsr.models.video import ClipWriter, open_clip
from torch import Tensor

ASLEEP_FRAMES, ENGINE_STEP = 160, 8
ASLEEP_SECONDS = {"reader": 0.010, "engine": 0.020, "writer": 0.015}
"""For a frame; the engine sleeps for eight at once, as a step of FlashVSR does."""
ASLEEP_TARGET, CPU_TARGET = 1.1, 1.02
SCALE = 4.0


def asleep(slowest: str, folder: Path) -> float:
    """Seconds over those of the slowest part alone, which is made so by doubling what it sleeps."""
    seconds = ASLEEP_SECONDS | {slowest: 2 * max(ASLEEP_SECONDS.values())}

    def frames():
        for index in range(ASLEEP_FRAMES):
            time.sleep(seconds["reader"])
            yield torch.zeros(32, 32, 3), Fraction(index, 25)

    def engine(pulled: Generator[Tensor, None, None]) -> Generator[Tensor, None, None]:
        step: list[Tensor] = []
        for given in pulled:
            step.append(given)
            if len(step) == ENGINE_STEP:
                time.sleep(seconds["engine"] * len(step))
                yield from step
                step.clear()

    with ClipWriter(folder / f"{slowest}.mp4", 32, 32, 25) as writer:
        encode = writer.write

        def write(given: Tensor, moment: Fraction | None = None) -> None:
            time.sleep(seconds["writer"])
            encode(given, moment)

        writer.write = write
        started = time.perf_counter()
        clip = Footage(frames, 32, 32, ASLEEP_FRAMES, Fraction(25), Fraction(1, 25), decoded=True)
        write_footage(clip, engine, writer)
        return (time.perf_counter() - started) / (ASLEEP_FRAMES * seconds[slowest])


def seconds_of(run: Callable[[Footage, Callable[..., Any], ClipWriter], object], source: Path, target: Path) -> float:
    model = load_flashvsr(NANO_FILE)
    footage = footage_of(open_clip(source))
    writer = open_video(footage, target, SCALE, OutputOptions(force=True))
    engine = partial(upscale_frames, model, options=StreamOptions(scale=SCALE))
    started = time.perf_counter()
    run(footage, engine, writer)
    return time.perf_counter() - started


def one_after_the_other(footage: Footage, engine: Callable[..., Any], writer: ClipWriter) -> None:
    """As it was without threads."""
    times = []

    def source():
        for given, moment in footage.frames():
            times.append(moment)
            yield given

    with closing(engine(source())) as outputs:
        for output in outputs:
            writer.write(output, times.pop(0))
    writer.finish()


def with_threads(footage: Footage, engine: Callable[..., Any], writer: ClipWriter) -> None:
    write_footage(footage, partial(engine, finish=writer.pack), writer)


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--size", type=int, default=256, help="output pixels, square (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=41, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder, side = Path(name), round(options.size / SCALE)
        ratios = {slowest: round(asleep(slowest, folder), 3) for slowest in ASLEEP_SECONDS}
        print(f"asleep, time over that of the slowest part: {ratios} (target {ASLEEP_TARGET})")
        source = folder / "in.mp4"
        with ClipWriter(source, side, side, 25) as writer:
            for index in range(options.frames):
                writer.write(torch.rand(side, side, 3, generator=torch.Generator().manual_seed(index)))
        alternatives = {
            run.__name__: partial(seconds_of, run, source, folder / f"{run.__name__}.mp4")
            for run in (one_after_the_other, with_threads)
        }
        frame.in_turn(alternatives, 1)
        found = frame.in_turn(alternatives, options.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratio = medians["with_threads"] / medians["one_after_the_other"]
    print(f"embedded network, {options.frames} frames to {options.size}x{options.size}: {medians}, {ratio:.3f} "
          f"(target {CPU_TARGET})")  # fmt: skip
    figures = {"asleep": ratios, "size": options.size, "frames": options.frames, "seconds": found, "ratio": ratio}
    met = {f"asleep, {part}": value <= ASLEEP_TARGET for part, value in ratios.items()} | {"CPU": ratio <= CPU_TARGET}
    return frame.finish(options.json, figures, frame.unmet(met))


if __name__ == "__main__":
    sys.exit(main())
