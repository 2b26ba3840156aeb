"""The FlashVSR nodes: load a model, upscale an IMAGE batch in memory, upscale a VIDEO from file to file."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import comfy.model_management as mm
import torch
from comfy_api.v0_0_2 import Input, InputImpl, io

from ...models.flashvsr import StreamOptions
from ...models.flashvsr.attention import backend_choices
from ...models.flashvsr.checkpoint.parts import VERSIONS
from ...models.flashvsr.config import COLOURS, LQ_CACHE_ORDERS, PRECISIONS
from ...patches import hooks
from ...patches.kept import EJECTABLE, Key, registry
from ...patches.residency import patchers_of
from ...patches.versions import supported, unique_id
from ..sockets import ADVANCED, FlashVSRType, device_input, keep_loaded_input, report_output, with_report
from . import model_sets, prediction
from .memory import CLEAN, RunLimits
from .model import LoadedFlashVSR, load
from .run import Run, TempVideo, checked_frames, upscale_video, with_room
from .wan_decoder import StreamingWanVAE

CATEGORY = "SteadyVSR/FlashVSR"
LOAD, UPSCALE, UPSCALE_VIDEO = "Load FlashVSR", "FlashVSR Upscale", "FlashVSR Upscale Video"
ALIASES = ["flashvsr", "video upscale", "super resolution"]
SEED_MAX = 2**63 - 1


class LoadFlashVSR(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_LoadFlashVSR",
            display_name=LOAD,
            category=CATEGORY,
            description="Loads a FlashVSR model: a folder with its files, one merged file, or the embedded network. "
            "The weights stay in RAM until a run puts them on the device.",
            inputs=[
                io.Combo.Input(
                    "model_set",
                    options=model_sets.choices(),
                    default=model_sets.NANO,
                    tooltip="A folder or merged file in models/flashvsr, in any known layout (official, Kijai, "
                    "1038lab, Wan2GP). nano is a tiny network that comes with the pack: for trying things out, not for "
                    "quality.",
                ),
                io.Combo.Input(
                    "version",
                    options=["auto", *VERSIONS],
                    default="auto",
                    tooltip="auto recognises the weights by their fingerprint. v1 and v1.1 have the same shapes, and "
                    "the wrong choice makes ghosts: set it only for weights that auto does not know.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *PRECISIONS],
                    default="auto",
                    tooltip="Number format of weights and computation. auto: bf16 where the device is good at it, else "
                    "fp16; fp32 on the CPU.",
                ),
                device_input(["auto"], "Where to compute. auto is ComfyUI's own device."),
                io.Combo.Input(
                    "attention",
                    options=list(backend_choices()),
                    default="auto",
                    tooltip="How block-sparse attention is computed; the result is the same. auto takes the "
                    "fastest backend that passes a self-check on this device. It never becomes dense.",
                ),
                io.Combo.Input(
                    "lq_cache_order",
                    options=list(LQ_CACHE_ORDERS),
                    default=LQ_CACHE_ORDERS[0],
                    tooltip="For v1 weights. fixed: each clip of frames sees the end of the one before. as_trained: it "
                    "sees its own end instead, the order that the released v1 weights were trained with.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    optional=True,
                    tooltip="Fetches the official FlashVSR or FlashVSR-v1.1 into models/flashvsr if it is chosen and "
                    f"not there: {model_sets.OFFICIAL_GB} GB, resumed after a break, checked by sha256.",
                ),
                keep_loaded_input(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[FlashVSRType.Output("flashvsr", display_name="FLASHVSR", tooltip="For the upscale nodes.")],
            **supported(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def fingerprint_inputs(cls, model_set: str, **_: object) -> str:
        return model_sets.fingerprint(model_set)

    @classmethod
    def execute(
        cls,
        model_set: str,
        version: str,
        precision: str,
        device: str,
        attention: str,
        lq_cache_order: str,
        download: bool = False,
        keep_loaded: str = EJECTABLE,
    ) -> io.NodeOutput:
        path = model_sets.resolve(model_set, download, LOAD, unique_id(cls))
        options = {
            "version": version, "precision": precision, "device": device, "lq_cache_order": lq_cache_order,
        }  # fmt: skip
        hooks.install()  # again: a pack imported after this one may have replaced them
        model = registry().obtain(
            Key.of("flashvsr", model_sets.files_of(path), options),
            keep_loaded,
            lambda: load(model_set, path, version, precision, device, attention, lq_cache_order),
            patchers_of,
            model_set,
        )
        prediction.remember(model_set, model)
        # The attention backend belongs to the run, not to the weights.
        return io.NodeOutput(model if model.attention == attention else replace(model, attention=attention))


def upscale_schema(node_id: str, name: str, description: str, source: io.Input, result: io.Output) -> io.Schema:
    """What the two upscale nodes have in common."""
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=CATEGORY,
        description=description,
        inputs=[
            FlashVSRType.Input("flashvsr", tooltip="From Load FlashVSR."),
            source,
            io.Float.Input(
                "scale",
                default=4.0,
                min=1.0,
                max=8.0,
                step=0.05,
                tooltip="Output size over input size: each side is round(side × scale). The model was trained for 4.",
            ),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=SEED_MAX,
                control_after_generate=True,
                tooltip="Seed of the latent noise. The same seed gives the same frames on every device, up to "
                "rounding.",
            ),
            io.Float.Input(
                "sparse_ratio",
                default=2.0,
                min=0.5,
                max=8.0,
                step=0.1,
                tooltip="How much each block of the picture attends to, in units of 60 blocks: 1.5 is faster, "
                "2 steadier.",
                **ADVANCED,
            ),
            io.Float.Input(
                "kv_ratio",
                default=3.0,
                min=2.0,
                max=16.0,
                step=1.0,
                tooltip="How far the model looks back, in steps of 8 frames. Memory grows with it.",
                **ADVANCED,
            ),
            io.Int.Input(
                "local_range",
                default=11,
                min=1,
                max=31,
                step=2,
                tooltip="Side of the neighbourhood that a block may attend to, in blocks of 128 pixels: 9 is sharper, "
                "11 steadier.",
                **ADVANCED,
            ),
            io.Combo.Input(
                "colour",
                options=list(COLOURS),
                default=COLOURS[0],
                tooltip="Takes the colours from the input. adain: mean and contrast of each frame; wavelet: the coarse "
                "layers; none: as the network makes them.",
            ),
            io.Combo.Input(
                "decoder",
                options=["tc", "vae"],
                default="tc",
                tooltip="tc: the small decoder that comes with the model. vae: the Wan 2.1 VAE connected to vae; "
                "slower.",
            ),
            io.Vae.Input("vae", optional=True, tooltip="A Wan 2.1 VAE; read only with decoder vae."),
            io.Float.Input(
                "budget_gb",
                default=0.0,
                min=0.0,
                max=1024.0,
                step=0.5,
                optional=True,
                tooltip="GiB that the run may take on the device, its weights included: the first plan predicted to "
                "fit is taken, tiles last. 0: what is free. Too little for every plan is an error before the run.",
                **ADVANCED,
            ),
            io.Int.Input(
                "tile",
                default=0,
                min=0,
                max=4096,
                step=128,
                optional=True,
                tooltip="Side of spatial tiles in output pixels, at least 256. 0: whole frames; tiles only as the last "
                "resort where memory runs out. Tiles need less memory and show at their borders.",
                **ADVANCED,
            ),
            io.Combo.Input(
                "clean",
                options=list(CLEAN),
                default=CLEAN[0],
                optional=True,
                tooltip="When to give back memory that torch keeps for reuse, between two steps of 8 frames. "
                "pressure: only on a card that is nearly full; never; every step: slower, for a card shared with other "
                "programs.",
                **ADVANCED,
            ),
            io.Boolean.Input(
                "log_steps",
                default=False,
                optional=True,
                tooltip="One line about memory in the log for each step of 8 frames. The report always holds the "
                "summary.",
                **ADVANCED,
            ),
        ],
        outputs=[result, report_output("What was done and measured, as JSON.")],
        hidden=[io.Hidden.unique_id],
        **supported(io.Schema, search_aliases=ALIASES),
    )


def chosen_decoder(decoder: str, vae: object, node: str) -> StreamingWanVAE | None:
    """What replaces the model's own decoder; None for tc.

    Raises:
        ValueError: no Wan 2.1 VAE for the decoder vae.
    """
    if decoder == "tc":
        return None
    if vae is None:
        raise ValueError(f"{node}: expected a Wan 2.1 VAE on vae for the decoder vae; got none. Connect Load VAE.")
    return StreamingWanVAE(vae, node)


class Upscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return upscale_schema(
            "SteadyVSR_Upscale",
            UPSCALE,
            "Upscales a batch of frames with FlashVSR: every frame comes back, at exactly size × scale. "
            "Memory beside the input and output batches does not depend on the number of frames.",
            io.Image.Input("image", tooltip="The frames of one clip, in order. An alpha channel is dropped."),
            io.Image.Output("upscaled_image", display_name="IMAGE", tooltip="As many frames as went in."),
        )

    @classmethod
    def execute(
        cls,
        flashvsr: LoadedFlashVSR,
        image: Input.Image,
        scale: float,
        seed: int,
        sparse_ratio: float,
        kv_ratio: float,
        local_range: int,
        colour: str,
        decoder: str,
        vae: object = None,
        budget_gb: float = 0.0,
        tile: int = 0,
        clean: str = CLEAN[0],
        log_steps: bool = False,
    ) -> io.NodeOutput:
        count, height, width, channels = image.shape
        if count == 0:
            raise ValueError(f"{UPSCALE}: expected at least 1 frame; got an empty batch. Check the node before it.")
        if channels not in (1, 3, 4):
            raise ValueError(f"{UPSCALE}: expected 1, 3 or 4 channels; got {channels}. Convert the image to RGB.")
        options = StreamOptions(
            scale=scale, seed=seed, sparse_ratio=sparse_ratio, kv_ratio=kv_ratio, local_range=local_range,
            colour=colour, attention=flashvsr.attention,
        )  # fmt: skip
        limits = RunLimits(budget_gb, tile, clean, log_steps)
        run = Run(UPSCALE, flashvsr, options, chosen_decoder(decoder, vae, UPSCALE), unique_id(cls), limits)
        if channels == 4:
            run.note("The alpha channel was dropped.")
        elif channels == 1:
            run.note("The greyscale frames were taken as RGB.")
        out_width, out_height = run.output_size(width, height)
        shape, device = (count, out_height, out_width, 3), mm.intermediate_device()
        upscaled = with_room(UPSCALE, f"{count} frames of the result", lambda: torch.empty(shape, device=device))
        with closing(run.upscale(checked_frames(image, UPSCALE), width, height, count)) as frames:
            for index, frame in enumerate(frames):
                upscaled[index] = frame
        return with_report(upscaled, report=run.report)


class UpscaleVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return upscale_schema(
            "SteadyVSR_UpscaleVideo",
            UPSCALE_VIDEO,
            "Upscales a video of any length from file to file with FlashVSR: every frame, at exactly "
            "size × scale, sound and timing kept. Only a window of frames is in memory.",
            io.Video.Input("video", tooltip="The clip. A file is streamed, never loaded whole."),
            io.Video.Output(
                "upscaled_video", display_name="VIDEO", tooltip="A file in the temp folder: see Save Video."
            ),
        )

    @classmethod
    def execute(
        cls,
        flashvsr: LoadedFlashVSR,
        video: Input.Video,
        scale: float,
        seed: int,
        sparse_ratio: float,
        kv_ratio: float,
        local_range: int,
        colour: str,
        decoder: str,
        vae: object = None,
        budget_gb: float = 0.0,
        tile: int = 0,
        clean: str = CLEAN[0],
        log_steps: bool = False,
    ) -> io.NodeOutput:
        options = StreamOptions(
            scale=scale, seed=seed, sparse_ratio=sparse_ratio, kv_ratio=kv_ratio, local_range=local_range,
            colour=colour, attention=flashvsr.attention,
        )  # fmt: skip
        limits = RunLimits(budget_gb, tile, clean, log_steps)
        run = Run(UPSCALE_VIDEO, flashvsr, options, chosen_decoder(decoder, vae, UPSCALE_VIDEO), unique_id(cls), limits)
        upscaled = InputImpl.VideoFromFile(TempVideo(upscale_video(run, video)))
        return with_report(upscaled, report=run.report)
