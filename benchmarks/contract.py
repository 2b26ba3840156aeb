"""The frame and size contract: hundreds of cases through the plan, 66 through the engine.

    python -m steadyvsr.benchmarks.contract [--json FILE]

Every input frame has a mean colour of its own. With AdaIN, output frame j has the mean colour of input frame j, so a
frame that is shifted, doubled or dropped shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from steadyvsr.benchmarks.tiny_model import tiny_model
from steadyvsr.models.flashvsr import StreamOptions, frame_plan, output_size, padded_size, upscale_frames
from steadyvsr.models.flashvsr.plan import step_outputs

FRAMES = (1, 2, 20, 21, 22, 25, 29, 30, 33, 41, 100)
SIZES = ((16, 16), (17, 31), (51, 85), (64, 40), (127, 129), (640, 360), (1919, 1081))
SCALES = (1.0, 1.5, 2.0, 2.35, 3.0, 4.0, 7.9, 8.0)
RUN_SIZES = ((16, 16, 1.0), (16, 16, 8.0), (17, 31, 3.7), (51, 17, 1.5), (30, 24, 4.0), (40, 65, 2.0))
TOLERANCE = 2 / 255


def clip(count: int, width: int, height: int) -> torch.Tensor:
    """THWC; neighbours differ in mean colour by far more than the tolerance."""
    generator = torch.Generator().manual_seed(count)
    means = torch.stack([(torch.arange(count) * step % 11) / 11 * 0.7 + 0.15 for step in (3, 5, 7)], 1)
    return means[:, None, None] + (torch.rand(count, height, width, 3, generator=generator) - 0.5) * 0.05


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    planned = missed = 0
    for count, (width, height), scale in itertools.product(FRAMES, SIZES, SCALES):
        plan, size = frame_plan(count), output_size(width, height, scale)
        padded = padded_size(*size)
        whole = plan.padded_frames == max(25, 8 * -(-(count + 3) // 8) + 1) and step_outputs(plan.steps - 1)[1] >= count
        exact = size == (round(width * scale), round(height * scale))
        fits = all(p % 128 == 0 and 0 <= p - s < 128 for p, s in zip(padded, size, strict=True))
        planned += 1
        missed += not (whole and exact and fits)
    model, ran, worst = tiny_model(), 0, 0.0
    for count, (width, height, scale) in itertools.product(FRAMES, RUN_SIZES):
        given = clip(count, width, height)
        result = list(upscale_frames(model, given, StreamOptions(scale=scale)))
        ran += 1
        right = len(result) == count and result[0].shape == (round(height * scale), round(width * scale), 3)
        difference = (torch.stack(result).mean((1, 2)) - given.mean((1, 2))).abs().max().item() if right else 1.0
        worst = max(worst, difference)
        if difference > TOLERANCE:
            missed += 1
            print(f"missed: {count} frames of {width} × {height} at {scale}: {len(result)} frames, {difference:.4f}")
    print(f"{planned} cases through the plan, {ran} through the engine, {missed} missed; "
          f"mean colours differ by at most {worst * 255:.3f} of 255")  # fmt: skip
    if options.json:
        report = {"planned": planned, "ran": ran, "missed": missed, "largest_difference_of_255": worst * 255}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
