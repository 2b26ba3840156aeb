"""The table of contents of a file of weights, checked before anything is built from it or read by it.

Nothing that a file says about itself is believed: counts, sizes and offsets must fit each other and the file. So what
is made from a table of contents that passed takes no longer and no more memory than a good file of that size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .printable import printable

HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
ENTRY_LIMIT = 200_000
NUMEL_LIMIT = 1 << 48
AXES_LIMIT = 16
_BRACKETS_PER_ENTRY, _COMMAS_PER_ENTRY = 3, 12
"""In a header of many small entries; what has far more is not worth parsing."""
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
"""Types of the format that not every PyTorch knows."""


class CheckpointError(ValueError):
    """A file of weights, or a set of them, cannot be used. The message names the file and says what to do about it.

    Args:
        lines: of the message; control characters in them are escaped.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(printable(line, most=2000) for line in lines))


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as the header of a safetensors file describes it.

    Attributes:
        name: its key.
        dtype: as the format spells it ("F32", "BF16", "F8_E4M3", …); PyTorch need not know it.
        shape: of the tensor.
        start, stop: the bytes that hold it, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def meta(self) -> torch.Tensor:
        """A tensor of its shape and type without data. Raises ValueError for a type that PyTorch lacks."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"has {printable(self.name)} as {self.dtype}, which cannot be computed with")
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


def read_header(path: str | os.PathLike[str]) -> list[HeaderEntry] | None:
    """The tensors of a safetensors file, from its header alone; None for another format or a wrong header."""
    try:
        return checked_header(Path(path))[0]
    except (OSError, CheckpointError):
        return None


def checked_header(path: Path) -> tuple[list[HeaderEntry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, from its header alone.

    Raises:
        CheckpointError: the header is damaged, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else HEADER_LIMIT_BYTES + 1
        text = file.read(length) if length <= HEADER_LIMIT_BYTES else b""
    if length > HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{path}: expected a safetensors header of at most {HEADER_LIMIT_BYTES:,} bytes.")
    needed, entries, metadata = 8 + length, [], {}
    try:
        if len(text) == length:
            entries, metadata = _parsed(text)
            needed += max((entry.stop for entry in entries), default=0)
    except (ValueError, RecursionError) as error:
        reason = "is nested deeper than any header" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{path}: expected a safetensors file; its header {printable(reason)}. Fetch it again."
        ) from None
    if size < needed:
        raise CheckpointError(
            f"{path}: expected {needed} bytes (as its header says); got {size}: the file is truncated. Fetch it again."
        )
    return entries, metadata


def _parsed(text: bytes) -> tuple[list[HeaderEntry], dict[str, str]]:
    """Raises a ValueError that says what is wrong with the header, as the end of a sentence."""
    # Counted first: parsing a hundred million brackets takes gigabytes.
    brackets, commas = text.count(b"{") + text.count(b"["), text.count(b",")
    many = brackets > 2 * _BRACKETS_PER_ENTRY * ENTRY_LIMIT or commas > 2 * _COMMAS_PER_ENTRY * ENTRY_LIMIT
    if many or text.count(b'"data_offsets"') > ENTRY_LIMIT:
        raise ValueError(f"has more than {ENTRY_LIMIT:,} entries")
    try:
        content = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("lists no tensors")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that is not text")
    if len(content) > ENTRY_LIMIT:
        raise ValueError(f"has more than {ENTRY_LIMIT:,} entries")
    entries = [_entry(name, item) for name, item in content.items()]
    _check_disjoint(entries)
    return entries, metadata


def _entry(name: str, item: Any) -> HeaderEntry:
    label = f"describes {printable(name)} wrongly: "
    if not isinstance(item, dict):
        raise ValueError(f"{label}it is no table")
    shape, offsets, dtype = _counts(item.get("shape")), _counts(item.get("data_offsets")), item.get("dtype")
    if shape is None or len(shape) > AXES_LIMIT or math.prod(max(1, side) for side in shape) > NUMEL_LIMIT:
        raise ValueError(f"{label}its shape is {item.get('shape')}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{label}its offsets are {item.get('data_offsets')}")
    if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype not in _PACKED_BITS):
        raise ValueError(f"{label}its type is {dtype!r}")
    bits = _PACKED_BITS[dtype] if dtype in _PACKED_BITS else 8 * _DTYPES[dtype].itemsize
    entry = HeaderEntry(name, dtype, shape, *offsets)
    if entry.numel * bits != 8 * entry.nbytes:
        raise ValueError(f"{label}{entry.nbytes} bytes for {dtype} of shape {shape}")
    return entry


def _counts(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on; None for anything else (`true` is no number here)."""
    return tuple(value) if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value) else None


def _check_disjoint(entries: Iterable[HeaderEntry]) -> None:
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start < end:
            raise ValueError(f"puts {printable(entry.name)} and {printable(before)} into the same bytes")
        end, before = entry.stop, entry.name
