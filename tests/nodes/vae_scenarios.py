"""The tiled VAE nodes on small random VAEs, beside the network on the whole frame."""

from __future__ import annotations

import itertools
import types
from typing import Any

import small_vaes
import torch
from host import call as run
from host import error_of, events_of, mm, report_of

KINDS = ("wan", "sd")
OPTIONS = {"tile_size": 64, "overlap": 16, "mode": "auto", "memory_budget_gb": 2.0, "on_oom": "shrink"}


def encode(vae: Any, pixels: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, dict]:
    value, report = report_of(run("VAEEncodeTiled", pixels=pixels, vae=vae, **{**OPTIONS, **changes}))
    return value["samples"], report


def decode(vae: Any, latents: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, dict]:
    return report_of(run("VAEDecodeTiled", samples={"samples": latents}, vae=vae, **{**OPTIONS, **changes}))


def image(count: int, height: int, width: int) -> torch.Tensor:
    """BHWC."""
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(height))


def latents_of(kind: str, frames: int = 2, height: int = 12, width: int = 17) -> torch.Tensor:
    shape = (1, 16, frames) if kind == "wan" else (1, 4)
    return torch.randn(*shape, height, width, generator=torch.Generator().manual_seed(height))


def apart(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result - wanted).norm() / wanted.norm()) if result.shape == wanted.shape else float("inf")


def whole(kind: str) -> dict:
    """Both ways and both modes, beside the network's own result."""
    vae = small_vaes.SMALL_VAES[kind]()
    pixels, latents = image(5 if kind == "wan" else 2, 96, 136), latents_of(kind)
    source = pixels.movedim(-1, 1)
    source = source.movedim(1, 0).unsqueeze(0) if kind == "wan" else source
    with torch.inference_mode():
        wanted = {
            "encode": vae.first_stage_model.encode(source * 2 - 1),
            "decode": vae.process_output(vae.first_stage_model.decode(latents)).movedim(1, -1),
        }
    wanted["decode"] = wanted["decode"].reshape(-1, *wanted["decode"].shape[-3:])
    found = {}
    for method, node, value in (("encode", encode, pixels), ("decode", decode, latents)):
        for mode in ("auto", "blend"):
            result, report = node(vae, value, mode=mode)
            found[f"{method} {mode}"] = {
                "shape": list(result.shape), "error": apart(result, wanted[method]), "mode": report["mode"],
                "tiles": report["units"], "why": report["mode_reason"], "attempts": report["attempts"],
                "memory": sorted(report["memory"]),
            }  # fmt: skip
    return found


def refused() -> dict:
    sd, wan = small_vaes.sd_vae(), small_vaes.wan_vae()
    latents, pixels = latents_of("sd"), image(1, 64, 64)
    empty = small_vaes.sd_vae()
    empty.first_stage_model = None
    return {
        "channels": error_of(decode, sd, torch.rand(1, 16, 8, 8)),
        "no weights": error_of(encode, empty, pixels),
        "empty batch": error_of(encode, sd, pixels[:0]),
        "grey": error_of(encode, sd, pixels[..., :1]),
        "too small": error_of(encode, sd, image(1, 7, 64)),
        "video in image VAE": error_of(encode, sd, torch.rand(1, 5, 64, 64, 3)),
        "negative overlap": error_of(decode, sd, latents, overlap=-8),
        "small tile": error_of(decode, sd, latents, tile_size=32),
        "mode": error_of(decode, wan, latents_of("wan"), mode="fast"),
        "nan": error_of(encode, sd, pixels * float("nan"), mode="blend"),
    }  # fmt: skip


def out_of_memory(kind: str) -> dict:
    """A layer runs out of memory at its first or second call, then at every one."""
    vae, latents = small_vaes.SMALL_VAES[kind](), latents_of(kind)
    expected, _ = decode(vae, latents, tile_size=96)
    decoder, found = vae.first_stage_model.decoder, {}
    layer = decoder.middle[1].to_qkv if kind == "wan" else decoder.conv_out
    for name, failing in (("first", {0}), ("second", {1}), ("all", set(range(100)))):
        calls = itertools.count()

        def short(*_: Any, calls: Any = calls, failing: set[int] = failing) -> None:
            if next(calls) in failing:
                raise mm.OOM_EXCEPTION("planted")

        handle = layer.register_forward_pre_hook(short)
        try:
            if name == "all":
                found[name] = error_of(decode, vae, latents, tile_size=96)
            else:
                result, report = decode(vae, latents, tile_size=96)
                tried = [attempt["tried"] for attempt in report["attempts"]]
                found[name] = {"apart": apart(result, expected), "tried": tried}
        finally:
            handle.remove()
    return found


def weights_do_not_fit(kind: str) -> dict:
    """Until the other model on the device is gone; then at all."""
    vae, latents = small_vaes.SMALL_VAES[kind](), latents_of(kind)
    expected, _ = decode(vae, latents)
    other = small_vaes.SMALL_VAES[kind]()
    mm.unload_all_models()
    mm.load_models_gpu([other.patcher])
    load, found = vae.patcher.partially_load, {}

    def short(*arguments: Any, **keywords: Any) -> Any:
        if any(loaded.model is other.patcher for loaded in mm.current_loaded_models) or "beside" in found:
            raise mm.OOM_EXCEPTION("planted")
        return load(*arguments, **keywords)

    vae.patcher.partially_load = short
    result, report = decode(vae, latents)
    tried = [attempt["tried"] for attempt in report["attempts"]]
    found["beside"] = {"apart": apart(result, expected), "tried": tried, "mode": report["mode"]}
    for mode in ("auto", "exact"):
        mm.unload_all_models()
        found[mode] = error_of(decode, vae, latents, mode=mode)
    found["stopped"] = error_of(decode, vae, latents, on_oom="error")
    return found


def told() -> dict:
    vae, latents = small_vaes.sd_vae(), latents_of("sd")
    sent = events_of(lambda: decode(vae, latents), "steadyvsr.node")
    return {"nodes": sorted({data["node"] for data in sent}), "memory": sorted(sent[-1]["memory"])}


def delegated() -> dict:
    """An object of another pack, which has no network to look into."""
    foreign = types.SimpleNamespace(encode=lambda pixels: pixels.movedim(-1, 1), decode=lambda z: z.movedim(1, -1))
    pixels, report = decode(foreign, torch.rand(1, 3, 8, 8))
    return {
        "shape": list(pixels.shape),
        "mode": report["mode"],
        "exact": error_of(decode, foreign, pixels, mode="exact"),
    }


SCENARIOS = {
    **{f"whole {kind}": (lambda kind=kind: whole(kind)) for kind in KINDS},
    **{f"out of memory {kind}": (lambda kind=kind: out_of_memory(kind)) for kind in KINDS},
    **{f"weights do not fit {kind}": (lambda kind=kind: weights_do_not_fit(kind)) for kind in KINDS},
    "refused": refused, "told": told, "delegated": delegated,
}  # fmt: skip
