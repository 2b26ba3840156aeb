"""The doctor as a node: the same findings, with the network moved by ComfyUI."""

from __future__ import annotations

import json

import comfy.model_management as mm
import torch
from comfy_api.v0_0_2 import io, ui

from ..doctor import examine
from ..memory import offload, probe
from ..models.flashvsr import FlashVSR
from ..models.flashvsr.checkpoint import load_flashvsr
from ..patches import residency
from . import model_sets
from .compat import patcher_class, supported

NODE = "Memory Doctor"


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_Doctor",
            display_name=NODE,
            category="SteadyVSR/Memory",
            description="Tries out on this machine what can be measured, whether an offloaded model really leaves the "
            "device, and whether memory grows from run to run. Takes up to a minute; uses the embedded network.",
            inputs=[],
            outputs=[io.String.Output("report", display_name="report", tooltip="The findings, as JSON.")],
            is_output_node=True,
            **supported(io.Schema, search_aliases=["diagnose", "vram", "leak"]),
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return float("nan")  # asked again, it looks again

    @classmethod
    def execute(cls) -> io.NodeOutput:
        device = mm.get_torch_device()
        dtype = torch.float16 if device.type != "cpu" else torch.float32
        findings = examine(
            lambda: load_flashvsr(model_sets.NANO_FILE, dtype=dtype, device="cpu"),
            device,
            move=_moved_by_comfyui,
            on_step=lambda what: mm.throw_exception_if_processing_interrupted(),
        )
        report = json.dumps(findings.to_json(), indent=2, ensure_ascii=False)
        return io.NodeOutput(report, ui=ui.PreviewText("\n".join(findings.lines())))


def _moved_by_comfyui(model: FlashVSR, device: torch.device, reader: probe.Probe) -> offload.Receipt:
    rest = torch.device("cpu") if device == torch.device("cpu") else mm.unet_offload_device()
    patcher = patcher_class()(model.transformer, load_device=device, offload_device=rest)
    mm.load_models_gpu([patcher])
    (receipt,) = residency.offload_model(patcher)
    if device == rest:
        mm.free_memory(1e30, device, keep_loaded=[x for x in mm.current_loaded_models if x.model is not patcher])
    return receipt
