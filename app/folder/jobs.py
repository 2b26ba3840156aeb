"""Finds the clips in a folder and decides where their results go."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".gif"}
)
OUTPUT_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm"})
"""Containers that the writer can make. A clip in any other becomes .mp4."""
RECORD = ".steadyvsr.json"
"""Name of the record in a folder of results."""
PLACE = ".steadyvsr-"
"""With which the names of folders begin that hold a result as it grows; a killed run may have left one."""


@dataclass(frozen=True)
class Job:
    """One clip and where its result goes.

    Attributes:
        name: path of the clip relative to the input folder, with forward slashes.
        source, output: paths.
        size, mtime_ns: of the source; they tell whether the clip has changed.
        problem: why there is nothing to read, or "".
    """

    name: str
    source: Path
    output: Path
    size: int
    mtime_ns: int
    problem: str = ""


def holds_videos(folder: Path) -> bool:
    """Whether there is a video in the folder or below it. If not, it may be a folder of images."""
    return any(Path(name).suffix.lower() in VIDEO_SUFFIXES for _, _, files in os.walk(folder) for name in files)


def find_jobs(source: Path, output: Path, note: Callable[[str], object] = lambda text: None) -> list[Job]:
    """Every video below `source`, sorted by name, each with its path below `output`. Sub-folders are kept.

    Where two results would have the same name, the suffix becomes part of it: clip.avi and clip.mp4 become clip_avi.mp4
    and clip.mp4. Not searched, but noted, are linked folders and folders of results; the output folder may lie inside
    the input folder, and the input folder inside the output folder.

    Args:
        note: called with a sentence for the user.

    Raises:
        ValueError: `source` is no folder or has no video in it, or both folders are the same.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: expected a folder of videos; got {'a file' if source.exists() else 'nothing'}.")
    if source.resolve() == output.resolve():
        raise ValueError(f"{output}: expected a folder other than IN; got the same. Choose another OUT.")
    if os.path.lexists(output) and not output.is_dir():
        raise ValueError(f"{output}: expected a folder for the results; got a file. Choose another OUT.")
    names = [path.relative_to(source) for path in sorted(_find_videos(source, output, note))]
    if not names:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(f"{source}: expected videos ({suffixes}); got none. Choose another folder.")
    results = _result_names(names)
    return [_job(name, source / name, output / results[name]) for name in names]


def _find_videos(source: Path, output: Path, note: Callable[[str], object]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        note(f"{error.filename}: this folder cannot be read ({error.strerror}).")

    for folder, folders, files in os.walk(source, onerror=unreadable):
        inside = []
        for path in sorted(Path(folder) / name for name in folders):
            if path.name.startswith(PLACE):
                continue
            if path.is_symlink():
                note(f"{path}: a linked folder, which is not searched. Give it as IN of a run of its own.")
            elif path.resolve() != output.resolve():
                if (path / RECORD).exists():
                    note(f"{path}: results of an earlier run, which are not upscaled again.")
                else:
                    inside.append(path.name)
        folders[:] = inside
        yield from (Path(folder) / name for name in files if Path(name).suffix.lower() in VIDEO_SUFFIXES)


def _result_names(names: list[Path]) -> dict[Path, Path]:
    """A result for each clip, no two alike, also on a disk that does not tell capitals from small letters."""
    found: dict[Path, Path] = {}
    taken: set[str] = set()
    # Clips that keep their whole name come first: theirs is the one that a user expects.
    for name in sorted(names, key=lambda name: name.suffix not in OUTPUT_SUFFIXES):
        keeps = name.suffix in OUTPUT_SUFFIXES
        suffix = name.suffix if keeps else ".mp4"
        result, number = name.with_suffix(suffix), 1
        while str(result).lower() in taken:
            count = "" if number == 1 else f"_{number}"
            result = name.with_name(f"{name.stem}_{name.suffix.lstrip('.').lower()}{count}{suffix}")
            number += 1
        taken.add(str(result).lower())
        found[name] = result
    return found


def _job(name: Path, source: Path, output: Path) -> Job:
    try:
        found = source.stat()
    except OSError as error:
        dangling = source.is_symlink() and isinstance(error, FileNotFoundError)
        problem = "a link that leads nowhere" if dangling else error.strerror or str(error)
        return Job(name.as_posix(), source, output, 0, 0, f"{name.name}: expected a video; got {problem}.")
    # A pipe or a device under such a name would make its reader wait for ever.
    problem = "" if stat.S_ISREG(found.st_mode) else f"{name.name}: expected a video; got something that is no file."
    return Job(name.as_posix(), source, output, found.st_size, found.st_mtime_ns, problem)
