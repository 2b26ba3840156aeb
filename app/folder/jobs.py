"""Finds the clips in a folder and decides where their results go."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".gif"}
)
OUTPUT_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm"})
"""Containers that the writer can make. A clip in any other becomes .mp4."""


@dataclass(frozen=True)
class Job:
    """One clip and where its result goes.

    Attributes:
        name: path of the clip relative to the input folder, with forward slashes.
        source, output: paths.
        size, mtime_ns: of the source; they tell whether the clip has changed.
    """

    name: str
    source: Path
    output: Path
    size: int
    mtime_ns: int


def holds_videos(folder: Path) -> bool:
    """Whether there is a video in the folder or below it. If not, it may be a folder of images."""
    return any(Path(name).suffix.lower() in VIDEO_SUFFIXES for _, _, files in os.walk(folder) for name in files)


def find_jobs(source: Path, output: Path) -> list[Job]:
    """Every video below `source`, sorted by name, each with its path below `output`. Sub-folders are kept.

    Where two results would have the same name, the suffix becomes part of it: clip.avi and clip.mp4 become clip_avi.mp4
    and clip.mp4. The output folder may lie inside the input folder; it is not searched.

    Raises:
        ValueError: `source` is no folder or has no video in it, or both folders are the same.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: expected a folder of videos; got {'a file' if source.exists() else 'nothing'}.")
    if source.resolve() == output.resolve():
        raise ValueError(f"{output}: expected a folder other than IN; got the same. Choose another OUT.")
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
    names = [path.relative_to(source) for path in found]
    results = [name if name.suffix in OUTPUT_SUFFIXES else name.with_suffix(".mp4") for name in names]
    counts = Counter(str(result).lower() for result in results)
    jobs = []
    for path, name, result in zip(found, names, results, strict=True):
        if counts[str(result).lower()] > 1 and path.suffix.lower() != result.suffix:
            result = result.with_name(f"{name.stem}_{name.suffix.lstrip('.').lower()}{result.suffix}")
        stat = path.stat()
        jobs.append(Job(name.as_posix(), path, output / result, stat.st_size, stat.st_mtime_ns))
    return jobs
