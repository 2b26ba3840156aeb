"""More than 8,000 frames in one run, and the rotary angles beyond the 1,024 positions where other packs stop.

    python -m steadyvsr.benchmarks.long_run [--steps 1100] [--json FILE]

Angles are those that the transformer used in the run, compared with float64 evaluated here.
"""

from __future__ import annotations

import itertools
import sys
import time
from unittest import mock

import torch
from steadyvsr.app.card.random_model import tiny_model
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr import StreamOptions, transformer, upscale_frames
from torch import Tensor

TOLERANCE = 1e-5


def independent(step: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one block of a step, token by token in window order, float64."""
    third = head_dim // 3
    dims = (head_dim - 2 * third, third, third)
    rows = []
    for latent, row, column in itertools.product(range(2), range(8), range(8)):
        places = ((0 if step == 0 else 4 + 2 * step) + latent, row, column)
        rows.append([p * 10000.0 ** (-2 * m / d) for p, d in zip(places, dims, strict=True) for m in range(d // 2)])
    angles = torch.tensor(rows, dtype=torch.float64)
    return angles.cos(), angles.sin()


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1100)
    options = parser.parse_args(arguments)
    watched = {509, 510, 511, 512, options.steps - 1}
    model, used = tiny_model(), {}
    rotation, calls = transformer.rotation, itertools.count()

    def recording(*args) -> tuple[Tensor, Tensor]:
        result = rotation(*args)
        if (step := next(calls)) in watched:
            used[step] = result
        return result

    frames = 21 + 8 * (options.steps - 1)
    source = (torch.full((16, 16, 3), (index % 97) / 96) for index in range(frames))
    started, finished = time.process_time(), 0
    with mock.patch.object(transformer, "rotation", recording):
        for output in upscale_frames(model, source, StreamOptions(scale=1.0)):
            finished += int(torch.isfinite(output).all())
    seconds, steps, errors = time.process_time() - started, next(calls), {}
    print(f"{steps} process steps, {finished} of {frames} frames, {seconds:.0f} s of CPU time")
    for step, (cos, sin) in sorted(used.items()):
        expected = independent(step, model.transformer.config.head_dim)
        errors[step] = max(
            (got[:, 0].double() - want).abs().max().item() for got, want in zip((cos, sin), expected, strict=True)
        )
        print(f"step {step}: angles differ from float64 by {errors[step]:.1e} (tolerance {TOLERANCE})")
    targets = {
        "every frame": finished == frames,
        "every step": steps == options.steps and set(errors) == watched,
        "angles": max(errors.values()) <= TOLERANCE,
    }
    return frame.finish(options.json, {"steps": steps, "frames": finished, "errors": errors}, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
