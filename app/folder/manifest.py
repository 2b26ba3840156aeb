"""Records which clips of a folder are done: written atomically after every clip, so that a rerun does only the rest."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .jobs import Job
from .worker import DONE, WorkerSettings

FILE = ".steadyvsr.json"
FORMAT = 1


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
        self.path = folder / FILE
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.clips: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.clips = dict(stored["clips"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: expected the record of an earlier run; got an unreadable file. "
                    "Delete it to start anew."
                ) from error

    def finished(self, job: Job) -> bool:
        """Whether this very clip was done with these settings and its result is unchanged since."""
        entry = self.clips.get(job.name)
        if entry is None or entry["state"] != DONE or entry["settings"] != self.settings:
            return False
        if (entry["size"], entry["mtime_ns"]) != (job.size, job.mtime_ns):
            return False
        return job.output.is_file() and job.output.stat().st_size == entry["output_size"]

    def record(self, job: Job, state: str, **more: Any) -> None:
        """Stores the outcome of a clip."""
        self.clips[job.name] = {
            "state": state,
            "settings": self.settings,
            "size": job.size,
            "mtime_ns": job.mtime_ns,
            "output": job.output.name,
            "output_size": job.output.stat().st_size if state == DONE else 0,
            **more,
        }
        part = self.path.with_name(f"{self.path.name}.part")
        text = json.dumps({"format": FORMAT, "clips": self.clips}, indent=1, ensure_ascii=False)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)


def folder_settings(settings: WorkerSettings) -> dict[str, Any]:
    """The part of the settings that changes a result. A manifest is valid for one such set."""
    plain = asdict(replace(settings, device="", threads=1))
    weights = Path(settings.model)
    files = [weights] if weights.is_file() else sorted(path for path in weights.glob("*") if path.is_file())
    plain["weights"] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    plain["model"] = weights.name
    return plain
