"""The header of a safetensors file: what it says, and that a damaged one is an answer, not a crash."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from steadyvsr.models.weight_file import CheckpointError, WeightFile, read_header


def write_header(path: Path, header: str) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)
    return path


def test_a_header_names_every_tensor_with_its_type_shape_and_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path, {"format": "pt"})
    entries = {entry.name: entry for entry in read_header(path) or ()}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("F32", (3, 5)),
        "b": ("F8_E4M3", (2,)),
    }
    assert [(entries[name].numel, entries[name].nbytes) for name in "ab"] == [(15, 60), (2, 2)]


@pytest.mark.parametrize(
    "header",
    [
        '{"a":' * 50_000,
        "[]",
        json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}),
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        "{",
    ],
)
def test_a_damaged_header_is_none_and_the_file_is_refused(tmp_path, header):
    path = write_header(tmp_path / "a.safetensors", header)
    assert read_header(path) is None
    with pytest.raises(CheckpointError, match="a.safetensors: expected"):
        WeightFile.open(path)


@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 1 << 62) + b"{}"])
def test_what_is_no_safetensors_file_has_no_header(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert read_header(tmp_path / "a") is None
    assert read_header(tmp_path / "absent") is None
