"""Quality of the embedded nano network on the held-out clips, through the whole path of `upscale_frames`.

    python benchmarks/nano_quality.py --output benchmarks/results/nano_quality.json

For each clip: PSNR and SSIM of clamped bicubic and of the network, then what is lost when a part of it is silenced:
the transformer's velocity (latents become noise), the latents themselves, and the LQ tokens are replaced by zeros.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from steadyvsr.app.drawn_clips import (
    HELD_OUT_FRAMES,
    HELD_OUT_HEIGHT,
    HELD_OUT_SEEDS,
    HELD_OUT_WIDTH,
    degrade,
    enlarge,
    make_clip,
)
from steadyvsr.app.metrics import psnr, ssim
from steadyvsr.models.flashvsr import FlashVSR, StreamOptions, upscale_frames
from steadyvsr.models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from torch import Tensor, nn


class SilentTransformer(nn.Module):
    """Gives `share` of its input for a velocity: 0 leaves the latents pure noise, 1 makes them zero."""

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
    target = make_clip(seed, HELD_OUT_FRAMES, HELD_OUT_HEIGHT, HELD_OUT_WIDTH)
    small = degrade(target)
    results = {"bicubic": enlarge(small)}
    options = StreamOptions(scale=4.0, colour=colour, seed=0)
    for name, variant in variants(model).items():
        results[name] = torch.stack(list(upscale_frames(variant, list(small), options)))
    rounded = {name: (clip * 255).round() / 255 for name, clip in results.items()}
    return {name: {"psnr": psnr(clip, target), "ssim": ssim(clip, target)} for name, clip in rounded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of the embedded nano network on the held-out clips.")
    parser.add_argument("--weights", type=Path, default=NANO_FILE)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--colours", nargs="+", default=["none", "adain"])
    arguments = parser.parse_args()
    model = load_flashvsr(arguments.weights, dtype=torch.float32)
    report: dict = {
        "weights_bytes": arguments.weights.stat().st_size,
        "torch": torch.__version__,
        "clips": f"{HELD_OUT_FRAMES} frames, {HELD_OUT_WIDTH}x{HELD_OUT_HEIGHT}, scale 4",
    }
    for colour in arguments.colours:
        started = time.monotonic()
        clips = {seed: score(model, seed, colour) for seed in HELD_OUT_SEEDS}
        names = list(clips[HELD_OUT_SEEDS[0]])
        mean = {n: {m: statistics.mean(c[n][m] for c in clips.values()) for m in ("psnr", "ssim")} for n in names}
        print(f"colour {colour}  ({time.monotonic() - started:.0f} s)\n  clip    " + "".join(f"{n:>22}" for n in names))
        for label, row in [*clips.items(), ("mean", mean)]:
            print(f"  {label!s:8}" + "".join(f"{row[n]['psnr']:13.3f} {row[n]['ssim']:8.4f}" for n in names))
        cost = {n: mean["output"]["psnr"] - mean[n]["psnr"] for n in names[2:]}
        print("  cost in dB: " + "  ".join(f"{n} {value:.3f}" for n, value in cost.items()))
        report[colour] = {"clips": {str(seed): row for seed, row in clips.items()}, "mean": mean, "cost_db": cost}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
