"""What a user wires: ComfyUI nodes (V3), thin layers over the other rooms."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from ..patches import hooks
from ..patches.residency import read_dynamic_vram
from .doctor import Doctor
from .flashvsr.model_sets import register_model_folder
from .flashvsr.nodes import LoadFlashVSR, Upscale, UpscaleVideo
from .free import FreeMemory, ReleaseKept
from .guidance import GuidanceMemory, LeanSampling
from .loaders.lora import ApplyLoRA
from .loaders.nodes import LoadCheckpoint, LoadCLIP, LoadDiffusionModel, LoadVAE
from .panel.routes import register_routes
from .phases import MemoryReport, PhaseGate
from .vae.nodes import VAEDecodeTiled, VAEEncodeTiled


class FlashVSRExtension(ComfyExtension):
    """The pack's nodes.

    Creating it registers the model folder for the combos, lets the probe see ComfyUI's dynamic VRAM, opens the routes
    of the memory panel, and installs the wrappers that let kept models stay.
    """

    def __init__(self) -> None:
        register_model_folder()
        read_dynamic_vram()
        register_routes()
        hooks.install()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadFlashVSR, Upscale, UpscaleVideo,
            LoadDiffusionModel, LoadCLIP, LoadVAE, LoadCheckpoint, ApplyLoRA,
            PhaseGate, MemoryReport, FreeMemory, ReleaseKept, GuidanceMemory, LeanSampling, Doctor,
            VAEEncodeTiled, VAEDecodeTiled,
        ]  # fmt: skip
