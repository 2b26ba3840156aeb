"""ComfyUI in the process of a session script, with the pack, small random VAEs and what compares their results.

Import it from a script that ComfyUI's Python runs in ComfyUI's folder with the arguments PACK_FOLDER BASE_FOLDER;
importing it starts everything.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK, BASE = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, os.getcwd())
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
import comfy.model_management as mm  # noqa: E402, F401
import small_vaes  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import nodes  # noqa: E402

DEFAULTS = {"tile_size": 64, "overlap": 16, "mode": "auto", "memory_budget_gb": 2.0, "on_oom": "shrink"}
KINDS = ("wan", "sd", "flux")


def pack(module: str):
    return importlib.import_module(str(PACK).replace(".", "_x_") + "." + module)


def call(name: str, **inputs):
    """A node's value and report."""
    with torch.inference_mode():
        node = nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_VAE{name}Tiled"].PREPARE_CLASS_CLONE({})
        value, report = node.execute(**{**DEFAULTS, **inputs}).args
    return value["samples"] if name == "Encode" else value, json.loads(report)


def encode(vae, pixels, **inputs):
    return call("Encode", pixels=pixels, vae=vae, **inputs)


def decode(vae, latents, **inputs):
    return call("Decode", samples={"samples": latents}, vae=vae, **inputs)


def image(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """BHWC with coarse and fine parts, another one in each frame."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(count, 3, max(2, height // k), max(2, width // k), generator=generator) for k in (64, 8, 2)]
    shown = sum(F.interpolate(part, size=(height, width), mode="bilinear") for part in parts) / 3
    return shown.clamp(0, 1).movedim(1, -1)


def latents_of(kind: str, frames: int = 3, height: int = 12, width: int = 17, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = {"wan": (batch, 16, frames), "sd": (batch, 4), "flux": (batch, 16)}[kind]
    return torch.randn(*shape, height, width, generator=generator)


def native(vae, method: str, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return getattr(vae.first_stage_model, method)(x.to(vae.vae_dtype)).float()


def shown(vae, pixels: torch.Tensor) -> torch.Tensor:
    """What ComfyUI makes of a network's pixels."""
    with torch.inference_mode():
        pixels = vae.process_output(pixels.clone()).movedim(1, -1)
    return pixels.reshape(-1, *pixels.shape[-3:])


def apart(result: torch.Tensor, wanted: torch.Tensor) -> float:
    if result.shape != wanted.shape:
        return float("inf")
    return float((result - wanted).norm() / wanted.norm())


def psnr(result: torch.Tensor, wanted: torch.Tensor) -> float:
    spread = wanted.max() - wanted.min()
    return float(-10 * ((result - wanted).square().mean() / spread**2).clamp_min(1e-20).log10())


def error_of(function, *arguments, **keywords) -> str:
    try:
        function(*arguments, **keywords)
    except Exception as error:  # noqa: BLE001  whatever it is, the test compares its words
        return f"{type(error).__name__}: {error}"
    return "no error"


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


VAES: dict = {}


def vae_of(kind: str):
    if kind not in VAES:
        VAES[kind] = small_vaes.SMALL_VAES[kind]()
    return VAES[kind]


def tell(scenarios: dict[str, Callable[[], Any]]) -> None:
    """Prints what every scenario found as one JSON object on the last line; STEADYVSR_SCENARIOS names some of them."""
    only = [word for word in os.environ.get("STEADYVSR_SCENARIOS", "").split(",") if word]
    found = {}
    for name, scenario in scenarios.items():
        if not only or any(word in name for word in only):
            try:
                found[name] = scenario()
            except BaseException:  # noqa: BLE001  told by the test that needs it
                found[name] = {"error": traceback.format_exc()[-3000:]}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if not asyncio.run(nodes.load_custom_node(str(PACK))):
    raise SystemExit("the pack did not load")
