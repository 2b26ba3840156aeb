"""One file of weights: its table of contents, and its tensors one by one, never the whole file in memory.

Two formats: safetensors, and the archives of `torch.save` (`.ckpt`, `.pth`, `.pt`), which are pickles and are only ever
read with `weights_only=True`. The content tells the format, not the name. If it is neither (an empty or truncated file,
a web page saved under the model's name, a Git LFS pointer), the error says what it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pth", ".pt", ".bin")

_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own limit
_MAPPED_BYTES = 256 << 20
"""The file is mapped again after this many bytes: pages of a mapping count as resident memory until it is closed."""
_HASH_CHUNK_BYTES = 4 << 20
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
"""Names under which training code stores the state dict inside a checkpoint."""
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
)  # fmt: skip
"""What `torch.load` raises for damaged archives, beside `pickle.UnpicklingError`."""


class CheckpointError(ValueError):
    """A file of weights, or a set of them, cannot be used. The message names the file and says what to do about it."""


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


def read_header(path: str | os.PathLike[str]) -> list[HeaderEntry] | None:
    """The tensors of a safetensors file, from its header alone; None for another format or a damaged header."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT_BYTES:
                return None
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return [
            HeaderEntry(name, str(item["dtype"]), tuple(map(int, item["shape"])), *map(int, item["data_offsets"]))
            for name, item in entries.items()
        ]
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


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
        # A safetensors file starts with the length of its header, which can look like the first byte of a pickle.
        if start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:9] != b"{"):
            tensors = _load_pickle(path)
            return cls(path, size, "pickle", {}, {name: _meta(tensor) for name, tensor in tensors.items()})
        _check_safetensors_header(path, size, start)
        with _safetensors(path) as file:
            entries = {name: _meta(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return cls(path, size, "safetensors", file.metadata() or {}, entries)

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
                    stored = get(name)
                    mapped += stored.nbytes
                    tensor = stored.detach().to(device=device, dtype=dtype, copy=True).contiguous()
                    if not _is_finite(tensor):
                        overflowed = tensor.dtype == torch.float16 != stored.dtype
                        raise CheckpointError(
                            f"{self.path}: expected finite values in {name or 'its tensor'}; got NaN or infinity as "
                            f"{_dtype_name(tensor.dtype)} (stored as {_dtype_name(stored.dtype)}). "
                            f"{'Load it as bfloat16 or float32, or fetch' if overflowed else 'Fetch'} it again."
                        )
                    yield name, tensor

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[str], Tensor]]:
        if self.format == "pickle":
            yield _load_pickle(self.path).__getitem__
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
    if tensor.numel() == 0:
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


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` archive, mapped where the archive allows it."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or "Unsupported" in str(error):
            what = f"asks Python to run {wanted.group(1)}" if wanted else "holds objects"
            raise CheckpointError(
                f"{path}: expected a pickle of plain tensors; this one {what}. It was refused, and nothing in it was "
                f"run. Use the .safetensors form of these weights, or a copy from the model's own page."
            ) from None
        raise CheckpointError(_damaged_archive(path, error)) from None
    except _DAMAGED as error:
        raise CheckpointError(_damaged_archive(path, error)) from None
    return _flatten(content)


def _damaged_archive(path: Path, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).split("\n")[0][:200]
    return (
        f"{path}: expected an archive of torch.save; it is damaged, truncated or of another kind "
        f"({path.stat().st_size} bytes; {reason}). Fetch it again."
    )


def _flatten(content: object) -> dict[str, Tensor]:
    """Named tensors of an unpickled checkpoint: a bare tensor, a list of them, a state dict, or one in a wrapper."""
    if isinstance(content, Tensor):
        return {"": content}
    state: Mapping[object, object] = {}
    if isinstance(content, list | tuple):
        state = {"": content[0]} if len(content) == 1 else dict(enumerate(content))
    elif isinstance(content, Mapping):
        inner = [content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
        state = inner[0] if inner else content
    tensors = {}
    for name, value in state.items():
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, Tensor):
            tensors[str(name)] = value
    return tensors


def _check_safetensors_header(path: Path, size: int, start: bytes) -> None:
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
    if not 2 <= length <= _HEADER_LIMIT_BYTES or start[8:9] not in (b"{", b""):
        raise CheckpointError(
            f"{path}: expected safetensors or torch.save weights; it is neither (it starts with {start[:8]!r}). "
            f"Choose a file of weights."
        )
    # A header that cannot be read is left for `safe_open` to report.
    needed = 8 + length + max((entry.stop for entry in read_header(path) or ()), default=0)
    if size < needed:
        raise CheckpointError(
            f"{path}: expected {needed} bytes (as its header says); got {size}: the file is truncated. Fetch it again."
        )
