"""Quality of the embedded nano network on the held-out clips, through the whole path of `upscale_frames`.

    python -m steadyvsr.benchmarks.nano_quality [--weights FILE] [--colours none adain] [--json FILE]

For each clip: PSNR and SSIM of clamped bicubic and of the network, then what is lost when a part of it is silenced:
the transformer's velocity (latents become noise), the latents themselves, and the LQ tokens are replaced by zeros.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from steadyvsr.app import drawn_clips
from steadyvsr.app.metrics import psnr, ssim
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr import FlashVSR, StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = drawn_clips.HELD_OUT_FRAMES, drawn_clips.HELD_OUT_HEIGHT, drawn_clips.HELD_OUT_WIDTH
THREADS = 2


class SilentTransformer(nn.Module):
    """Returns `share` of its input as the velocity: 0 leaves the latents pure noise, 1 makes them zero."""

    def __init__(self, model: FlashVSR, share: float) -> None:
        super().__init__()
        self.config, self.prepare, self.share = model.transformer.config, model.transformer.prepare, share

    def forward(self, latent: Tensor, *_) -> Tensor:
        return latent * self.share


class SilentProjection(nn.Module):
    """The LQ projection with every token replaced by zeros."""

    def __init__(self, model: FlashVSR) -> None:
        super().__init__()
        self.projection = model.lq_projection

    def forward(self, clip: Tensor, cache):
        tokens, cache = self.projection(clip, cache)
        return (None if tokens is None else [torch.zeros_like(layer) for layer in tokens]), cache


def variants(model: FlashVSR) -> dict[str, FlashVSR]:
    replace = dataclasses.replace
    return {
        "output": model,
        "velocity_zero": replace(model, transformer=SilentTransformer(model, 0.0)),
        "latents_zero": replace(model, transformer=SilentTransformer(model, 1.0)),
        "lq_tokens_zero": replace(model, lq_projection=SilentProjection(model)),
    }


def score(model: FlashVSR, seed: int, colour: str) -> dict[str, dict[str, float]]:
    """Name of variant → PSNR in dB and SSIM on one held-out clip; frames are rounded to 8 bit, as a file holds them."""
    target = drawn_clips.make_clip(seed, FRAMES, HEIGHT, WIDTH)
    small = drawn_clips.degrade(target)
    results = {"bicubic": drawn_clips.enlarge(small)}
    options = StreamOptions(scale=4.0, colour=colour, seed=0)
    for name, variant in variants(model).items():
        results[name] = torch.stack(list(upscale_frames(variant, list(small), options)))
    rounded = {name: (clip * 255).round() / 255 for name, clip in results.items()}
    return {name: {"psnr": psnr(clip, target), "ssim": ssim(clip, target)} for name, clip in rounded.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__, "--output")
    parser.add_argument("--weights", type=Path, default=NANO_FILE)
    parser.add_argument("--colours", nargs="+", default=["none", "adain"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    model = load_flashvsr(options.weights, dtype=torch.float32)
    clip_text = f"{FRAMES} frames, {WIDTH}x{HEIGHT}, scale 4"
    figures: dict = {"weights_bytes": options.weights.stat().st_size, "clips": clip_text}
    for colour in options.colours:
        started = time.monotonic()
        clips = {seed: score(model, seed, colour) for seed in drawn_clips.HELD_OUT_SEEDS}
        names = list(next(iter(clips.values())))
        mean = {n: {m: statistics.mean(c[n][m] for c in clips.values()) for m in ("psnr", "ssim")} for n in names}
        print(f"colour {colour}  ({time.monotonic() - started:.0f} s)\n  clip    " + "".join(f"{n:>22}" for n in names))
        for label, row in [*clips.items(), ("mean", mean)]:
            print(f"  {label!s:8}" + "".join(f"{row[n]['psnr']:13.3f} {row[n]['ssim']:8.4f}" for n in names))
        cost = {n: mean["output"]["psnr"] - mean[n]["psnr"] for n in names[2:]}
        print("  cost in dB: " + "  ".join(f"{n} {value:.3f}" for n, value in cost.items()))
        figures[colour] = {"clips": clips, "mean": mean, "cost_db": cost}
    return frame.finish(options.json, figures)


if __name__ == "__main__":
    sys.exit(main())
