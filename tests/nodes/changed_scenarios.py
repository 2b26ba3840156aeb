"""The pack's products in a ComfyUI that changed_comfyui.py has changed."""

from __future__ import annotations

from typing import Any

import torch
from changed_comfyui import WARNINGS
from flashvsr_scenarios import clip, tiny_model, upscale
from host import CPU, NODES, listed, mm, pack
from vae_scenarios import decode, latents_of, small_vaes

comfyui: Any = getattr(mm, "_module", mm)
"""As ComfyUI itself sees it."""


class Stranger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)


def products() -> dict:
    """All of them, one after the other, with a kept model and a press."""
    hooks, residency = pack("patches.hooks"), pack("patches.residency")
    model = tiny_model(keep_loaded="keep")
    frames, _ = upscale(model, clip(9), scale=2.0)
    latents = latents_of("sd", height=16, width=16)
    picture, _ = decode(small_vaes.SMALL_VAES["sd"](), latents, mode="blend")
    stranger = pack("patches.versions").patcher_class()(Stranger(), load_device=CPU, offload_device=CPU)
    comfyui.load_models_gpu([stranger])
    residency.unload_others(CPU, [stranger])
    comfyui.load_models_gpu([*model.patchers(), stranger])
    comfyui.unload_all_models()
    hooks.install()
    ours = comfyui.load_models_gpu
    comfyui.load_models_gpu = lambda *given, **more: ours(*given, **more)
    replaced = hooks.status()["load_models_gpu"]
    tiny_model()
    healed, comfyui.load_models_gpu = hooks.status()["load_models_gpu"], ours
    return {
        "healed": [replaced, healed],
        "nodes": len(NODES), "frames": list(frames.shape), "picture": list(picture.shape),
        "kept on the device": sorted(listed()), "status": hooks.status(), "off": hooks.promises_off(),
        "warnings": list(WARNINGS),
    }  # fmt: skip


SCENARIOS = {"products": products}
