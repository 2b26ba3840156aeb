"""What exact tiles of the Wan 2.1 VAE cost beside ComfyUI's tiled nodes: FLOPs and live bytes at the released size.

    python -m steadyvsr.benchmarks.wan_tiles --comfyui PATH [--json FILE]            by ComfyUI's Python

Both run whole over tensors of the meta device (dim 96, bf16), so nothing is computed: operators are counted, and bytes
of live tensors without weights, results and what waits in RAM. ComfyUI's own tiling (256 pixels, overlap 64) calls its
own network. Exit status 1 where a target is missed: FLOPs at most 0.80 (decode) and 0.85 (encode) of theirs, live peak
at most 1.15 of theirs (5 frames and more), under 5 % more for a longer clip or a frame of twice the size, one 832×480
frame under 0.5 GB, predicted peaks from 1 % below the counted ones to 10 % above.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from steadyvsr.benchmarks import frame
from steadyvsr.benchmarks.frame import MIB
from steadyvsr.benchmarks.shape_run import ShapeTracker
from steadyvsr.models.wan_vae import TiledDecode, TiledEncode, peak_bytes
from steadyvsr.models.wan_vae.tiled import TiledJob
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")
SIZE = (480, 832)
TILE, OVERLAP = 256, 64
FLOP_LIMIT = {"decode": 0.80, "encode": 0.85}
PEAK_LIMIT, GROWTH_LIMIT, FRAME_BYTES = 1.15, 0.05, 500_000_000
BELOW, ABOVE = -0.01, 0.10


def count(work: Callable[[], Any], with_flops: bool) -> dict[str, float]:
    """Live peak in MiB of `work()`, and TFLOP of a second run: the FLOP counter itself keeps tensors alive."""
    flops = FlopCounterMode(display=False)
    if with_flops:
        with torch.inference_mode(), flops, ShapeTracker():
            work()
    with torch.inference_mode(), ShapeTracker() as tracker:
        work()
    assert tracker.created, "nothing was computed on the meta device"
    return {"tflop": flops.get_total_flops() / 1e12, "peak_mib": tracker.peak / MIB}


def ours(vae: Any, kind: str, frames: int, size: tuple[int, int], tile: int = TILE, flops: bool = False) -> dict:
    """A whole job of ours."""
    height, width = size
    shape = (16, (frames + 3) // 4, height // 8, width // 8) if kind == "decode" else (3, frames, height, width)
    clip = torch.zeros(1, *shape, dtype=torch.bfloat16)
    job_of: type[TiledJob] = TiledDecode if kind == "decode" else TiledEncode

    def work() -> None:
        job = job_of(vae, clip, tile, device=META, dtype=torch.bfloat16)
        assert job.total > 1
        # The check for NaN has nothing to look at here, and its mask would count.
        with mock.patch.object(TiledJob, "_finite", lambda self, x, where: x):
            while job.done < job.total:
                job.advance(lambda: None)

    return count(work, flops)


def theirs(network: Any, kind: str, frames: int, size: tuple[int, int]) -> dict:
    """ComfyUI's `tiled_scale_multidim` as its tiled nodes call it, time in one piece."""
    tiled_scale = importlib.import_module("comfy.utils").tiled_scale_multidim
    height, width = size

    def call(tile: Tensor) -> Tensor:
        method = network.decode if kind == "decode" else network.encode
        return torch.empty(method(tile.to(META, torch.bfloat16)).shape)

    common: dict[str, Any] = {"output_device": "cpu"}
    if kind == "decode":
        x = torch.zeros(1, 16, (frames + 3) // 4, height // 8, width // 8)
        grow = (lambda t: max(0, 4 * t - 3), 8, 8)
        common |= {"tile": (999, TILE // 8, TILE // 8), "overlap": (0, OVERLAP // 8, OVERLAP // 8)}
        common |= {"upscale_amount": grow, "out_channels": 3, "index_formulas": (4, 8, 8)}
    else:
        x = torch.zeros(1, 3, frames, height, width)
        shrink = (lambda t: max(0, (t + 3) // 4), 8, 8)
        common |= {"tile": (9999, TILE, TILE), "overlap": (0, OVERLAP, OVERLAP), "upscale_amount": shrink}
        common |= {"out_channels": 16, "downscale": True, "index_formulas": (4, 8, 8)}
    return count(lambda: tiled_scale(x, call, **common), True)


def load() -> tuple[Any, Any]:
    """ComfyUI's network at the released size on the meta device, and the same under our interface."""
    wan = importlib.import_module("comfy.ldm.wan.vae")
    wan_network = importlib.import_module("steadyvsr.nodes.vae.wan")
    with META:
        network = wan.WanVAE(
            dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        ).bfloat16()  # fmt: skip
    attention = importlib.import_module("comfy.ldm.modules.diffusionmodules.model").pytorch_attention
    for block in network.modules():
        if isinstance(block, wan.AttentionBlock):
            block.optimized_attention = attention  # as on a card; the CPU's asks how much memory the device has left
    return network, wan_network._around(network)


def beside(network: Any, vae: Any, kind: str, missed: list[str]) -> list[dict]:
    """Both at 832×480, for several clip lengths."""
    rows = []
    for frames in (1, 5, 9, 21):
        builtin, exact = theirs(network, kind, frames, SIZE), ours(vae, kind, frames, SIZE, flops=True)
        flops, peak = exact["tflop"] / builtin["tflop"], exact["peak_mib"] / builtin["peak_mib"]
        row = {"kind": kind, "frames": frames, "builtin": builtin, "exact": exact}
        rows.append({**row, "flop_ratio": flops, "peak_ratio": peak})
        cells = [f"{x['tflop']:6.2f} TFLOP {x['peak_mib']:6.1f} MiB" for x in (builtin, exact)]
        print(f"{kind} {frames:2} frames | {cells[0]} | {cells[1]} | {flops:.3f} | {peak:.3f}")
        if flops > FLOP_LIMIT[kind] or (frames >= 5 and peak > PEAK_LIMIT):
            missed.append(f"{kind} of {frames} frames")
        if frames == 1 and exact["peak_mib"] * MIB >= FRAME_BYTES:
            missed.append(f"{kind} of one frame in 0.5 GB")
    return rows


def growth_of(vae: Any, kind: str, missed: list[str]) -> dict[str, float]:
    """Shares by which the peak grows with the clip and with the frame."""
    short, base, long, longest = (ours(vae, kind, n, (256, 256))["peak_mib"] for n in (5, 17, 21, 81))
    small, large = (ours(vae, kind, 9, (side, side))["peak_mib"] for side in (768, 1536))
    growth = {
        "5 to 21 latents": longest / base - 1,
        "768×768 to 1536×1536": large / small - 1,
        "5 to 21 frames": long / short - 1,
    }
    print(f"{kind}: " + ", ".join(f"{what} {share:+.1%}" for what, share in growth.items()))
    # The last chunk of a clip keeps no past, so a clip that ends with its second latent takes less than others.
    judged = {what: share for what, share in growth.items() if (kind, what) != ("decode", "5 to 21 frames")}
    missed += [f"{kind}, {what}" for what, share in judged.items() if share >= GROWTH_LIMIT]
    return growth


def predictions(vae: Any, kind: str) -> list[dict]:
    """Predicted and counted peak bytes, for several tiles and clip lengths."""
    rows = []
    for tile, frames in itertools.product((64, 128, 256, 384, 512), (1, 5, 9)):
        size = (3 * tile, 3 * tile)
        counted = ours(vae, kind, frames, size, tile)["peak_mib"] * MIB
        needs = peak_bytes(vae, encodes=kind == "encode", latents=(frames + 3) // 4, size=size, tile=tile, itemsize=2)
        rows.append({"kind": kind, "frames": frames, "tile": tile, "predicted": needs, "counted": counted})
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = frame.comfyui_parser(__doc__).parse_args(arguments)
    frame.enter(options.comfyui)
    network, vae = load()
    rows, growth, predicted, missed = [], {}, [], []
    print("832×480         | ComfyUI 256/64         | exact, tiles to 256    | FLOPs | peak")
    for kind in ("decode", "encode"):
        rows += beside(network, vae, kind, missed)
    for kind in ("decode", "encode"):
        growth[kind] = growth_of(vae, kind, missed)
        predicted += predictions(vae, kind)
    errors = [row["predicted"] / row["counted"] - 1 for row in predicted]
    missed += [f"prediction of {row['kind']}, {row['frames']} frames, tile {row['tile']}"
               for row, error in zip(predicted, errors, strict=True) if not BELOW <= error <= ABOVE]  # fmt: skip
    print(f"predicted peak beside the counted one, {len(errors)} settings: {min(errors):+.1%} to {max(errors):+.1%}")
    found = {"comfyui": frame.version_of(options.comfyui), "rows": rows, "growth": growth, "predicted": predicted}
    return frame.finish(options.json, found, missed)


if __name__ == "__main__":
    sys.exit(main())
