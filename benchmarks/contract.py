"""The contract of frames and sizes: hundreds of cases through the plan, 66 through the engine.

    python -m steadyvsr.benchmarks.contract [--json FILE]

Every input frame has a mean colour of its own. With AdaIN, output frame j has the mean colour of input frame j, so a
frame that is shifted, doubled or dropped shows.
"""

from __future__ import annotations

import itertools
import sys

import torch
from steadyvsr.app.card.random_model import tiny_model
from steadyvsr.benchmarks import frame
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


def planned_right(count: int, width: int, height: int, scale: float) -> bool:
    """Every frame has its place, the size is exact, and the padding is less than a unit."""
    plan, size = frame_plan(count), output_size(width, height, scale)
    whole = plan.padded_frames == max(25, 8 * -(-(count + 3) // 8) + 1) and step_outputs(plan.steps - 1)[1] >= count
    exact = size == (round(width * scale), round(height * scale))
    padded = zip(padded_size(*size), size, strict=True)
    return whole and exact and all(side % 128 == 0 and 0 <= side - wanted < 128 for side, wanted in padded)


def main(arguments: list[str] | None = None) -> int:
    options = frame.parser(__doc__).parse_args(arguments)
    missed, worst, model = [], 0.0, tiny_model()
    planned = list(itertools.product(FRAMES, SIZES, SCALES))
    for count, (width, height), scale in planned:
        if not planned_right(count, width, height, scale):
            missed.append(f"plan of {count} frames of {width} × {height} at {scale}")
    ran = list(itertools.product(FRAMES, RUN_SIZES))
    for count, (width, height, scale) in ran:
        given = clip(count, width, height)
        result = list(upscale_frames(model, given, StreamOptions(scale=scale)))
        right = len(result) == count and result[0].shape == (round(height * scale), round(width * scale), 3)
        difference = (torch.stack(result).mean((1, 2)) - given.mean((1, 2))).abs().max().item() if right else 1.0
        worst = max(worst, difference)
        if difference > TOLERANCE:
            missed.append(f"{count} frames of {width} × {height} at {scale}: {len(result)} frames, {difference:.4f}")
    print(f"{len(planned)} cases through the plan, {len(ran)} through the engine, {len(missed)} missed; "
          f"mean colours differ by at most {worst * 255:.3f} of 255")  # fmt: skip
    figures = {"planned": len(planned), "ran": len(ran), "largest_difference_of_255": worst * 255}
    return frame.finish(options.json, figures, missed)


if __name__ == "__main__":
    sys.exit(main())
