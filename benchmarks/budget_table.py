"""Predicted and measured peak bytes of a run, by size, dtype, kv_ratio, decoder and tile.

    python -m steadyvsr.benchmarks.budget_table [--json FILE]

29 frames each (two process steps: the caches are full after the first). A network of the embedded model's shape runs
on the CPU under a dispatch-mode tracker of live storages. The released model runs at full size by shapes, on the paths
of a GPU: its peak is that of live tensors, without what kernels take inside and what an allocator keeps. Weights are
excluded on both sides. Exit status 1 where a prediction is more than 10 % off.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from steadyvsr.app.card.random_model import parameters, released_model, tiny_model
from steadyvsr.benchmarks import frame
from steadyvsr.benchmarks.shape_run import FUSED, ShapeTracker
from steadyvsr.memory.reading import size_text
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import FlashVSR, FlashVSRConfig, StreamOptions, transformer, upscale_frames
from steadyvsr.models.flashvsr.footprint import activation_bytes
from steadyvsr.models.flashvsr.memory_plan import MemoryPlan
from steadyvsr.models.wan_vae import StreamingDecoder, WanCosts, WanVAE

FRAMES = 29
WITHIN = 0.10
NANO = FlashVSRConfig(
    dim=128, num_heads=1, ffn_dim=512, num_layers=2, text_dim=32, lq_hidden=(48, 64), decoder_channels=(64, 32, 16, 8)
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KV_RATIOS = (2.0, 3.0, 4.0)
AS_IT_IS, TILES_OF_256, TILES_OF_384 = MemoryPlan(), MemoryPlan(tile=256), MemoryPlan(tile=384)
KV_IN_RAM = MemoryPlan(kv_in_ram=True)
CHUNKS = MemoryPlan(kv_in_ram=True, decoder_frames=1)
STRIPS = MemoryPlan(kv_in_ram=True, decoder_frames=1, decoder_strip_pixels=1 << 18)
BOTTOM = MemoryPlan(kv_in_ram=True, decoder_frames=1, decoder_strip_pixels=1 << 16, tile=384)
ON_CPU = [((256, 256), AS_IT_IS), ((300, 200), AS_IT_IS), ((384, 256), AS_IT_IS), ((512, 256), AS_IT_IS),
          ((384, 256), TILES_OF_256), ((512, 384), TILES_OF_256), ((384, 256), CHUNKS)]  # fmt: skip
BY_SHAPES = [((768, 1280), AS_IT_IS, False), ((1920, 1080), AS_IT_IS, False), ((640, 360), AS_IT_IS, False),
             ((640, 360), TILES_OF_384, False), ((768, 1280), AS_IT_IS, True), ((1920, 1080), KV_IN_RAM, False),
             ((1920, 1080), CHUNKS, False), ((1920, 1080), STRIPS, False), ((1920, 1080), BOTTOM, False),
             ((3840, 2160), STRIPS, False), ((768, 1280), CHUNKS, True)]  # fmt: skip


class Comparison(NamedTuple):
    """A prediction and what was then measured, in bytes."""

    setting: str
    predicted: int
    measured: int
    source: str

    @property
    def error(self) -> float:
        return (self.predicted - self.measured) / self.measured


def clip_of(size: tuple[int, int], scale: float) -> list[torch.Tensor]:
    width, height = (round(side / scale) for side in size)
    return [torch.zeros(height, width, 3) for _ in range(FRAMES)]


def run(model: FlashVSR, clip: list[torch.Tensor], options: StreamOptions, **where) -> None:
    for _ in upscale_frames(model, clip, options, **where):
        pass


def on_cpu() -> Iterator[Comparison]:
    for name, dtype in DTYPES.items():
        model = tiny_model(config=NANO, dtype=dtype)
        # The attention's self-check runs once for each dtype.
        run(model, clip_of((128, 128), 1.0), StreamOptions(scale=1.0), dtype=dtype)
        for (size, plan), kv_ratio in itertools.product(ON_CPU, KV_RATIOS):
            clip, options = clip_of(size, 2.0), StreamOptions(scale=2.0, kv_ratio=kv_ratio)
            with StorageTracker(exclude=[*parameters(model), *clip]) as tracker:
                run(model, clip, options, dtype=dtype, plan=plan)
            predicted = activation_bytes(
                NANO, size, kv_ratio, dtype.itemsize, model.prompt.shape[1], on_cpu=True, plan=plan
            )
            label = f"nano {size[0]}×{size[1]} {name} kv {kv_ratio:g} tc, {plan}"
            yield Comparison(label, predicted, tracker.peak, "tracker")


def by_shapes() -> Iterator[Comparison]:
    for name, dtype in DTYPES.items():
        model = released_model("v1.1", dtype, torch.device("meta"))
        with torch.device("meta"):
            vae = WanVAE(with_encoder=False).to(dtype)
        decoder, weights = StreamingDecoder(vae), [*parameters(model), *vae.parameters()]
        for (size, plan, wan), kv_ratio in itertools.product(BY_SHAPES, KV_RATIOS):
            clip, options = clip_of(size, 4.0), StreamOptions(kv_ratio=kv_ratio)
            with ShapeTracker(weights) as tracker, mock.patch.multiple(transformer, **FUSED):
                run(model, clip, options, device="meta", dtype=dtype, vae=decoder if wan else None, plan=plan)
            predicted = activation_bytes(
                FlashVSRConfig(), size, kv_ratio, dtype.itemsize, plan=plan, wan_decoder=WanCosts() if wan else None
            )
            label = f"1.3B {size[0]}×{size[1]} {name} kv {kv_ratio:g} {'wan' if wan else 'tc'}, {plan}"
            yield Comparison(label, predicted, tracker.peak, "shapes")


def main(arguments: list[str] | None = None) -> int:
    options = frame.parser(__doc__).parse_args(arguments)
    compared = [*on_cpu(), *by_shapes()]
    rows = [("setting", "predicted", "measured", "error", "source")]
    for item in compared:
        predicted, measured = size_text(item.predicted), size_text(item.measured)
        rows.append((item.setting, predicted, measured, f"{100 * item.error:+.1f} %", item.source))
    print(frame.table(rows))
    missed = [item.setting for item in compared if abs(item.error) > WITHIN]
    worst = max((item.error for item in compared), key=abs)
    print(f"{len(compared)} settings, {len(missed)} more than 10 % off, worst {100 * worst:+.1f} %")
    settings = [{**item._asdict(), "error": round(item.error, 4)} for item in compared]
    return frame.finish(options.json, {"settings": settings}, missed)


if __name__ == "__main__":
    sys.exit(main())
