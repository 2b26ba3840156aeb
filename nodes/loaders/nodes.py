"""The loader nodes: ComfyUI's own loaders, with an owner for what is to be kept and a measured end off the device."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths
from comfy_api.v0_0_2 import io

import nodes

from ...patches.kept import EJECTABLE, Key
from ...patches.residency import patchers_of
from ...patches.versions import supported, unique_id
from ..flashvsr.nodes import keep_loaded_input
from . import weight_bytes as weights
from .loading import (
    CATEGORY,
    CPU,
    DEFAULT,
    Loading,
    choose_place,
    clone_of,
    device_inputs,
    file_in,
    fingerprint,
    offload_input,
    put,
    report_output,
)

comfyui_nodes: Any = nodes
"""ComfyUI's own module: this package is never on `sys.path`, where its `nodes` would be found first."""

MODEL_NODE, CLIP_NODE = "Load Diffusion Model (Verified)", "Load CLIP (Verified)"
VAE_NODE, CHECKPOINT_NODE = "Load VAE (Verified)", "Load Checkpoint (Verified)"
NONE = "none"
CLIP_FILES = 4


class LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_LoadDiffusionModel",
            display_name=MODEL_NODE,
            category=CATEGORY,
            description="Loads a diffusion model like Load Diffusion Model. It can be kept through the free-memory "
            "buttons, and it ends off its device, by measurement.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file of models/diffusion_models.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=comfyui_nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0],
                    tooltip="Number format of the weights. default: as ComfyUI chooses for the device.",
                ),
                keep_loaded_input(),
                offload_input(),
                *device_inputs(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", display_name="MODEL", tooltip="The model."), report_output()],
            **supported(io.Schema, search_aliases=["load unet", "keep loaded"]),
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: object) -> str:
        return fingerprint("diffusion_models", [unet_name])

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        keep_loaded: str = EJECTABLE,
        offload_after_load: bool = True,
        device: str = DEFAULT,
        allow_cpu: bool = False,
    ) -> io.NodeOutput:
        path = file_in("diffusion_models", unet_name, MODEL_NODE)

        def key_of(where: str) -> Key:
            return Key.of("diffusion model", [path], {"weight_dtype": weight_dtype, "device": where})

        needed = weights.of_diffusion_model([path], weight_dtype)
        place = choose_place(device, allow_cpu, key_of, needed, MODEL_NODE)

        def load() -> Any:
            (model,) = comfyui_nodes.UNETLoader().load_unet(unet_name, weight_dtype)
            return put(model, place.device)

        loading = Loading(MODEL_NODE, unique_id(cls), unet_name)
        model = clone_of(loading.obtain(key_of(place.option), keep_loaded, load, patchers_of, place, needed))
        if offload_after_load:
            loading.offload([model])
        return loading.output(model)


class LoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="SteadyVSR_LoadCLIP",
            display_name=CLIP_NODE,
            category=CATEGORY,
            description="Loads a text encoder from one to four files, like Load CLIP, DualCLIPLoader and their kin. It "
            "can be kept through the free-memory buttons, and it ends off its device, by measurement.",
            inputs=[
                io.Combo.Input("clip_name1", options=files, tooltip="The first or only file of models/text_encoders."),
                io.Combo.Input(
                    "type",
                    options=clip_types(),
                    tooltip="What the text encoder is for. It decides how its outputs are put together.",
                ),
                *(
                    io.Combo.Input(
                        f"clip_name{number}",
                        options=[NONE, *files],
                        default=NONE,
                        optional=True,
                        tooltip="Another file, for models with several text encoders; none: no further one.",
                    )
                    for number in range(2, CLIP_FILES + 1)
                ),
                keep_loaded_input(),
                offload_input(),
                *device_inputs(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder."), report_output()],
            **supported(io.Schema, search_aliases=["dual clip", "text encoder", "keep loaded"]),
        )

    @classmethod
    def fingerprint_inputs(
        cls, clip_name1: str, clip_name2: str = NONE, clip_name3: str = NONE, clip_name4: str = NONE, **_: object
    ) -> str:
        return fingerprint("text_encoders", chosen(clip_name1, clip_name2, clip_name3, clip_name4))

    @classmethod
    def execute(
        cls,
        clip_name1: str,
        type: str,
        clip_name2: str = NONE,
        clip_name3: str = NONE,
        clip_name4: str = NONE,
        keep_loaded: str = EJECTABLE,
        offload_after_load: bool = True,
        device: str = DEFAULT,
        allow_cpu: bool = False,
    ) -> io.NodeOutput:
        names = chosen(clip_name1, clip_name2, clip_name3, clip_name4)
        paths = [file_in("text_encoders", name, CLIP_NODE) for name in names]

        def key_of(where: str) -> Key:
            return Key.of("clip", paths, {"type": type, "device": where})

        needed = weights.of_text_encoder(paths)
        place = choose_place(device, allow_cpu, key_of, needed, CLIP_NODE)
        options: dict[str, Any] = {}
        if place.device is not None:
            options = {"load_device": place.device, "offload_device": CPU}

        def load() -> Any:
            clip_type = getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
            folders = folder_paths.get_folder_paths("embeddings")
            return comfy.sd.load_clip(
                ckpt_paths=paths, embedding_directory=folders, clip_type=clip_type, model_options=options
            )

        loading = Loading(CLIP_NODE, unique_id(cls), " + ".join(names))
        clip = clone_of(loading.obtain(key_of(place.option), keep_loaded, load, patchers_of, place, needed))
        if offload_after_load:
            loading.offload([clip])
        return loading.output(clip)


def clip_types() -> list[str]:
    """Every type that ComfyUI's own loaders of one and of two files know."""
    stock = (comfyui_nodes.CLIPLoader, comfyui_nodes.DualCLIPLoader)
    return list(dict.fromkeys(name for node in stock for name in node.INPUT_TYPES()["required"]["type"][0]))


def chosen(*names: str | None) -> list[str]:
    return [name for name in names if name not in (None, NONE)]


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_LoadVAE",
            display_name=VAE_NODE,
            category=CATEGORY,
            description="Loads a VAE like Load VAE. It can be kept through the free-memory buttons, and it ends off "
            "its device, by measurement.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=comfyui_nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0],
                    tooltip="A file of models/vae, or a pair of small files of models/vae_approx.",
                ),
                keep_loaded_input(),
                offload_input(),
                *device_inputs(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Vae.Output("vae", display_name="VAE", tooltip="The VAE."), report_output()],
            **supported(io.Schema, search_aliases=["keep loaded"]),
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, **_: object) -> str:
        return fingerprint("vae", [vae_name]) + fingerprint("vae_approx", small_files(vae_name))

    @classmethod
    def execute(
        cls,
        vae_name: str,
        keep_loaded: str = EJECTABLE,
        offload_after_load: bool = True,
        device: str = DEFAULT,
        allow_cpu: bool = False,
    ) -> io.NodeOutput:
        small = small_files(vae_name)
        paths = [file_in("vae_approx", name, VAE_NODE) for name in small]
        if not small and vae_name != "pixel_space":
            paths = [file_in("vae", vae_name, VAE_NODE)]

        def key_of(where: str) -> Key:
            return Key.of("vae", paths, {"name": vae_name, "device": where})

        needed = weights.of_vae(paths)
        place = choose_place(device, allow_cpu, key_of, needed, VAE_NODE)

        def load() -> Any:
            (vae,) = comfyui_nodes.VAELoader().load_vae(vae_name)
            return put_vae(vae, place.device)

        loading = Loading(VAE_NODE, unique_id(cls), vae_name)
        vae = loading.obtain(key_of(place.option), keep_loaded, load, patchers_of, place, needed)
        if offload_after_load:
            loading.offload([vae])
        return loading.output(vae)


def small_files(name: str) -> list[str]:
    """Files of models/vae_approx that ComfyUI puts together under a name such as taesd, or the file of that name."""
    if folder_paths.get_full_path("vae", name) is not None:
        return []
    starts = (f"{name}_encoder.", f"{name}_decoder.")
    return [file for file in folder_paths.get_filename_list("vae_approx") if file == name or file.startswith(starts)]


def put_vae(vae: Any, device: Any) -> Any:
    vae.patcher = put(vae.patcher, device)
    # A VAE sends its inputs to this device by itself.
    vae.device = vae.patcher.load_device
    return vae


class LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_LoadCheckpoint",
            display_name=CHECKPOINT_NODE,
            category=CATEGORY,
            description="Loads model, text encoder and VAE of one file like Load Checkpoint. They can be kept through "
            "the free-memory buttons, and they end off their device, by measurement.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A file of models/checkpoints.",
                ),
                keep_loaded_input(),
                offload_input(),
                *device_inputs(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output("model", display_name="MODEL", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder, where the file has one."),
                io.Vae.Output("vae", display_name="VAE", tooltip="The VAE, where the file has one."),
                report_output(),
            ],
            **supported(io.Schema, search_aliases=["keep loaded"]),
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **_: object) -> str:
        return fingerprint("checkpoints", [ckpt_name])

    @classmethod
    def execute(
        cls,
        ckpt_name: str,
        keep_loaded: str = EJECTABLE,
        offload_after_load: bool = True,
        device: str = DEFAULT,
        allow_cpu: bool = False,
    ) -> io.NodeOutput:
        path = file_in("checkpoints", ckpt_name, CHECKPOINT_NODE)

        def key_of(where: str) -> Key:
            return Key.of("checkpoint", [path], {"device": where})

        needed = weights.of_checkpoint(path)
        place = choose_place(device, allow_cpu, key_of, needed, CHECKPOINT_NODE)

        def load() -> tuple[Any, Any, Any]:
            model, clip, vae = comfyui_nodes.CheckpointLoaderSimple().load_checkpoint(ckpt_name)
            if clip is not None:
                clip.patcher = put(clip.patcher, place.device)
            return put(model, place.device), clip, vae and put_vae(vae, place.device)

        loading = Loading(CHECKPOINT_NODE, unique_id(cls), ckpt_name)
        parts = loading.obtain(key_of(place.option), keep_loaded, load, patchers_in, place, needed)
        model, clip, vae = (part and clone_of(part) for part in parts)
        if offload_after_load:
            loading.offload(present(parts))
        return loading.output(model, clip, vae)


def present(parts: tuple[Any, ...]) -> list[Any]:
    return [part for part in parts if part is not None]


def patchers_in(parts: tuple[Any, ...]) -> list[Any]:
    return [patcher for part in present(parts) for patcher in patchers_of(part)]
