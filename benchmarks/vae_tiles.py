"""Tiled VAE nodes beside ComfyUI's own: PSNR and colour shift against the whole frame, on small random VAEs.

    python -m steadyvsr.benchmarks.vae_tiles --comfyui PATH [--json FILE]        by ComfyUI's Python

Also measured: a GroupNorm VAE whose blended tiles share statistics, taken from two sweeps over the tiles or from the
frame reduced to a tile's area, beside the layers computed one after another. Exit status 1 where
the default is worse than ComfyUI's own node, or shifts the colours of a VAE with GroupNorm by more than 0.3 of what
that does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from steadyvsr.benchmarks import frame
from steadyvsr.models.image_vae import decoder_steps, encoder_steps, map_bytes, predicted_bytes
from steadyvsr.models.tiling import BlendDecode, BlendEncode, axis_weights
from torch import Tensor, nn

HEIGHT, WIDTH, FRAMES = 384, 512, 5
TILES = ((256, 64), (128, 32))
SWEEP_TILE = (128, 32)
BLOCK = 64
SHIFT_LIMIT = 0.3
PIXELS = 8


def picture(count: int) -> Tensor:
    """BHWC with coarse and fine parts, the left half darker and flatter than the right."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(count, 3, HEIGHT // k, WIDTH // k, generator=generator) for k in (128, 16, 4)]
    image = torch.stack([F.interpolate(part, size=(HEIGHT, WIDTH), mode="bilinear") for part in parts]).mean(0)
    image[..., : WIDTH // 2] = 0.1 + 0.3 * image[..., : WIDTH // 2]
    return image.movedim(1, -1)


def psnr(result: Tensor, whole: Tensor) -> float:
    """In dB, over the range of the whole frame's values."""
    return float(-10 * ((result - whole).square().mean() / (whole.max() - whole.min()) ** 2).log10())


def shift(result: Tensor, whole: Tensor) -> float:
    """RMS difference of the means of 64×64 pixels of BHWC, in standard deviations of the whole frame's values."""
    blocks = F.avg_pool2d((result - whole).movedim(-1, 1), BLOCK)
    return float(blocks.square().mean().sqrt() / whole.std())


class SharedNorms:
    """The GroupNorms of a network under statistics that were gathered over tiles, by hooks."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
        self.sums: list[Tensor] = []

    @contextmanager
    def measuring(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Adds what one pass sees, weighted by the tile's share of the image."""
        seen: list[Tensor] = []

        def watch(layer: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0][0]
            weights = stretched(rows, x.shape[1])[:, None] * stretched(columns, x.shape[2])
            groups = x.double().reshape(layer.num_groups, -1, *x.shape[1:])
            weighted = groups * weights
            sums = [torch.ones_like(groups) * weights, weighted, weighted * groups]
            seen.append(torch.stack([part.sum((1, 2, 3)) for part in sums]))

        with self._hooked(watch):
            yield
        self.sums = [old + new for old, new in zip(self.sums, seen, strict=True)] if self.sums else seen

    @contextmanager
    def applying(self) -> Iterator[None]:
        calls = iter(self.sums)

        def normalise(layer: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor:
            count, first, second = next(calls)
            mean, per_group = first / count, args[0].shape[1] // layer.num_groups
            deviation = (second / count - mean.square()).clamp_min(0).add(layer.eps).sqrt()
            mean, deviation = (part.float().repeat_interleave(per_group)[:, None, None] for part in (mean, deviation))
            return (args[0] - mean) / deviation * layer.weight[:, None, None] + layer.bias[:, None, None]

        with self._hooked(normalise):
            yield

    @contextmanager
    def _hooked(self, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(hook).remove)
            yield


def stretched(weights: Tensor, length: int) -> Tensor:
    return F.interpolate(weights[None, None], size=length, mode="nearest-exact")[0, 0]


def with_shared_norms(network: Any, encodes: bool, source: Tensor, how: str) -> Tensor:
    """A blended result whose tiles share statistics. `how`: "two sweeps" or "reduced frame"."""
    tile, overlap = SWEEP_TILE
    kind, call = (BlendEncode, network.encode) if encodes else (BlendDecode, network.decode)
    sweep, job = (
        kind(call, source, tile, overlap, PIXELS, device=torch.device("cpu"), dtype=torch.float32) for _ in range(2)
    )
    norms = SharedNorms(network)
    if how == "two sweeps":
        rows, columns = (axis_weights(spans) for spans in sweep._grids[0])
        for row in rows:
            for column in columns:
                with norms.measuring(row, column):
                    sweep.advance(lambda: None)
    else:
        unit = PIXELS if encodes else 1
        area = (tile if encodes else tile // PIXELS) ** 2
        factor = (area / (source.shape[-1] * source.shape[-2])) ** 0.5
        size = [round(length * factor / unit) * unit for length in source.shape[-2:]]
        with norms.measuring(torch.ones(size[0] // unit), torch.ones(size[1] // unit)):
            call(F.interpolate(source, size=size, mode="nearest"))
    while job.done < job.total:
        with norms.applying() if norms.layers else nullcontext():
            job.advance(lambda: None)
    return job.result


def measured(result: Tensor, whole: Tensor, image: bool) -> dict[str, float]:
    found = {"psnr_db": round(psnr(result, whole), 2)}
    return {**found, "shift": round(shift(result, whole), 5)} if image else found


def case(stock: Any, ours: Any, vae: Any, pixels: Tensor, tile: int, overlap: int) -> dict[str, dict[str, dict]]:
    """Both directions: ComfyUI's own node, ours by default, ours blended."""
    source = pixels.movedim(-1, 1)
    source = source.movedim(1, 0).unsqueeze(0) if vae.latent_dim == 3 else source
    latents = vae.first_stage_model.encode(source * 2 - 1)
    whole = vae.process_output(vae.first_stage_model.decode(latents)).movedim(1, -1).reshape(-1, HEIGHT, WIDTH, 3)
    options = {"memory_budget_gb": 0.0, "on_oom": "error", "tile_size": tile, "overlap": overlap}

    def encoded(mode: str) -> Tensor:
        node = ours.VAEEncodeTiled.PREPARE_CLASS_CLONE({})
        return node.execute(pixels=pixels, vae=vae, mode=mode, **options).args[0]["samples"]

    def decoded(mode: str) -> Tensor:
        node = ours.VAEDecodeTiled.PREPARE_CLASS_CLONE({})
        return node.execute(samples={"samples": latents}, vae=vae, mode=mode, **options).args[0]

    own_latents = stock.VAEEncodeTiled().encode(vae, pixels, tile, overlap)[0]["samples"]
    own_frames = stock.VAEDecodeTiled().decode(vae, {"samples": latents}, tile, overlap)[0]
    coded = {"stock": own_latents, "auto": encoded("auto"), "blend": encoded("blend")}
    shown = {"stock": own_frames, "auto": decoded("auto"), "blend": decoded("blend")}
    return {
        "encode": {how: measured(result, latents, False) for how, result in coded.items()},
        "decode": {how: measured(result, whole, True) for how, result in shown.items()},
    }


def norm_case(vae: Any, pixels: Tensor) -> dict[str, dict[str, dict]]:
    network, source = vae.first_stage_model, pixels.movedim(-1, 1) * 2 - 1
    latents = network.encode(source)
    whole = vae.process_output(network.decode(latents)).movedim(1, -1)
    found: dict[str, dict[str, dict]] = {"encode": {}, "decode": {}}
    for how in ("two sweeps", "reduced frame"):
        found["encode"][how] = measured(with_shared_norms(network, True, source, how), latents, False)
        frames = vae.process_output(with_shared_norms(network, False, latents, how)).movedim(1, -1)
        found["decode"][how] = measured(frames, whole, True)
    return found


def released() -> dict[str, dict[str, int]]:
    """Bytes of the exact path on a VAE of SD's full width in bf16: of one tile on the device, and between layers in
    RAM."""
    autoencoder = importlib.import_module("comfy.ldm.models.autoencoder").AutoencoderKL
    sizes = {**importlib.import_module("small_vaes").SD_SIZES, "ch": 128, "num_res_blocks": 2}
    with torch.device("meta"):
        network = autoencoder(ddconfig=sizes, embed_dim=4)
    chains = {"decode": decoder_steps(network.decoder, PIXELS), "encode": encoder_steps(network.encoder, PIXELS)}
    return {
        f"{name} {width}x{height}": {
            "between_layers": map_bytes(steps, (height, width), 2),
            **{f"tile_{tile}": predicted_bytes(steps, (height, width), tile, 2) for tile in (256, 512)},
        }
        for name, steps in chains.items()
        for width, height in ((832, 480), (1920, 1080), (3840, 2160))
    }


def main(arguments: list[str] | None = None) -> int:
    options = frame.comfyui_parser(__doc__).parse_args(arguments)
    frame.enter(options.comfyui)
    sys.path.insert(1, str(frame.ROOT / "tests" / "comfy"))
    stock, small = importlib.import_module("nodes"), importlib.import_module("small_vaes")
    ours = importlib.import_module("steadyvsr.nodes.vae.nodes")
    table, missed = {}, []
    with torch.inference_mode():
        for kind in ("sd", "flux", "wan", "taesd"):
            pixels = picture(FRAMES if kind == "wan" else 1)
            vae = small.SMALL_VAES[kind]()
            norms = bool(SharedNorms(vae.first_stage_model).layers)
            for tile, overlap in TILES:
                found = case(stock, ours, vae, pixels, tile, overlap)
                if norms and (tile, overlap) == SWEEP_TILE:
                    for method, more in norm_case(vae, pixels).items():
                        found[method] |= more
                table[f"{kind} {tile}/{overlap}"] = found
                for method, results in found.items():
                    line = ", ".join(
                        f"{how} {item['psnr_db']:.2f} dB" + (f" shift {item['shift']:.5f}" if "shift" in item else "")
                        for how, item in results.items()
                    )
                    print(f"{kind} {tile}/{overlap} {method}: {line}", flush=True)
                    own, auto = results["stock"], results["auto"]
                    shifts = norms and auto.get("shift", 0) > SHIFT_LIMIT * own.get("shift", 1)
                    if auto["psnr_db"] < own["psnr_db"] or shifts:
                        missed.append(f"{kind} {tile}/{overlap} {method} is worse than ComfyUI's own")
    full = released()
    for name, found in full.items():
        sizes = ", ".join(f"{key} {size / frame.MIB:.0f} MiB" for key, size in found.items())
        print(f"SD's full width, {name}: {sizes}")
    place = {"place": f"ComfyUI {frame.version_of(options.comfyui)}"}
    size = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "block": BLOCK}
    return frame.finish(options.json, {**place, **size, "table": table, "released_bytes": full}, missed)


if __name__ == "__main__":
    sys.exit(main())
