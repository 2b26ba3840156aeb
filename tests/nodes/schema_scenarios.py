"""The schema of every node of the pack.

Choices that list files, devices or what this version of ComfyUI knows are named by what they list, and keywords that
only newer versions have are left out, so that all versions say the same.
"""

from __future__ import annotations

import inspect
from typing import Any

from host import NODES

LISTS = {
    "unet_name": "files of diffusion_models", "vae_name": "VAEs as Load VAE lists them",
    "ckpt_name": "files of checkpoints", "lora_name": "files of loras", "type": "types of text encoders",
    "weight_dtype": "number formats as Load Diffusion Model lists them", "device": "devices",
    "model_set": "model sets", **{f"clip_name{number}": "files of text_encoders" for number in range(1, 5)},
}  # fmt: skip


def described(node: Any) -> dict:
    schema = node.define_schema()
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "description": schema.description,
        "output_node": bool(schema.is_output_node),
        "inputs": [
            {
                "id": item.id,
                "type": item.get_io_type(),
                "optional": bool(item.optional),
                "default": None if item.id in LISTS else getattr(item, "default", None),
                "choices": LISTS.get(item.id) or getattr(item, "options", None),
                "tooltip": item.tooltip,
            }
            for item in schema.inputs
        ],
        "outputs": [
            {"id": item.id, "type": item.get_io_type(), "name": item.display_name, "tooltip": item.tooltip}
            for item in schema.outputs
        ],
    }


def all_nodes() -> dict:
    return {name: described(node) for name, node in sorted(NODES.items())}


def parameters() -> dict:
    """Node → ids of its inputs, and parameters of its `execute`."""
    return {
        name: [[item.id for item in node.define_schema().inputs], list(inspect.signature(node.execute).parameters)]
        for name, node in NODES.items()
    }


SCENARIOS = {"all nodes": all_nodes, "parameters": parameters}
