"""Run by a real ComfyUI's Python, in its folder: the schema of every node of the pack, as JSON on the last line.

    python schema_session.py PACK_FOLDER BASE_FOLDER

Choices that list files, devices or what this version of ComfyUI knows are named by what they list, and keywords that
only newer versions have are left out, so that all versions print the same.
"""

from __future__ import annotations

import json
import sys

import phases_host as host  # starts ComfyUI; what follows needs that
from phases_host import nodes

assert host.FILES

LISTS = {
    "unet_name": "files of diffusion_models", "vae_name": "VAEs as Load VAE lists them",
    "ckpt_name": "files of checkpoints", "lora_name": "files of loras", "type": "types of text encoders",
    "weight_dtype": "number formats as Load Diffusion Model lists them", "device": "devices",
    "model_set": "model sets", **{f"clip_name{number}": "files of text_encoders" for number in range(1, 5)},
}  # fmt: skip


def described(node) -> dict:
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


own = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("SteadyVSR_"))
found = {name: described(nodes.NODE_CLASS_MAPPINGS[name]) for name in own}
sys.stdout.write("\n" + json.dumps(found, ensure_ascii=False) + "\n")
