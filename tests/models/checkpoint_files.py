"""Tiny FlashVSR checkpoints in every layout, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from steadyvsr.models import known_files
from steadyvsr.models.flashvsr.checkpoint import parts as checkpoint_parts
from steadyvsr.models.flashvsr.checkpoint.load import expected_entries, save_merged
from steadyvsr.models.flashvsr.config import FlashVSRConfig
from steadyvsr.models.known_files import KnownFile
from steadyvsr.models.weight_file import WeightFile, file_sha256

TINY = FlashVSRConfig(
    dim=128,
    num_heads=1,
    ffn_dim=32,
    num_layers=2,
    freq_dim=16,
    text_dim=24,
    lq_hidden=(6, 8),
    lq_layers=2,
    decoder_channels=(8, 6, 4, 4),
)
OFFICIAL = {
    "transformer": "diffusion_pytorch_model_streaming_dmd.safetensors",
    "lq_projection": "LQ_proj_in.ckpt",
    "decoder": "TCDecoder.ckpt",
    "prompt": "posi_prompt.pth",
}


def random_parts() -> dict[str, dict[str, torch.Tensor]]:
    """Random tensors for every part, under official keys; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    result = {
        part: {key: torch.randn(tensor.shape, generator=generator) for key, tensor in entries.items()}
        for part, entries in expected_entries(TINY).items()
    }
    result["prompt"] = {"context": torch.randn(1, 5, TINY.text_dim, generator=generator)}
    return result


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".safetensors", ".sft"):
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors["context"] if set(tensors) == {"context"} else tensors, path)
    return path


def write_folder(
    folder: Path, parts: dict, names: dict[str, str] = OFFICIAL, prefixes: dict[str, str] | None = None
) -> Path:
    for part, name in names.items():
        prefix = (prefixes or {}).get(part, "")
        write(folder / name, {prefix + key: tensor for key, tensor in parts[part].items()})
    return folder


def write_merged(path: Path, parts: dict, version: str = "v1.1", dtype: torch.dtype = torch.float32) -> Path:
    save_merged({**parts, "prompt": parts["prompt"]["context"]}, path, version, "tiny", dtype)
    return path


def assert_holds(model, parts: dict) -> None:
    for part in checkpoint_parts.NETWORKS:
        state = getattr(model, part).state_dict()
        assert state.keys() == parts[part].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, parts[part][key]), key
    assert torch.equal(model.prompt, parts["prompt"]["context"])


def publish(monkeypatch, path: Path, version: str | None) -> None:
    """Enters a file among the published ones."""
    file = WeightFile.open(path)
    known = KnownFile(path.name, file_sha256(file.path), file.size_bytes, version)
    monkeypatch.setattr(known_files, "KNOWN_FILES", (*known_files.KNOWN_FILES, known))
