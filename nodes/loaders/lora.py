"""Apply LoRA: works on a clone of the model, reads its file once, and refuses a LoRA that fits nothing."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import comfy.sd
import comfy.utils
from comfy_api.v0_0_2 import io

from ...memory.process import shared
from ...memory.tracker import tensor_bytes
from ...patches.kept import EJECTABLE, Key, registry
from ...patches.versions import supported
from ..sockets import keep_loaded_input, offload_input, report_output
from .loading import CATEGORY, REPORT_TOOLTIP, Loading, file_in, file_input, fingerprint, patchers_in

NODE = "Apply LoRA (Verified)"
STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The tensors of a LoRA file by key, on the CPU, and its metadata."""

    tensors: dict[str, Any]
    metadata: dict[str, str] | None

    @property
    def size(self) -> int:
        return tensor_bytes(self.tensors.values())


class ApplyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_ApplyLoRA",
            display_name=NODE,
            category=CATEGORY,
            description="Applies a LoRA like Load LoRA, to a diffusion model and optionally its text encoder. A LoRA "
            "that fits neither is an error; what nobody keeps is left off its device, verified by measurement.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model; it is not changed, the output is a clone."),
                file_input("lora_name", "loras"),
                io.Float.Input(
                    "strength_model",
                    tooltip="How strongly the diffusion model is changed; may be negative.",
                    **STRENGTH,
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for a LoRA that changes it too."),
                io.Float.Input(
                    "strength_clip",
                    optional=True,
                    tooltip="How strongly the text encoder is changed; may be negative.",
                    **STRENGTH,
                ),
                keep_loaded_input(
                    "Whether the LoRA's file stays in RAM (the model has its own choice on its loader). no: as long as "
                    "ComfyUI caches this node's output. keep and pin: until it is released."
                ),
                offload_input(
                    "Leaves the models in RAM, off their device; the report verifies that by measurement. Kept and "
                    "pinned ones stay where they are."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output("patched_model", display_name="MODEL", tooltip="The model with the LoRA."),
                io.Clip.Output("patched_clip", display_name="CLIP", tooltip="The text encoder with the LoRA, if any."),
                report_output(REPORT_TOOLTIP),
            ],
            **supported(io.Schema, search_aliases=["load lora", "lora loader"]),
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: object) -> str:
        return fingerprint("loras", [lora_name])

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        clip: Any = None,
        strength_clip: float = 1.0,
        keep_loaded: str = EJECTABLE,
        offload_after_load: bool = True,
    ) -> io.NodeOutput:
        path = file_in("loras", lora_name, NODE)
        loading = Loading(cls, NODE, lora_name, keep_loaded, offload_after_load)
        given = patchers_in((model, clip))
        # A kept model stays where it is: its place is a promise of its own loader.
        loading.leave(x for x in given if (owner := registry().owner_of(x)) is not None and owner.owned)
        reads: list[int] = []

        def load() -> LoraFile:
            reads.append(1)
            tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
            return LoraFile(tensors, metadata)

        file = registry().obtain(
            Key.of("lora", [path]), keep_loaded, load, lambda value: (), lora_name, size_of=lambda value: value.size
        )
        patched, patched_clip = comfy.sd.load_lora_for_models(
            model,
            clip,
            file.tensors,
            strength_model,
            strength_clip if clip is not None else 0.0,
            **supported(comfy.sd.load_lora_for_models, lora_metadata=file.metadata),
        )
        # ComfyUI only logs keys that fit nothing; counting what was added tells whether any did.
        counts = {"model": patches(patched) - patches(model)}
        if clip is not None:
            counts["clip"] = patches(patched_clip.patcher) - patches(clip.patcher)
        if not any(counts.values()):
            names = " and ".join(type(patcher.model).__name__ for patcher in given)
            raise ValueError(
                f"{NODE}: expected a LoRA for {names}; got {lora_name}, of whose {len(file.tensors)} tensors none "
                "fits. Choose a LoRA that was made for this model."
            )
        # The file lives as long as this output: in ComfyUI's node cache, until a button or another workflow empties it.
        shared("lora_files", weakref.WeakKeyDictionary)[patched] = file
        loading.note(source="disk" if reads else "memory: nothing was read", patches=counts, file_bytes=file.size)
        return loading.output(patched, patched_clip)


def patches(patcher: Any) -> int:
    """How many weight patches a patcher carries."""
    return sum(len(changes) for changes in patcher.patches.values())
