"""The seven phases of a Wan workflow as a prompt for ComfyUI's API, each ended by a Phase Gate.

load → LoRA → text encode → sampling patch → VAE encode → sample → VAE decode. Loading, LoRA and patch move nothing by
themselves; a node `Test_PutOnCard` of the session stands for a loader that leaves its model on the card.
"""

from __future__ import annotations

from typing import Any

PHASES = ("load", "LoRA", "text encode", "sampling patch", "VAE encode", "sample", "VAE decode")
FRAMES, WIDTH, HEIGHT = 5, 64, 64


def gate(phase: str, value: list, **inputs: Any) -> dict:
    """A gate that lets nothing stay. `inputs` replace or add."""
    widgets = {"phase": phase, "budget_gb": 0.0, "needs_gb": 0.0, "on_violation": "error", "peak_gb": -1.0}
    return {"class_type": "SteadyVSR_PhaseGate", "inputs": {**widgets, "value": value, **inputs}}


def put_on_card(model: list, **after: list) -> dict:
    return {"class_type": "Test_PutOnCard", "inputs": {"model": model, **after}}


def seven_phases(files: dict[str, str], seed: int = 1, **limits: float) -> dict[str, dict]:
    """The prompt.

    Args:
        files: names of the diffusion_model, lora, clip and vae files.
        seed: of the noise.
        limits: inputs of every gate, such as budget_gb.
    """
    return {
        "unet": {
            "class_type": "SteadyVSR_LoadDiffusionModel",
            "inputs": {"unet_name": files["diffusion_model"], "weight_dtype": "default"},
        },
        "clip": {"class_type": "SteadyVSR_LoadCLIP", "inputs": {"clip_name1": files["clip"], "type": "wan"}},
        "vae": {"class_type": "SteadyVSR_LoadVAE", "inputs": {"vae_name": files["vae"]}},
        "unet on card": put_on_card(["unet", 0]),
        "gate load": gate(
            "load", ["unet on card", 0], model_1=["unet on card", 0], model_2=["clip", 0], model_3=["vae", 0], **limits
        ),
        "lora": {
            "class_type": "SteadyVSR_ApplyLoRA",
            "inputs": {"model": ["gate load", 0], "lora_name": files["lora"], "strength_model": 1.0},
        },
        "lora on card": put_on_card(["lora", 0]),
        # The text encoder passes the gate of the LoRA: text is not encoded before that phase is over.
        "gate LoRA": gate(
            "LoRA", ["clip", 0], model_1=["lora on card", 0], wait_for=["lora on card", 0], **limits
        ),
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["gate LoRA", 0], "text": "a red cat"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["gate LoRA", 0], "text": "blurry"}},
        "gate text": gate("text encode", ["positive", 0], model_1=["clip", 0], wait_for=["negative", 0], **limits),
        "patch": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["lora", 0], "shift": 8.0}},
        "patch on card": put_on_card(["patch", 0], after=["gate text", 0]),
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": FRAMES, "color": 0x205080},
        },
        "gate patch": gate("sampling patch", ["image", 0], model_4=["patch on card", 0], **limits),
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["gate patch", 0], "vae": ["vae", 0]}},
        "gate encode": gate("VAE encode", ["encode", 0], model_1=["vae", 0], **limits),
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["patch", 0], "positive": ["gate text", 0], "negative": ["negative", 0],
                "latent_image": ["gate encode", 0], "seed": seed, "steps": 2, "cfg": 3.0, "sampler_name": "euler",
                "scheduler": "simple", "denoise": 0.8,
            },
        },
        "gate sample": gate("sample", ["sample", 0], model_1=["patch", 0], **limits),
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["gate sample", 0], "vae": ["vae", 0]}},
        "gate decode": gate("VAE decode", ["decode", 0], model_1=["vae", 0], **limits),
        "report": {"class_type": "SteadyVSR_MemoryReport", "inputs": {"value": ["gate decode", 0], "label": "end"}},
    }  # fmt: skip


def tiled_phases(files: dict[str, str], tile: int = 64) -> dict[str, dict]:
    """The same with our VAE nodes, frames of several tiles, and a video file at the end."""
    prompt = seven_phases(files)
    tiles = {"vae": ["vae", 0], "tile_size": tile, "overlap": 16}
    prompt["image"]["inputs"] |= {"width": 2 * WIDTH, "height": HEIGHT + HEIGHT // 2}
    prompt["encode"] = {"class_type": "SteadyVSR_VAEEncodeTiled", "inputs": {"pixels": ["gate patch", 0], **tiles}}
    prompt["decode"] = {"class_type": "SteadyVSR_VAEDecodeTiled", "inputs": {"samples": ["gate sample", 0], **tiles}}
    prompt["video"] = {"class_type": "CreateVideo", "inputs": {"images": ["gate decode", 0], "fps": 16.0}}
    prompt["save"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": ["video", 0], "filename_prefix": "tiled", "format": "auto", "codec": "auto"},
    }
    for name in ("encode", "decode"):
        prompt[f"{name} report"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 1]}}
    return prompt
