"""One file of weights: its table of contents, and its tensors one by one, never the whole file in memory.

Two formats: safetensors, and the archives of `torch.save` (`.ckpt`, `.pth`, `.pt`), which are pickles and are only ever
read with `weights_only=True`. The content tells the format, not the name. If it is neither (an empty or truncated file,
a web page saved under the model's name, a Git LFS pointer), the error says what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .printable import printable
from .weight_header import HEADER_LIMIT_BYTES, CheckpointError, HeaderEntry, checked_header, read_header
from .weight_pickle import load_pickle

__all__ = ["CheckpointError", "HeaderEntry", "WeightFile", "file_sha256", "read_header", "tensors_sha256"]

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pth", ".pt", ".bin")

_MAPPED_BYTES = 256 << 20
"""The file is mapped again after this many bytes: pages of a mapping count as resident memory until it is closed."""
_HASH_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class WeightFile:
    """The table of contents of one file of weights; tensors are read on request.

        file = WeightFile.open("model.safetensors")
        tensors = dict(file.read(file.entries, torch.float16))

    Attributes:
        path: of the file.
        size_bytes: of the file.
        format: "safetensors" or "pickle".
        metadata: `__metadata__` of the safetensors header; empty for pickles.
        entries: name → tensor on the meta device (shape and dtype, no data). A single bare tensor has the name "".
    """

    path: Path
    size_bytes: int
    format: str
    metadata: Mapping[str, str]
    entries: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> WeightFile:
        """Reads the table of contents.

        Raises:
            CheckpointError: the file is not there, holds no weights, is damaged, or is a pickle of more than tensors.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: expected a file of weights; found {'a folder' if path.is_dir() else 'no file'}."
            )
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
        # A safetensors file starts with the length of its header, which can look like the start of any other format.
        if start[8:9] != b"{" and start.startswith((b"PK", b"\x80")):
            tensors = load_pickle(path)
            return cls(path, size, "pickle", {}, {name: _meta(tensor) for name, tensor in tensors.items()})
        _refuse_what_is_neither(path, size, start)
        listed, metadata = checked_header(path)
        try:
            return cls(path, size, "safetensors", metadata, {entry.name: entry.meta() for entry in listed})
        except ValueError as error:
            raise CheckpointError(f"{path}: expected weights; it {error}. Use another copy.") from None

    def read(
        self, names: Iterable[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in the order given; every tensor owns its memory.

        Args:
            dtype: that each tensor is converted to as it is read; None keeps the stored one.

        Raises:
            CheckpointError: the file is damaged, or a tensor holds NaN or infinity in the dtype asked for.
        """
        names = list(names)
        while names:
            with self._reader() as get:
                mapped = 0
                while names and mapped < _MAPPED_BYTES:
                    name = names.pop(0)
                    stored, listed = get(name), self.entries[name]
                    if (stored.shape, stored.dtype) != (listed.shape, listed.dtype):
                        raise CheckpointError(f"{self.path}: expected the file as it was opened; it has changed.")
                    mapped += stored.nbytes
                    tensor = stored.detach().to(device=device, dtype=dtype, copy=True).contiguous()
                    if not _is_finite(tensor):
                        overflowed = tensor.dtype == torch.float16 != stored.dtype
                        raise CheckpointError(
                            f"{self.path}: expected finite values in {printable(name) or 'its tensor'}; got NaN or "
                            f"infinity as {_dtype_name(tensor.dtype)} (stored as {_dtype_name(stored.dtype)}). "
                            f"{'Load it as bfloat16 or float32, or fetch' if overflowed else 'Fetch'} it again."
                        )
                    yield name, tensor

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[str], Tensor]]:
        if self.format == "pickle":
            yield load_pickle(self.path).__getitem__
        else:
            with _safetensors(self.path) as file:
                yield file.get_tensor


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, remembered as long as its size and modification time stay the same."""
    stat = path.stat()
    return _file_sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """sha256 of the raw bytes of the tensors, in order (little-endian, row-major)."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # aminmax needs no second tensor and passes NaN on; 8-bit floats do not have it.
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())
    return bool(low.isfinite() & high.isfinite())


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file; it is damaged ({error}). Fetch it again."
        ) from error


def _refuse_what_is_neither(path: Path, size: int, start: bytes) -> None:
    """Raises a CheckpointError that says what the file is unless it can be a whole safetensors file."""
    if size == 0:
        raise CheckpointError(f"{path}: expected a file of weights; it is empty (0 bytes). Fetch it again.")
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: expected a file of weights; it is a Git LFS pointer ({size} bytes). Run `git lfs pull`, or fetch "
            f"the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: expected a file of weights; it is a web page. Fetch the file itself.")
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path}: expected safetensors or torch.save weights; GGUF files are not supported.")
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
    if not 2 <= length <= HEADER_LIMIT_BYTES or start[8:9] not in (b"{", b""):
        raise CheckpointError(
            f"{path}: expected safetensors or torch.save weights; it is neither (it starts with {start[:8]!r}). "
            f"Choose a file of weights."
        )
