"""Finding the parts of a checkpoint, choosing among several, and settling their release; reads no weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...printable import printable
from ...weight_file import SUFFIXES, CheckpointError, WeightFile
from .parts import NETWORKS, PARTS, Source, find_parts, known_version, version_hint

PROMPT_URL = "https://github.com/OpenImagingLab/FlashVSR/raw/main/examples/WanVSR/prompt_tensor/posi_prompt.pth"
PROMPT_FILES = ("posi_prompt.safetensors", "Prompt.safetensors", "posi_prompt.pth")

_LISTED_KEYS = 8
"""How many keys an error names before it only counts them."""

log = logging.getLogger("steadyvsr.checkpoint")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model before anything is loaded.

    Attributes:
        label: what the caller named, for messages.
        folder: where a prompt may be found beside the weights.
        files: those that could be read.
        candidates: part → every place where it was found.
        unreadable: the errors of files in the folder that could not be opened.
    """

    label: str
    folder: Path
    files: list[WeightFile]
    candidates: dict[str, list[Source]]
    unreadable: list[CheckpointError]


def find_checkpoint(path: PathLike | Mapping[str, PathLike]) -> Checkpoint:
    """Opens every file that `path` names and finds the parts in them; reads no weights.

    Raises:
        CheckpointError: nothing is there, or a file that the caller names cannot be read or lacks its part.
    """
    if isinstance(path, Mapping):
        return _find_mapped(path)
    path = Path(path)
    if not path.is_dir():
        file = WeightFile.open(path)
        candidates = {part: [source] for part, source in find_parts(file).items()}
        return Checkpoint(str(path), path.parent, [file], candidates, [])
    paths = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not paths:
        raise CheckpointError(f"{path}: expected a folder with FlashVSR weights; it has no {', '.join(SUFFIXES)} file.")
    checkpoint = Checkpoint(str(path), path, [], {}, [])
    for file_path in paths:
        try:
            file = WeightFile.open(file_path)
            found = find_parts(file)
        except CheckpointError as error:
            log.warning("%s", error)
            checkpoint.unreadable.append(error)
            continue
        checkpoint.files.append(file)
        for part, source in found.items():
            checkpoint.candidates.setdefault(part, []).append(source)
    return checkpoint


def _find_mapped(mapping: Mapping[str, PathLike]) -> Checkpoint:
    unknown = sorted(set(mapping) - set(PARTS))
    if unknown or not mapping:
        raise ValueError(
            f"load_flashvsr: expected a mapping with the keys {', '.join(PARTS)}; got {', '.join(unknown) or 'none'}."
        )
    files = {part: WeightFile.open(file) for part, file in mapping.items()}
    contents = {part: find_parts(file) for part, file in files.items()}
    candidates = {}
    for part, found in contents.items():
        if part not in found:
            raise CheckpointError(
                f"{mapping[part]}: expected the {part}; got {listed(found) or 'keys of no known part'}. "
                f"Name the right file for it."
            )
        candidates[part] = [found[part]]
    # A file can hold more than the part it is named for, such as a projection merged into the transformer.
    for found in contents.values():
        for part in set(found) - set(mapping):
            candidates.setdefault(part, []).append(found[part])
    folder = Path(next(iter(mapping.values()))).parent
    return Checkpoint(" + ".join(str(file) for file in mapping.values()), folder, list(files.values()), candidates, [])


def choose_sources(checkpoint: Checkpoint, version: str) -> dict[str, Source]:
    """One source for each network: among several, the one of the version asked for; copies count once."""
    missing = [part for part in NETWORKS if part not in checkpoint.candidates]
    if missing:
        found = [f"{part} ({source.file.path.name})" for part, all_ in checkpoint.candidates.items() for source in all_]
        if not found:
            names = [name for file in checkpoint.files for name in file.entries]
            found = [f"{len(names)} keys of another model ({listed(names)})"] if names else ["none of them"]
        broken = [f"  {error}" for error in checkpoint.unreadable]
        raise CheckpointError(
            f"{checkpoint.label}: expected the keys of a transformer, an LQ projection and a TC decoder; missing: "
            f"{', '.join(missing)}; found: {', '.join(found)}. Add the file, or pass a mapping of part → file."
            + (" These could not be read:" if broken else ""),
            *broken,
        )
    return {part: _choose(checkpoint, part, version) for part in NETWORKS}


def _choose(checkpoint: Checkpoint, part: str, version: str) -> Source:
    candidates = checkpoint.candidates[part]
    if len(candidates) > 1:
        candidates = _without_copies(candidates)
    if len(candidates) > 1 and version != "auto":
        known = [(source, known_version(source)) for source in candidates]
        same = [source for source, evidence in known if evidence and evidence.version == version]
        candidates = same or [source for source, evidence in known if evidence is None]
    if len(candidates) == 1:
        return candidates[0]
    names = " and ".join(source.file.path.name for source in checkpoint.candidates[part])
    raise CheckpointError(
        f"{checkpoint.label}: expected one {part}; got {names}. Pass a mapping of part → file"
        f"{', or the version' if version == 'auto' else ''}, or move one away."
    )


def _without_copies(candidates: list[Source]) -> list[Source]:
    """The candidates without copies, by fingerprint; of copies, a safetensors file is preferred."""
    distinct: dict[str, Source] = {}
    for source in sorted(candidates, key=lambda source: source.file.format != "safetensors"):
        distinct.setdefault(source.fingerprint() or str(source.file.path), source)
    return list(distinct.values())


def resolve_version(checkpoint: Checkpoint, sources: Mapping[str, Source], version: str) -> str:
    """The version to build for: what the caller says, or with "auto" what the weights are known to be.

    Raises:
        CheckpointError: "auto" and nothing tells it, or transformer and projection are known to be of two releases.
    """
    known = {part: known_version(sources[part]) for part in ("transformer", "lq_projection")}
    transformer, projection = known["transformer"], known["lq_projection"]
    names = {part: sources[part].file.path.name for part in known}
    if transformer and projection and transformer.version != projection.version:
        raise CheckpointError(
            f"{checkpoint.label}: expected a transformer and an LQ projection of one release; "
            f"{names['transformer']} is {transformer.version} (by {transformer.how}), "
            f"{names['lq_projection']} is {projection.version} (by {projection.how}). Together they make ghosts: "
            f"fetch the other half of one of them."
        )
    found = projection or transformer
    if version == "auto":
        if found is None:
            hint = version_hint([checkpoint.folder.name, *names.values()])
            raise CheckpointError(
                f"{checkpoint.label}: expected weights of a known release; these are not known, and v1 and v1.1 have "
                f"the same keys and shapes. Choose version 'v1' or 'v1.1': the wrong one gives ghosting. Weights from "
                f"JunhaoZhuang/FlashVSR are v1, those from JunhaoZhuang/FlashVSR-v1.1 are v1.1."
                + (f" The names look like {hint}, which proves nothing." if hint else "")
            )
        if projection is None:
            log.warning(
                "%s: version %s is that of the transformer (by %s); the LQ projection's own is not known.",
                checkpoint.label,
                found.version,
                found.how,
            )
        return found.version
    for part, evidence in known.items():
        if evidence and evidence.version != version:
            log.warning(
                "%s: loaded as %s, as asked; the %s is %s by %s. If frames ghost, choose that version.",
                names[part],
                version,
                part,
                evidence.version,
                evidence.how,
            )
    return version


def find_prompt(checkpoint: Checkpoint, text_dim: int) -> Source:
    """The prompt context among the weights or else beside them; among several, the one of the right width.

    Raises:
        CheckpointError: there is none, or there are several different ones.
    """
    candidates = checkpoint.candidates.get("prompt", [])
    if not candidates:
        folder = checkpoint.folder
        places = (folder, folder / "prompt_tensor", folder.parent, folder.parent / "prompt_tensor")
        files = [place / name for place in places for name in PROMPT_FILES if (place / name).is_file()]
        candidates = [source for file in files[:1] if (source := find_parts(WeightFile.open(file)).get("prompt"))]
    if len(candidates) > 1:
        fitting = [source for source in candidates if source.entries()["context"].shape[-1] == text_dim]
        candidates = _without_copies(fitting or candidates)
    if not candidates:
        raise CheckpointError(
            f"{checkpoint.label}: expected a prompt context; got none. Get posi_prompt.pth from {PROMPT_URL} and "
            f"put it beside the weights, or pass its path as prompt."
        )
    if len(candidates) > 1:
        names = " and ".join(source.file.path.name for source in candidates)
        raise CheckpointError(
            f"{checkpoint.label}: expected one prompt context; got {names}. Pass one of them as prompt."
        )
    return candidates[0]


def listed(keys: Iterable[str]) -> str:
    """The first few keys, and how many more."""
    keys = [printable(key) for key in keys]
    more = len(keys) - _LISTED_KEYS
    return ", ".join(keys[:_LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")
