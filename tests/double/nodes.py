"""ComfyUI's own loaders, as far as they say what they take."""

from __future__ import annotations

from typing import Any

import folder_paths


class UNETLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        dtypes = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]
        files = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"unet_name": (files,), "weight_dtype": (dtypes,)}}


class CLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"type": (["stable_diffusion", "sd3", "wan"],)}}


class DualCLIPLoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"type": (["sdxl", "sd3", "flux"],)}}


class VAELoader:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": (folder_paths.get_filename_list("vae"),)}}
