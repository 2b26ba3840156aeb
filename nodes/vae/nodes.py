"""Tiled VAE encode and decode in place of ComfyUI's own nodes: exact where the network is known, always measured."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ...patches.versions import supported, unique_id
from ..sockets import ADVANCED, allow_cpu_input, report_output, with_report
from .layout import CROP, PAD, checked_vae, compression, image_output, latent_output, latents_for, pixels_for
from .run import AUTO, BLEND, ERROR, EXACT, MAX_TILE, OFF, SHRINK, SPOT, TiledRun, TileOptions

CATEGORY = "SteadyVSR/VAE"
ENCODE, DECODE = "VAE Encode (Tiled, Verified)", "VAE Decode (Tiled, Verified)"
BUDGET_GB = 2.0
DELEGATED_TILE = 256
STOCK_MAX = 4096
"""As in ComfyUI's own tiled nodes: values of their workflows stay valid."""


def tiled_schema(
    node_id: str, name: str, alias: str, does: str, inputs: list[io.Input], more: list[io.Input], result: io.Output
) -> io.Schema:
    """What the two nodes have in common.

    Args:
        does: the first words of the description.
        inputs, more: inputs before and after the shared ones.
    """
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=CATEGORY,
        description=f"{does} tile by tile and reports the memory that took. For Wan 2.1, SD and Flux VAEs the result "
        "equals that of the whole frame. Time is never split.",
        inputs=[
            *inputs,
            io.Int.Input(
                "tile_size",
                default=256,
                min=0,
                max=STOCK_MAX,
                step=32,
                tooltip="Side of a tile in pixels, at least 64; above 512 is lowered to 512. 0: the largest that fits "
                "by prediction, corrected by what the first tile was measured to take.",
            ),
            io.Int.Input(
                "overlap",
                default=64,
                min=0,
                max=STOCK_MAX,
                step=8,
                tooltip="Pixels that neighbouring tiles share, where they are blended; at most half a tile. The exact "
                "path needs none.",
            ),
            io.Combo.Input(
                "mode",
                options=[AUTO, EXACT, BLEND],
                default=AUTO,
                optional=True,
                tooltip="exact: the result of the whole frame, tile by tile, for Wan 2.1 VAEs and image VAEs like "
                "those of SD, SDXL, SD3 and Flux. blend: overlapping tiles of any VAE. auto: exact where the VAE's "
                "layers are known and a trial comes out the same, else blend.",
            ),
            io.Float.Input(
                "memory_budget_gb",
                default=BUDGET_GB,
                min=0.0,
                max=1024.0,
                step=0.1,
                optional=True,
                tooltip="GiB on the device that the VAE's weights and tiles may take together; the report says whether "
                "they did. 0: what is free.",
            ),
            io.Combo.Input(
                "on_oom",
                options=[SHRINK, ERROR],
                default=SHRINK,
                optional=True,
                tooltip="When memory runs out. shrink: other models leave the device, then smaller tiles, then a "
                "smaller number format. error: stop at once.",
                **ADVANCED,
            ),
            allow_cpu_input("With on_oom shrink: compute on the CPU when nothing else helped. Slow."),
            io.Combo.Input(
                "verify",
                options=[SPOT, OFF],
                default=SPOT,
                optional=True,
                tooltip="spot: one more tile is computed across the seams of blended tiles, and the report says how "
                "far the result is from it, in dB. off: no check.",
                **ADVANCED,
            ),
            *more,
        ],
        hidden=[io.Hidden.unique_id],
        outputs=[result, report_output("What was done, tried and measured, as JSON; bytes with their sources.")],
        **supported(io.Schema, search_aliases=[alias, "tiled vae", "exact vae"]),
    )


class VAEEncodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pixels = "Images; for a video VAE the frames of one clip, trimmed to what it can encode."
        odd_size = io.Combo.Input(
            "odd_size",
            options=[CROP, PAD],
            default=CROP,
            optional=True,
            tooltip="For sizes that the VAE cannot divide. crop: cut around the centre, as ComfyUI does. pad: continue "
            "the image at its right and lower edges.",
            **ADVANCED,
        )
        return tiled_schema(
            "SteadyVSR_VAEEncodeTiled",
            ENCODE,
            "vae encode tiled",
            "Encodes images or frames",
            [io.Image.Input("pixels", tooltip=pixels), io.Vae.Input("vae", tooltip="A VAE for images or video.")],
            [odd_size],
            io.Latent.Output("latent", display_name="LATENT", tooltip="The latents, as VAE Encode gives them."),
        )

    @classmethod
    def execute(
        cls,
        pixels: Tensor,
        vae: Any,
        tile_size: int,
        overlap: int,
        mode: str = AUTO,
        memory_budget_gb: float = BUDGET_GB,
        on_oom: str = SHRINK,
        allow_cpu: bool = False,
        verify: str = SPOT,
        odd_size: str = CROP,
    ) -> io.NodeOutput:
        options = TileOptions(tile_size, overlap, mode, memory_budget_gb, on_oom, allow_cpu, verify).checked(ENCODE)
        if checked_vae(vae, ENCODE):
            source, notes = pixels_for(vae, pixels, odd_size, ENCODE)
            run = TiledRun(ENCODE, vae, True, options, unique_id(cls), notes)
            latents, report = latent_output(vae, run.run(source)), run.report()
        else:
            latents, report = _delegated(vae, options, ENCODE, pixels)
        return with_report({"samples": latents}, report=report)


class VAEDecodeTiled(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return tiled_schema(
            "SteadyVSR_VAEDecodeTiled",
            DECODE,
            "vae decode tiled",
            "Decodes latents",
            [
                io.Latent.Input("samples", tooltip="The latents of images or of a video."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the latents' model."),
            ],
            [],
            io.Image.Output("image", display_name="IMAGE", tooltip="The images or frames, as VAE Decode gives them."),
        )

    @classmethod
    def execute(
        cls,
        samples: dict[str, Any],
        vae: Any,
        tile_size: int,
        overlap: int,
        mode: str = AUTO,
        memory_budget_gb: float = BUDGET_GB,
        on_oom: str = SHRINK,
        allow_cpu: bool = False,
        verify: str = SPOT,
    ) -> io.NodeOutput:
        options = TileOptions(tile_size, overlap, mode, memory_budget_gb, on_oom, allow_cpu, verify).checked(DECODE)
        if checked_vae(vae, DECODE):
            source, notes = latents_for(vae, samples, DECODE)
            run = TiledRun(DECODE, vae, False, options, unique_id(cls), notes)
            images, report = image_output(vae, run.run(source)), run.report()
        else:
            images, report = _delegated(vae, options, DECODE, samples["samples"])
            images = images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
        return with_report(images, report=report)


def _delegated(vae: Any, options: TileOptions, node: str, value: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The result and the report of a VAE that tiles by itself or whose insides are unknown.

    Raises:
        ValueError: an empty batch, mode exact, or a VAE without such a method.
    """
    encodes = node == ENCODE
    method = "encode" if encodes else "decode"
    if 0 in value.shape:
        raise ValueError(f"{node}: expected at least 1 image or latent; got shape {tuple(value.shape)}.")
    if options.mode == EXACT:
        raise ValueError(
            f"{node}: expected a VAE with an exact path for mode exact; got one that tiles by itself. Choose auto."
        )
    tile = min(options.tile, MAX_TILE) or DELEGATED_TILE
    overlap = min(options.overlap, tile // 2)
    ratio = getattr(vae, "downscale_ratio" if encodes else "upscale_ratio", 8)
    unit = 1 if encodes else compression(ratio)
    notes = [f"tile_size {options.tile} was lowered to {tile}."] if tile < options.tile else []
    notes += [f"overlap {options.overlap} was lowered to {overlap}."] if overlap < options.overlap else []
    tiled = getattr(vae, f"{method}_tiled", None)
    if tiled is not None:
        side = max(2, tile // unit)
        result = tiled(value, tile_x=side, tile_y=side, overlap=min(overlap // unit, side // 2))
    elif hasattr(vae, method):
        notes.append("It was called as a whole: this VAE object has no tiled method and no network that is known here.")
        result = getattr(vae, method)(value)
    else:
        raise ValueError(f"{node}: expected a VAE; got {type(vae).__name__}, which has no {method}.")
    report = {
        "node": node,
        "vae": type(getattr(vae, "first_stage_model", vae)).__name__,
        "mode": "its own tiling" if tiled is not None else "whole",
        "tile_size": tile,
        "overlap": overlap,
        "result_shape": list(result.shape),
        "verified": False,
        "verified_reason": "not measured: the VAE was called as a whole",
        "notes": notes,
    }
    return result, report
