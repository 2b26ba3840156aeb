"""Many runs of the FlashVSR path in one process: what is left after each, and whether they slow down.

    python -m steadyvsr.benchmarks.repeat_runs [--runs N] [--json FILE]

A small random model upscales 25 frames (two process steps) in each run. In every tenth run a scripted out-of-memory
error drives it one rung down its memory plans. Bytes of live tensors come from a dispatch-mode tracker, weights
excluded. Exit status 1 where the bytes after a run differ from those after run 3, or where the second half of the runs
is more than 10 % slower or faster than the runs 11 to half.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from steadyvsr.app.card.random_model import parameters, tiny_model
from steadyvsr.benchmarks import frame
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.memory_plan import MemoryPlan, smaller

RUNS, FIRST_COMPARED, WARM_UP = 200, 3, 10
FRAMES, SIDE, SCALE = 25, 32, 4.0
FAILS_EVERY = 10
WITHIN = 0.10


class ScriptedCard:
    """Raises an out-of-memory error once, in the first transformer step of a run."""

    def __init__(self, armed: bool) -> None:
        self.armed, self.rungs = armed, 0

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise torch.OutOfMemoryError("scripted")

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        self.rungs += 1
        found = smaller(plan, phase, (round(SIDE * SCALE), round(SIDE * SCALE)))
        return found and found[1]


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args(arguments)
    if options.runs < 4 * WARM_UP:
        parser.error(f"--runs: expected at least {4 * WARM_UP}; got {options.runs}")
    model = tiny_model()
    clip = torch.rand(FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    left, seconds, peaks, rungs, frames = [], [], [], 0, 0
    with StorageTracker(exclude=[*parameters(model), clip]) as tracker:
        for run in range(options.runs):
            card = ScriptedCard(armed=run % FAILS_EVERY == FAILS_EVERY - 1)
            hook = model.transformer.get_submodule("blocks.0.self_attn.q").register_forward_pre_hook(card)
            tracker.reset_peak()
            started = time.perf_counter()
            stream = upscale_frames(model, clip, StreamOptions(scale=SCALE), on_memory_error=card.on_memory_error)
            frames += sum(1 for _ in stream)
            seconds.append(time.perf_counter() - started)
            hook.remove()
            del stream
            left.append(tracker.now)
            peaks.append(tracker.peak)
            rungs += card.rungs
    half, kept = options.runs // 2, left[FIRST_COMPARED - 1]
    early, late = statistics.median(seconds[WARM_UP:half]), statistics.median(seconds[half:])
    different = [run + 1 for run in range(FIRST_COMPARED, options.runs) if left[run] != kept]
    change = late / early - 1
    print(f"{options.runs} runs, {frames} frames, peak {max(peaks):,} B of tensors, {rungs} scripted errors recovered")
    print(f"tensors after run {FIRST_COMPARED}: {kept:,} B; runs that differ: {different or 'none'}")
    print(f"median of runs {WARM_UP + 1}–{half}: {early:.4f} s, of runs {half + 1}–{options.runs}: {late:.4f} s: "
          f"{100 * change:+.1f} %")  # fmt: skip
    targets = {
        "bytes after a run": not different,
        "time of a run": abs(change) <= WITHIN,
        "every frame": frames == FRAMES * options.runs,
        "something was tracked": min(peaks) > frame.MIB,
    }
    figures = {
        "runs": options.runs, "frames": frames, "tensor_bytes_left": sorted(set(left[FIRST_COMPARED - 1 :])),
        "tensor_bytes_peak": max(peaks), "recovered": rungs, "median_seconds_early": round(early, 5),
        "median_seconds_late": round(late, 5), "change": round(change, 4),
    }  # fmt: skip
    return frame.finish(options.json, figures, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
