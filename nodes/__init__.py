"""What a user wires: ComfyUI nodes (V3), thin layers over `models`."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from ..patches.residency import read_dynamic_vram
from .doctor import Doctor
from .flashvsr import LoadFlashVSR, Upscale, UpscaleVideo
from .guidance import GuidanceMemory, LeanSampling
from .loaders import LoadCheckpoint, LoadCLIP, LoadDiffusionModel, LoadVAE
from .lora import ApplyLoRA
from .memory import MemoryReport, PhaseGate
from .model_sets import register_model_folder
from .panel import register_routes


class FlashVSRExtension(ComfyExtension):
    """The pack's nodes. Making one registers the model folder, so that the combos can list what is in it, lets the
    probe see ComfyUI's dynamic VRAM, and opens the routes of the memory panel."""

    def __init__(self) -> None:
        register_model_folder()
        read_dynamic_vram()
        register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadFlashVSR, Upscale, UpscaleVideo,
            LoadDiffusionModel, LoadCLIP, LoadVAE, LoadCheckpoint, ApplyLoRA,
            PhaseGate, MemoryReport, GuidanceMemory, LeanSampling, Doctor,
        ]  # fmt: skip
