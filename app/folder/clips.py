"""Which clips a folder holds, and where their results go."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".gif"}
)
OUTPUT_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm"})
"""What the writer can make; a clip of another kind becomes .mp4."""


@dataclass(frozen=True)
class Job:
    """One clip and its result.

    Attributes:
        name: of the clip below the input folder, with forward slashes.
        source, output: paths.
        size, mtime_ns: of the source, by which a changed clip is known.
    """

    name: str
    source: Path
    output: Path
    size: int
    mtime_ns: int


def holds_videos(folder: Path) -> bool:
    """Whether a folder, or one below it, has a video in it; else it may be a folder of pictures."""
    return any(Path(name).suffix.lower() in VIDEO_SUFFIXES for _, _, files in os.walk(folder) for name in files)


def find_jobs(source: Path, output: Path) -> list[Job]:
    """Every video below `source`, in the order of names; sub-folders are kept below `output`.

    Files whose results would have one name get their suffix into it: clip.avi and clip.mp4 become clip_avi.mp4 and
    clip.mp4. The output folder may lie inside the input folder; it is not searched.

    Raises:
        ValueError: no folder, no video in it, or both folders are one.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: expected a folder of videos; got {'a file' if source.exists() else 'nothing'}.")
    if source.resolve() == output.resolve():
        raise ValueError(f"{output}: expected another folder than the videos lie in. Choose another OUT.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a folder for the results; got a file. Choose another OUT.")
    found = []
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if (Path(folder) / name).resolve() != output.resolve())
        found += [Path(folder) / name for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    if not found:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(f"{source}: expected videos ({suffixes}); got none. Choose another folder.")
    found.sort()
    plain = {path: _result(path.relative_to(source)) for path in found}
    counts = Counter(str(result).lower() for result in plain.values())
    jobs = []
    for path in found:
        name, result = path.relative_to(source), plain[path]
        if counts[str(result).lower()] > 1 and path.suffix.lower() != result.suffix:
            result = result.with_name(f"{name.stem}_{name.suffix.lstrip('.').lower()}{result.suffix}")
        stat = path.stat()
        jobs.append(Job(name.as_posix(), path, output / result, stat.st_size, stat.st_mtime_ns))
    return jobs


def _result(name: Path) -> Path:
    return name if name.suffix in OUTPUT_SUFFIXES else name.with_suffix(".mp4")
