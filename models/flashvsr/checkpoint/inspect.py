"""Describing a file or folder of weights for `steadyvsr inspect`: parts, release, fingerprints, keys, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...known_files import known_file
from ...weight_file import file_sha256
from .load import compare_keys, expected_entries, names_config
from .parts import FAMILY, NETWORKS, PARTS, Source, known_version
from .sources import PathLike, find_checkpoint


@dataclass(frozen=True)
class FileReport:
    """One file.

    Attributes:
        sha256: of the whole file.
        known_as: the published file that it is a copy of, or None.
        metadata: of the safetensors header.
    """

    path: str
    format: str
    bytes: int
    sha256: str
    known_as: str | None
    metadata: dict[str, str]


@dataclass(frozen=True)
class PartReport:
    """One part in one file.

    Attributes:
        part: transformer, lq_projection, decoder, prompt or vae.
        bytes: of its tensors as stored.
        fingerprint: sha256 of the raw bytes of small tensors (for a projection, norm1.gamma and conv1.bias).
        version, how_known: its release and what identifies it; None where nothing does, or where the releases share it.
        missing, extra: compared with the network's keys; nothing is compared for a vae or a prompt.
        ignored: keys that nothing here uses.
    """

    part: str
    file: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None
    fingerprint: str | None
    version: str | None
    how_known: str | None
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """A file or folder.

    Attributes:
        family: of the weights ("flashvsr" unless the metadata says otherwise), or None without a FlashVSR part.
        version: "v1", "v1.1", "mixed" (parts of both, which do not go together), or None where nothing identifies it.
        absent: parts of a whole model that are not here.
        unreadable: what was wrong with files that could not be read.
    """

    path: str
    family: str | None
    version: str | None
    files: tuple[FileReport, ...]
    parts: tuple[PartReport, ...]
    absent: tuple[str, ...]
    unreadable: tuple[str, ...]


def inspect_checkpoint(path: PathLike | Mapping[str, PathLike]) -> CheckpointReport:
    """Describes a file, a folder, or a mapping of part → file; hashes the files but loads no network.

    Raises:
        CheckpointError: a file named by the caller cannot be read.
    """
    checkpoint = find_checkpoint(path)
    sources = [source for found in checkpoint.candidates.values() for source in found]
    files = {file.path: file for file in checkpoint.files}
    parts = tuple(_part(source) for source in sources)
    versions = {part.version for part in parts if part.version}
    families = {file.metadata["family"] for file in files.values() if "family" in file.metadata}
    family = None
    if any(part.part in PARTS for part in parts):
        family = families.pop() if len(families) == 1 else FAMILY
    return CheckpointReport(
        path=checkpoint.label,
        family=family,
        version="mixed" if len(versions) > 1 else next(iter(versions), None),
        files=tuple(
            FileReport(
                path=str(file.path),
                format=file.format,
                bytes=file.size_bytes,
                sha256=file_sha256(file.path),
                known_as=known.name if (known := known_file(file)) else None,
                metadata=dict(file.metadata),
            )
            for file in files.values()
        ),
        parts=parts,
        absent=tuple(part for part in PARTS if part not in checkpoint.candidates),
        unreadable=tuple(str(error) for error in checkpoint.unreadable),
    )


def _part(source: Source) -> PartReport:
    entries = source.entries()
    missing, extra = [], []
    if source.part in NETWORKS:
        expected = expected_entries(names_config({source.part: entries}))
        missing, extra = compare_keys(expected[source.part], entries)
    evidence = known_version(source)
    return PartReport(
        part=source.part,
        file=Path(source.file.path).name,
        tensors=len(entries),
        parameters=sum(tensor.numel() for tensor in entries.values()),
        bytes=sum(tensor.nbytes for tensor in entries.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in entries.values()})),
        shape=tuple(entries["context"].shape) if source.part == "prompt" else None,
        fingerprint=source.fingerprint(),
        version=evidence.version if evidence else None,
        how_known=evidence.how if evidence else None,
        missing=tuple(missing),
        extra=tuple(extra),
        ignored=source.ignored,
    )
