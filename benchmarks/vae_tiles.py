"""Tiled VAE nodes beside ComfyUI's own: PSNR and colour shift against the whole frame, on small random VAEs.

    python -m steadyvsr.benchmarks.vae_tiles --comfyui PATH [--json FILE]        by ComfyUI's Python

Exit status 1 where the default is worse than ComfyUI's own node, or shifts the colours of a VAE with GroupNorm by more
than 0.3 of what that does.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from steadyvsr.benchmarks import frame
from steadyvsr.models.image_vae import decoder_steps, encoder_steps, map_bytes, predicted_bytes
from torch import Tensor, nn

HEIGHT, WIDTH, FRAMES = 384, 512, 5
TILES = ((256, 64), (128, 32))
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
            norms = any(isinstance(layer, nn.GroupNorm) for layer in vae.first_stage_model.modules())
            for tile, overlap in TILES:
                found = case(stock, ours, vae, pixels, tile, overlap)
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
