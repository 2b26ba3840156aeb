"""The checkpoints a user can choose from: what lies in `models/flashvsr`, and the embedded network."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

MODEL_FOLDER = "flashvsr"
NANO = "nano (embedded)"
NANO_FILE = Path(__file__).resolve().parents[1] / "assets" / "nano.safetensors"
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".pth", ".pt"}


def register_model_folder() -> None:
    """Makes `models/flashvsr` known to ComfyUI, and with it every `flashvsr` entry of extra_model_paths.yaml."""
    default = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
    folder_paths.add_model_folder_path(MODEL_FOLDER, default, is_default=True)


def found_sets() -> dict[str, Path]:
    """Name → path of every folder or merged file in the registered folders; the first folder wins a name."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(MODEL_FOLDER)):
        if not root.is_dir():
            continue
        for entry in sorted(root.iterdir()):
            weights = [entry] if entry.is_file() else [path for path in entry.iterdir() if path.is_file()]
            if any(path.suffix in WEIGHT_SUFFIXES and path.stat().st_size for path in weights):
                found.setdefault(entry.name, entry)
    return found


def choices() -> list[str]:
    return [NANO, *sorted(found_sets())]


def resolve(name: str, node: str) -> Path:
    """The folder or file behind a choice. The name comes from a workflow: it is looked up, never joined to a path.

    Raises:
        ValueError: nothing of that name is there.
    """
    if name == NANO:
        return NANO_FILE
    found = found_sets()
    if name not in found:
        raise ValueError(
            f"{node}: expected a model set of {', '.join([NANO, *sorted(found)])}; got {name!r}. "
            f"Put its folder or merged file into {folder_paths.get_folder_paths(MODEL_FOLDER)[0]} and reload the page."
        )
    return found[name]


def fingerprint(path: Path) -> str:
    """Changes when a file of the set is replaced: names, sizes and modification times."""
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
