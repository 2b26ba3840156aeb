"""The doctor as a node: the same findings, but ComfyUI moves the network and computes guidance."""

from __future__ import annotations

import functools

import comfy.model_management as mm
import comfy.ops
import comfy.sample
import comfy.sd
import torch
from comfy.ldm.wan.model import WanModel
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..app.doctor import Guidance, examine, guidance_of, peak_of
from ..memory import offload, probe
from ..models.flashvsr import FlashVSR
from ..models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from ..patches import hooks, residency
from ..patches.versions import free_memory, patcher_class, supported
from .guidance import BATCHED, OFF, SEQUENTIAL, with_guidance
from .sockets import as_json, report_output

NODE = "Memory Doctor"
WAN_DIM = 128
"""The smallest width that ComfyUI's Wan 2.1 takes: one head."""
TEXT_TOKENS, TEXT_DIM = 7, 4096
LATENT = (1, 16, 5, 32, 32)
"""NCTHW; large enough that activations outweigh what a sampler needs anyway."""
STEPS, CFG = 2, 3.0


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_Doctor",
            display_name=NODE,
            category="SteadyVSR/Memory",
            description="Finds out on this machine what can be measured, whether an offloaded model really leaves the "
            "device, whether memory grows from run to run, and what guidance costs. Takes up to a minute; uses the "
            "embedded network and a small diffusion model with random weights.",
            inputs=[],
            outputs=[report_output("The findings, as JSON.")],
            is_output_node=True,
            **supported(io.Schema, search_aliases=["diagnose", "vram", "leak"]),
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return float("nan")  # never skipped

    @classmethod
    def execute(cls) -> io.NodeOutput:
        device = mm.get_torch_device()
        dtype = torch.float16 if device.type != "cpu" else torch.float32
        findings = examine(
            lambda: load_flashvsr(NANO_FILE, dtype=dtype, device="cpu"),
            device,
            move=_moved_by_comfyui,
            guidance=_sampled,
            on_step=lambda what: mm.throw_exception_if_processing_interrupted(),
        )
        off = hooks.promises_off()
        lines = [*findings.lines(), *(f"not in this ComfyUI: {promise}" for promise in off)]
        report = findings.to_json() | {"wrappers": hooks.status(), "promises_off": off}
        return io.NodeOutput(as_json(report), ui=ui.PreviewText("\n".join(lines)))


def _moved_by_comfyui(model: FlashVSR, device: torch.device, reader: probe.Probe) -> offload.Receipt:
    rest = torch.device("cpu") if device == torch.device("cpu") else mm.unet_offload_device()
    patcher = patcher_class()(model.transformer, load_device=device, offload_device=rest)
    mm.load_models_gpu([patcher])
    (receipt,) = residency.offload_model(patcher)
    if device == rest:
        free_memory(residency.EVERYTHING, device, [x for x in mm.current_loaded_models if x.model is not patcher])
    return receipt


def _sampled(model: FlashVSR, device: torch.device, reader: probe.Probe) -> Guidance | None:
    """ComfyUI's sampler on a small Wan 2.1 with random weights, with Guidance Memory in each of its modes."""
    found = {}
    base = comfy.sd.load_diffusion_model_state_dict(_random_wan())
    for mode in (OFF, SEQUENTIAL, BATCHED):
        patched = with_guidance(base, mode)
        mm.load_models_gpu([patched])  # before measuring: weights are not activations
        found[mode] = peak_of(functools.partial(_sample, patched), device, reader)
    free_memory(residency.EVERYTHING, device, [x for x in mm.current_loaded_models if x.model is not patched])
    latent = "×".join(map(str, LATENT))
    return guidance_of(found, f"{STEPS} steps of a small Wan 2.1, latent {latent}")


def _random_wan() -> dict[str, Tensor]:
    shapes = WanModel(
        model_type="t2v", dim=WAN_DIM, ffn_dim=WAN_DIM, num_heads=1, num_layers=1, in_dim=LATENT[1], out_dim=LATENT[1],
        device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    ).state_dict()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(x.shape, generator=generator) * 0.02).half() for name, x in shapes.items()}


def _sample(model: object) -> Tensor:
    positive, negative = ([[torch.zeros(1, TEXT_TOKENS, TEXT_DIM), {}]] for _ in range(2))
    noise = torch.zeros(LATENT)
    return comfy.sample.sample(
        model, noise, STEPS, CFG, "euler", "simple", positive, negative, noise, disable_pbar=True, seed=0
    )
