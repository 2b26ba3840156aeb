"""The archives of `torch.save`: pickles, checked before and after `torch.load` reads them with `weights_only=True`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .printable import printable
from .weight_header import AXES_LIMIT, ENTRY_LIMIT, NUMEL_LIMIT, CheckpointError

SAFE_TORCH = (2, 6)
"""The first release whose `weights_only=True` is not known to run code."""
PICKLE_LIMIT_BYTES = 1 << 20
"""Of the pickle in an archive, without the tensors: enough for 5,000 of them; FlashVSR has 900."""
READ_LIMIT = 1 << 20
"""Reads while an archive of the old format is unpickled: one or two for each step of the pickle."""
DIRECTORY_LIMIT_BYTES = 4 << 20
"""Of a zip archive's list of records, which is read in one piece; 5,000 tensors take a tenth of that."""
UNPACKED_LIMIT = 2
"""How many times as large as the archive its records, or its tensors together, may be."""
_ITEM_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4,
}  # fmt: skip
"""Of an element of a storage; one byte in all others."""
_WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
"""Names under which training code stores the state dict inside a checkpoint."""
_DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    ArithmeticError, MemoryError, ImportError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What zipfile and `torch.load` raise for damaged archives, beside `pickle.UnpicklingError`."""


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive, mapped where it allows that. A single bare tensor has the name "".

    Raises:
        CheckpointError: this PyTorch is too old to read pickles safely, or the archive is damaged, holds more than
            tensors, or tensors that are not dense, or claims much more than it stores.
    """
    release = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if release < SAFE_TORCH:
        raise CheckpointError(
            f"{path}: expected PyTorch 2.6 or newer to read a pickle; got {torch.__version__}, in which a pickle can "
            f"run code in spite of weights_only (CVE-2025-32434). Upgrade PyTorch, or use the .safetensors form."
        )
    try:
        tensors = _flatten(_load(path))
        if tensors and _is_zip(path):
            _check_storages(path)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or "Unsupported" in str(error):
            what = f"asks Python to run {wanted.group(1)}" if wanted else "holds objects"
            raise CheckpointError(
                f"{path}: expected a pickle of plain tensors; this one {what}. It was refused, and nothing in it was "
                f"run. Use the .safetensors form of these weights, or a copy from the model's own page."
            ) from None
        raise CheckpointError(_damaged(path, error)) from None
    except CheckpointError:
        raise
    except _DAMAGED as error:
        raise CheckpointError(_damaged(path, error)) from None
    _check_tensors(path, tensors)
    return tensors


def _load(path: Path) -> Any:
    is_zip = _is_zip(path)
    # Mapping reads records where they lie, which is wrong for packed ones. Of a path, torch.load believes the suffix.
    if is_zip and _are_all_stored(path) and path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not is_zip and _is_tar(path):
        # torch.load would unpack it, as an archive of PyTorch's first years.
        raise CheckpointError(f"{path}: expected safetensors or torch.save weights; it is a tar archive.")
    with path.open("rb") as file:
        stream: Any = file if is_zip else _FewReads(file)
        return torch.load(stream, map_location="cpu", weights_only=True)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _are_all_stored(path: Path) -> bool:
    """Whether no record of a zip archive is packed. Raises a CheckpointError for one that unpacks to too much."""
    with _zip(path) as archive:
        records = archive.infolist()
    size, unpacked = path.stat().st_size, sum(record.file_size for record in records)
    pickled = max((record.file_size for record in records if record.filename.endswith(".pkl")), default=0)
    if len(records) > ENTRY_LIMIT or pickled > PICKLE_LIMIT_BYTES or unpacked > UNPACKED_LIMIT * size:
        raise CheckpointError(
            f"{path}: expected at most {ENTRY_LIMIT:,} records, a pickle of {PICKLE_LIMIT_BYTES:,} bytes and twice the "
            f"file's {size:,} bytes in all; got {len(records):,}, {pickled:,} and {unpacked:,}. Use another copy."
        )
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


@contextlib.contextmanager
def _zip(path: Path) -> Iterator[zipfile.ZipFile]:
    with path.open("rb") as file, zipfile.ZipFile(_ShortReads(file)) as archive:  # pyright: ignore  reads alone
        yield archive


def _check_storages(path: Path) -> None:
    """Raises a ValueError where a record is shorter than the storage in it: torch reads on into what lies behind it.

    For archives that `torch.load` has accepted.
    """
    with _zip(path) as archive:
        records = archive.infolist()
        root = records[0].filename.split("/")[0]
        storages = _Storages(io.BytesIO(archive.read(f"{root}/data.pkl")))
        storages.load()
        sizes = {record.filename: record.file_size for record in sorted(records, key=lambda item: -item.file_size)}
    for key, needed in storages.bytes.items():
        there = sizes.get(f"{root}/data/{key}", 0)
        if there < needed:
            raise ValueError(f"the storage {printable(key)} has {there:,} of {needed:,} bytes")


class _Inert(dict):
    """Stands for any class or function in a pickle, and for what it makes, and does nothing."""

    name = ""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    __hash__ = object.__hash__  # pyright: ignore  a dict has none


class _Storages(pickle._Unpickler):  # pyright: ignore  the one in C makes as much room for its memo as a pickle says
    """Reads which storages a pickle of tensors names; looks nothing up and calls nothing of it.

    Attributes:
        bytes: key of a storage → bytes that it takes.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type("_Named", (_Inert,), {"name": name})

    def persistent_load(self, pid: Any) -> Any:
        """torch.save writes ("storage", its class, its key, its device, the number of its elements)."""
        _, kind, key, _, numel = pid
        needed = int(numel) * _ITEM_BYTES.get(kind.name, 1)
        self.bytes[str(key)] = max(self.bytes.get(str(key), 0), needed)
        return _Inert()


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (OSError, ValueError, ArithmeticError, EOFError, zlib.error):
        return True  # whatever breaks tarfile is not for torch.load either


class _ShortReads:
    """A file that gives no piece above `DIRECTORY_LIMIT_BYTES`: a zip's directory may be as long as the file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        wanted = size if size >= 0 else os.fstat(self._file.fileno()).st_size - self._file.tell()
        if wanted > DIRECTORY_LIMIT_BYTES:
            raise ValueError(f"a directory of {wanted:,} bytes; at most {DIRECTORY_LIMIT_BYTES:,} are read")
        return self._file.read(wanted)


class _FewReads:
    """A file that ends after `READ_LIMIT` reads: a pickle of the old format can go on as long as the file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = READ_LIMIT

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"a pickle of more than {READ_LIMIT:,} steps")

    def read(self, size: int = -1) -> bytes:
        self._count()
        return self._file.read(size)

    def readline(self, size: int = -1) -> bytes:
        self._count()
        return self._file.readline(size)

    def readinto(self, buffer) -> int:
        self._count()
        return self._file.readinto(buffer)  # pyright: ignore  a file opened for reading bytes has it

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _damaged(path: Path, error: Exception) -> str:
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
        # The text of any other key, a tuple of tuples of tuples, may be without end.
        if isinstance(value, Tensor) and isinstance(name, str | int):
            tensors[str(name)] = value
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        problem = _problem(tensor)
        if problem:
            raise CheckpointError(
                f"{path}: expected dense tensors; {printable(name) or 'its tensor'} {problem}. Save it again with "
                f"`{{name: tensor.cpu().contiguous() …}}`, or use another copy."
            )
    total, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if total > UNPACKED_LIMIT * size:
        raise CheckpointError(
            f"{path}: expected tensors of at most twice the file's {size:,} bytes; got {total:,}: several of them are "
            f"the same bytes. Use another copy."
        )


def _problem(tensor: Tensor) -> str | None:
    if tensor.device.type == "meta":
        return "has no data (it is on the meta device)"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return f"is {'quantised' if tensor.is_quantized else 'nested or sparse'}"
    if tensor.ndim > AXES_LIMIT or math.prod(max(1, side) for side in tensor.shape) > NUMEL_LIMIT:
        return f"has the shape {tuple(tensor.shape)}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"takes {tensor.nbytes:,} bytes and stores {tensor.untyped_storage().nbytes():,}"
    return None
