"""A random network of FlashVSR's form for scripts that run inside ComfyUI, or on the double of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch

NAME = "tiny.safetensors"


def write_tiny_model(
    pack: Callable[[str], Any], lq_hidden: tuple[int, ...], decoder_channels: tuple[int, ...], prompt_length: int
) -> Path:
    """Writes it as a merged file NAME into models/flashvsr; returns that folder.

    Args:
        pack: gives a module of the pack by its name.
    """
    flashvsr = pack("models.flashvsr")
    config = flashvsr.FlashVSRConfig(
        dim=128, num_heads=1, ffn_dim=128, num_layers=2, text_dim=64, lq_hidden=lq_hidden,
        decoder_channels=decoder_channels,
    )  # fmt: skip
    torch.manual_seed(0)
    networks = {
        "transformer": flashvsr.Transformer(config, operations=torch.nn),
        "lq_projection": flashvsr.CausalLQ4xProjection(config.lq_hidden, config.dim, 1, operations=torch.nn),
        "decoder": flashvsr.TCDecoder(config.decoder_channels, operations=torch.nn),
    }
    parts = {name: network.state_dict() for name, network in networks.items()} | {
        "prompt": torch.randn(prompt_length, 64)
    }
    folder = Path(folder_paths.get_folder_paths("flashvsr")[0])
    folder.mkdir(parents=True, exist_ok=True)
    pack("models.flashvsr.checkpoint.load").save_merged(parts, folder / NAME, "v1.1", "test")
    return folder
