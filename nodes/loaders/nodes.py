"""The loader nodes: ComfyUI's own loaders, with an owner for kept models and a measured offload at the end."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy_api.v0_0_2 import io

import nodes

from ...patches.kept import EJECTABLE
from . import weight_bytes
from .loading import (
    CPU,
    DEFAULT,
    Loading,
    ModelFiles,
    file_in,
    file_input,
    fingerprint,
    loader_schema,
    patchers_in,
    put,
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
        return loader_schema(
            "SteadyVSR_LoadDiffusionModel",
            MODEL_NODE,
            "Loads a diffusion model like Load Diffusion Model. It can outlive the free-memory buttons, and it is left "
            "off its device, verified by measurement.",
            [
                file_input("unet_name", "diffusion_models"),
                io.Combo.Input(
                    "weight_dtype",
                    options=comfyui_nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0],
                    tooltip="Number format of the weights. default: as ComfyUI chooses for the device.",
                ),
            ],
            [io.Model.Output("model", display_name="MODEL", tooltip="The model.")],
            ["load unet", "keep loaded"],
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
        paths = [file_in("diffusion_models", unet_name, MODEL_NODE)]

        def load(place: torch.device | None) -> Any:
            (model,) = comfyui_nodes.UNETLoader().load_unet(unet_name, weight_dtype)
            return put(model, place)

        loading = Loading(cls, MODEL_NODE, unet_name, keep_loaded, offload_after_load, device, allow_cpu)
        files = ModelFiles(
            "diffusion model",
            paths,
            {"weight_dtype": weight_dtype},
            weight_bytes.total(paths, lambda tensors: weight_bytes.diffusion_model(tensors, weight_dtype)),
        )
        return loading.hand_out(loading.obtain(files, load))


class LoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return loader_schema(
            "SteadyVSR_LoadCLIP",
            CLIP_NODE,
            "Loads a text encoder from one to four files, like Load CLIP, DualCLIPLoader and their kin. It can "
            "outlive the free-memory buttons, and it is left off its device, verified by measurement.",
            [
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
                        tooltip="Another file, for models with several text encoders; none: no other file.",
                    )
                    for number in range(2, CLIP_FILES + 1)
                ),
            ],
            [io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder.")],
            ["dual clip", "text encoder", "keep loaded"],
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

        def load(place: torch.device | None) -> Any:
            return comfy.sd.load_clip(
                ckpt_paths=paths,
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                # As in CLIPLoader: a type that this version does not know is read like SD's.
                clip_type=getattr(comfy.sd.CLIPType, type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION),
                model_options={} if place is None else {"load_device": place, "offload_device": CPU},
            )

        loading = Loading(cls, CLIP_NODE, " + ".join(names), keep_loaded, offload_after_load, device, allow_cpu)
        files = ModelFiles("clip", paths, {"type": type}, weight_bytes.total(paths, weight_bytes.text_encoder))
        return loading.hand_out(loading.obtain(files, load))


def clip_types() -> list[str]:
    """Every type that ComfyUI's own loaders of one and of two files know."""
    stock = (comfyui_nodes.CLIPLoader, comfyui_nodes.DualCLIPLoader)
    return list(dict.fromkeys(name for node in stock for name in node.INPUT_TYPES()["required"]["type"][0]))


def chosen(*names: str | None) -> list[str]:
    return [name for name in names if name not in (None, NONE)]


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            "SteadyVSR_LoadVAE",
            VAE_NODE,
            "Loads a VAE like Load VAE. It can outlive the free-memory buttons, and it is left off its device, "
            "verified by measurement.",
            [
                io.Combo.Input(
                    "vae_name",
                    options=comfyui_nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0],
                    tooltip="A file of models/vae, or a pair of small files of models/vae_approx.",
                )
            ],
            [io.Vae.Output("vae", display_name="VAE", tooltip="The VAE.")],
            ["keep loaded"],
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

        def load(place: torch.device | None) -> Any:
            (vae,) = comfyui_nodes.VAELoader().load_vae(vae_name)
            return put_vae(vae, place)

        loading = Loading(cls, VAE_NODE, vae_name, keep_loaded, offload_after_load, device, allow_cpu)
        files = ModelFiles("vae", paths, {"name": vae_name}, weight_bytes.total(paths, weight_bytes.vae))
        return loading.hand_out(loading.obtain(files, load))


def small_files(name: str) -> list[str]:
    """Files of models/vae_approx that ComfyUI combines under a name such as taesd, or the file of that name."""
    if folder_paths.get_full_path("vae", name) is not None:
        return []
    starts = (f"{name}_encoder.", f"{name}_decoder.")
    return [file for file in folder_paths.get_filename_list("vae_approx") if file == name or file.startswith(starts)]


def put_vae(vae: Any, device: torch.device | None) -> Any:
    vae.patcher = put(vae.patcher, device)
    # A VAE moves its inputs to this device itself.
    vae.device = vae.patcher.load_device
    return vae


class LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            "SteadyVSR_LoadCheckpoint",
            CHECKPOINT_NODE,
            "Loads model, text encoder and VAE of one file like Load Checkpoint. They can outlive the "
            "free-memory buttons, and they are left off their device, verified by measurement.",
            [file_input("ckpt_name", "checkpoints")],
            [
                io.Model.Output("model", display_name="MODEL", tooltip="The diffusion model."),
                io.Clip.Output("clip", display_name="CLIP", tooltip="The text encoder, where the file has one."),
                io.Vae.Output("vae", display_name="VAE", tooltip="The VAE, where the file has one."),
            ],
            ["keep loaded"],
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

        def load(place: torch.device | None) -> tuple[Any, Any, Any]:
            model, clip, vae = comfyui_nodes.CheckpointLoaderSimple().load_checkpoint(ckpt_name)
            # Files without a text encoder are common, and ComfyUI gives None for it.
            if clip is not None:
                clip.patcher = put(clip.patcher, place)
            return put(model, place), clip, vae and put_vae(vae, place)

        loading = Loading(cls, CHECKPOINT_NODE, ckpt_name, keep_loaded, offload_after_load, device, allow_cpu)
        files = ModelFiles("checkpoint", [path], {}, weight_bytes.total([path], weight_bytes.checkpoint))
        return loading.hand_out(*loading.obtain(files, load, patchers_in))
