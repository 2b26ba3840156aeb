"""Records which clips of a folder are done: written atomically after every clip, so that a rerun does only the rest.

It is also the list of what this program made: only such files are ever replaced without --force.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .jobs import RECORD, Job
from .worker import DONE, WorkerSettings

FORMAT = 1
CLOCK_NS = 2_000_000_000
"""Some disks store times in steps of two seconds (FAT)."""
_FIELDS = {"state": str, "settings": str, "output": str, "size": int, "mtime_ns": int, "output_size": int}

Signature = list[int]
"""Size and time of a file, by which it is known again; of a record of 0.2 the size alone."""


class Manifest:
    """The record of finished clips, a file in the output folder.

    Args:
        folder: of the results; made if it does not exist.
        settings: everything that changes a result. A clip that was done with other settings is done again.

    Raises:
        ValueError: there is a record, but it cannot be read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RECORD
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.clips: dict[str, dict[str, Any]] = {}
        self._made: dict[str, list[Signature]] = {}
        self.read()

    def read(self) -> None:
        """Takes over what the file says now. An entry that is none is left out: its clip is done again."""
        clips: dict[str, Any] = {}
        if os.path.lexists(self.path):
            try:
                clips = dict(json.loads(self.path.read_text(encoding="utf-8"))["clips"])
            except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: expected the record of an earlier run; got an unreadable file. "
                    "Delete it to start anew."
                ) from error
        self.clips = {name: entry for name, entry in clips.items() if _is_entry(entry)}
        self._made = {}
        for name, entry in self.clips.items():
            self._made.setdefault(_place_of(name, entry["output"]), []).extend(_signatures(entry))

    def finished(self, job: Job) -> bool:
        """Whether this very clip was done with these settings and its result is unchanged since."""
        entry = self.clips.get(job.name)
        if entry is None or entry["state"] != DONE or entry["settings"] != self.settings:
            return False
        if (entry["size"], entry["mtime_ns"]) != (job.size, job.mtime_ns):
            return False
        return job.output.is_file() and job.output.stat().st_size == entry["output_size"]

    def may_write(self, job: Job) -> bool:
        """Whether the name of the result is free, or its file was made by an earlier run and not changed since."""
        return self._is_own(job.output, self._made.get(_place_of(job.name, job.output.name), []))

    def record(self, job: Job, state: str, staged: Path | None = None, **more: Any) -> None:
        """Stores the outcome of a clip.

        Args:
            staged: the complete result, which gets its name right after: a run that is killed in between leaves an
                entry that does not fit the folder, and so a clip to do again, never a result that nobody knows.

        Raises:
            OSError: the record cannot be written (a full disk). The one on the disk stays as it was.
        """
        place = _place_of(job.name, job.output.name)
        made, earlier = self._made.get(place, []), self.clips.get(job.name, {})
        if state == DONE:
            stat = (staged or job.output).stat()
            # The file that stands there now stays known: this run may be killed before the new one has its name.
            made = [each for each in made if os.path.lexists(job.output) and self._is_own(job.output, [each])]
            made.append([stat.st_size, stat.st_mtime_ns])
        self._made[place] = made
        self.clips[job.name] = {
            "state": state,
            "settings": self.settings,
            "size": job.size,
            "mtime_ns": job.mtime_ns,
            "output": job.output.name,
            "output_size": made[-1][0] if state == DONE else 0,
            "made": made,
            **({"partial": earlier["partial"]} if "partial" in earlier else {}),
            **more,
        }
        self._write()

    def add_partial(self, job: Job, staged: Path) -> Path:
        """Gives the readable part of a clip the first free name of clip.partial.mp4, clip.partial2.mp4, …."""
        self.drop_partial(job)
        names = (f"{job.output.stem}.partial{n if n > 1 else ''}{job.output.suffix}" for n in range(1, 10_000))
        target = next(path for path in map(job.output.with_name, names) if not os.path.lexists(path))
        stat = staged.stat()
        self.clips[job.name]["partial"] = [target.name, stat.st_size, stat.st_mtime_ns]
        self._write()
        os.replace(staged, target)
        return target

    def drop_partial(self, job: Job) -> None:
        """Removes the readable part that an earlier run made of a clip, unless somebody changed it."""
        match self.clips.get(job.name, {}).get("partial"):
            case [str(name), int(size), int(moment)] if PurePosixPath(name).name == name:
                path = job.output.with_name(name)
                if path.is_file() and self._is_own(path, [[size, moment]]):
                    path.unlink()

    def _is_own(self, path: Path, made: list[Signature]) -> bool:
        if not os.path.lexists(path):
            return True
        stat = path.lstat()
        return any(
            stat.st_size == size and all(abs(stat.st_mtime_ns - moment) <= CLOCK_NS for moment in moments)
            for size, *moments in made
        )

    def _write(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        # Only the run that holds the folder's lock gets here: what stands there is left from one that was killed.
        part.unlink(missing_ok=True)
        with part.open("x", encoding="ascii") as file:
            json.dump({"format": FORMAT, "clips": self.clips}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)


def _place_of(name: str, output: str) -> str:
    """Path of a clip's result below the output folder: the tree is that of the clips."""
    return (PurePosixPath(name).parent / output).as_posix()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in _FIELDS.items())


def _signatures(entry: dict[str, Any]) -> Iterator[Signature]:
    match entry.get("made"):
        case list(made):
            yield from (each for each in made if isinstance(each, list) and [*map(type, each)] in ([int], [int, int]))
        case None if entry["state"] == DONE:
            yield [entry["output_size"]]


def folder_settings(settings: WorkerSettings) -> dict[str, Any]:
    """The part of the settings that changes a result. A manifest is valid for one such set."""
    plain = asdict(replace(settings, device="", threads=1))
    # Younger than the first manifests, which hold as long as nobody asks for another preset.
    if plain["output"].pop("preset") is not None:
        plain["output"]["preset"] = settings.output.preset
    plain["output"].pop("threads")
    weights = Path(settings.model)
    files = [weights] if weights.is_file() else sorted(path for path in weights.glob("*") if path.is_file())
    plain["weights"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    plain["model"] = weights.name
    return plain
