"""Predicted against measured peak bytes of a run, over size, dtype, kv_ratio, decoder and tile.

    python -m steadyvsr.benchmarks.budget_table [--json FILE]

29 frames each (two process steps: the caches are full after the first). A network of the embedded model's shape runs
on the CPU under a dispatch-mode tracker of live storages. The released model runs at full size by shapes, on the paths
of a GPU: its peak is that of live tensors, without what kernels take inside and what an allocator keeps. Weights are
excluded on both sides. Exits with 1 where a prediction is more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from steadyvsr.benchmarks.shape_run import FUSED, ShapeTracker
from steadyvsr.benchmarks.tiny_model import parameters, tiny_model
from steadyvsr.memory.budget import History
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.models.flashvsr import FlashVSR, FlashVSRConfig, StreamOptions, transformer, upscale_frames
from steadyvsr.models.flashvsr.footprint import activation_bytes
from steadyvsr.models.flashvsr.lq_projection import CausalLQ4xProjection
from steadyvsr.models.flashvsr.memory_plan import MemoryPlan
from steadyvsr.models.flashvsr.tc_decoder import TCDecoder
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


def clip_of(size: tuple[int, int], scale: float) -> list[torch.Tensor]:
    width, height = (round(side / scale) for side in size)
    return [torch.zeros(height, width, 3) for _ in range(FRAMES)]


def run(model: FlashVSR, clip: list[torch.Tensor], options: StreamOptions, **where) -> None:
    for _ in upscale_frames(model, clip, options, **where):
        pass


def on_cpu(history: History) -> None:
    for name, dtype in DTYPES.items():
        model = tiny_model(config=NANO, dtype=dtype)
        # The attention's self-check runs once for each dtype.
        run(model, clip_of((128, 128), 1.0), StreamOptions(scale=1.0), dtype=dtype)
        for size, plan in ON_CPU:
            for kv_ratio in KV_RATIOS:
                clip, options = clip_of(size, 2.0), StreamOptions(scale=2.0, kv_ratio=kv_ratio)
                with StorageTracker(exclude=[*parameters(model), *clip]) as tracker:
                    run(model, clip, options, dtype=dtype, plan=plan)
                predicted = activation_bytes(
                    NANO, size, kv_ratio, dtype.itemsize, model.prompt.shape[1], on_cpu=True, plan=plan
                )
                label = f"nano {size[0]}×{size[1]} {name} kv {kv_ratio:g} tc, {plan}"
                history.add(label, predicted, tracker.peak, "tracker")


def by_shapes(history: History) -> None:
    config = FlashVSRConfig()
    for name, dtype in DTYPES.items():
        with torch.device("meta"):
            networks = (
                transformer.Transformer(config),
                CausalLQ4xProjection(config.lq_hidden, config.dim, config.lq_layers),
                TCDecoder(config.decoder_channels),
            )
            prompt = torch.zeros(1, 512, config.text_dim, dtype=dtype)
            vae = WanVAE(with_encoder=False).to(dtype)
        decoder = StreamingDecoder(vae)
        for network in networks:
            network.requires_grad_(False).to(dtype)
        model = FlashVSR(*networks, prompt, "v1.1", "flashvsr")
        weights = [*parameters(model), *vae.parameters()]
        for size, plan, wan in BY_SHAPES:
            for kv_ratio in KV_RATIOS:
                clip, options = clip_of(size, 4.0), StreamOptions(kv_ratio=kv_ratio)
                with ShapeTracker(weights) as tracker:
                    run(model, clip, options, device="meta", dtype=dtype, vae=decoder if wan else None, plan=plan)
                costs, name_of = (WanCosts(), "wan") if wan else (None, "tc")
                predicted = activation_bytes(config, size, kv_ratio, dtype.itemsize, plan=plan, wan_decoder=costs)
                label = f"1.3B {size[0]}×{size[1]} {name} kv {kv_ratio:g} {name_of}, {plan}"
                history.add(label, predicted, tracker.peak, "shapes")


@contextmanager
def fused_attention() -> Iterator[None]:
    kept = {name: getattr(transformer, name) for name in FUSED}
    try:
        vars(transformer).update(FUSED)
        yield
    finally:
        vars(transformer).update(kept)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    history = History()
    on_cpu(history)
    with fused_attention():
        by_shapes(history)
    compared = history.comparisons()
    outside = [item for item in compared if abs(item.error) > WITHIN]
    worst = max(compared, key=lambda item: abs(item.error))
    print(history.table())
    print(f"{len(compared)} settings, {len(outside)} more than 10 % off, worst {100 * worst.error:+.1f} %")
    if arguments.json:
        rows = [{**vars(item), "error": round(item.error, 4)} for item in compared]
        arguments.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
