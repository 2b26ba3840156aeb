"""More than 8,000 frames in one run, and the rotary angles beyond the 1,024 positions at which other packs end.

    python -m steadyvsr.benchmarks.long_run [--steps 1100] [--json FILE]

Angles are those that the transformer used in the run, compared with float64 evaluated here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from steadyvsr.benchmarks.tiny_model import tiny_model
from steadyvsr.models.flashvsr import StreamOptions, transformer, upscale_frames
from torch import Tensor

TOLERANCE = 1e-5


def independent(step: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one block of a step, token by token in window order, float64."""
    third = head_dim // 3
    dims = (head_dim - 2 * third, third, third)
    rows = []
    for frame, row, column in itertools.product(range(2), range(8), range(8)):
        places = ((0 if step == 0 else 4 + 2 * step) + frame, row, column)
        rows.append([p * 10000.0 ** (-2 * m / d) for p, d in zip(places, dims, strict=True) for m in range(d // 2)])
    angles = torch.tensor(rows, dtype=torch.float64)
    return angles.cos(), angles.sin()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    watched = {509, 510, 511, 512, options.steps - 1}
    model, used = tiny_model(), {}
    rotation, calls = transformer.rotation, itertools.count()

    def recording(*args) -> tuple[Tensor, Tensor]:
        result = rotation(*args)
        if (step := next(calls)) in watched:
            used[step] = result
        return result

    transformer.rotation = recording
    frames = 21 + 8 * (options.steps - 1)
    started, finished = time.process_time(), 0
    try:
        source = (torch.full((16, 16, 3), (index % 97) / 96) for index in range(frames))
        for frame in upscale_frames(model, source, StreamOptions(scale=1.0)):
            finished += int(torch.isfinite(frame).all())
    finally:
        transformer.rotation = rotation
    seconds = time.process_time() - started
    errors = {}
    for step, (cos, sin) in sorted(used.items()):
        expected = independent(step, model.transformer.config.head_dim)
        errors[step] = max(
            (got[:, 0].double() - want).abs().max().item() for got, want in zip((cos, sin), expected, strict=True)
        )
    steps = next(calls)
    print(f"{steps} process steps, {finished} of {frames} frames, {seconds:.0f} s of CPU time")
    for step, error in errors.items():
        print(f"step {step}: angles differ from float64 by {error:.1e} (tolerance {TOLERANCE})")
    passed = finished == frames and steps == options.steps and set(errors) == watched
    passed = passed and max(errors.values()) <= TOLERANCE
    print("passed" if passed else "missed")
    if options.json:
        report = {"steps": steps, "frames": finished, "errors": errors, "passed": passed}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
