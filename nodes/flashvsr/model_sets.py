"""The checkpoints a user can choose: the embedded network, those in `models/flashvsr`, the official releases."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths

from ...models.flashvsr.checkpoint import NANO_FILE
from ...models.flashvsr.checkpoint.download import PROMPT, WEIGHTS, download_flashvsr
from ...models.weight_file import SUFFIXES

MODEL_FOLDER = "flashvsr"
NANO = "nano (embedded)"
OFFICIAL = {"FlashVSR-v1.1": "v1.1", "FlashVSR": "v1"}
"""Folder names of the official releases, named like their repositories: a choice stays valid after its download."""
OFFICIAL_GB = 6.4


def register_model_folder() -> None:
    """Makes `models/flashvsr` known to ComfyUI, and with it every `flashvsr` entry of extra_model_paths.yaml."""
    default = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
    folder_paths.add_model_folder_path(MODEL_FOLDER, default, is_default=True)


def found_sets() -> dict[str, Path]:
    """Name → path of every set in the registered folders: sub-folders with weights, files, and the folder itself.

    A registered folder with several weight files is a set of its own, named after the folder with a slash. Of equal
    names, the first one counts.
    """
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(MODEL_FOLDER)):
        files = _weights(root)
        if len(files) > 1:
            found.setdefault(f"{root.name}/", root)
        for file in files:
            found.setdefault(file.name, file)
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if _weights(folder):
                found.setdefault(folder.name, folder)
    return found


def _weights(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def choices() -> list[str]:
    return list(dict.fromkeys([NANO, *sorted(found_sets()), *OFFICIAL]))


def resolve(name: str, download: bool, node: str, node_id: str | None) -> Path:
    """The folder or file behind a choice; with `download`, an official release that is missing is fetched.

    The name comes from a workflow, so it is looked up and never joined to a path.

    Raises:
        ValueError: there is no set of that name.
        DownloadError: the release could not be fetched.
    """
    if name == NANO:
        return NANO_FILE
    found, root = found_sets(), Path(folder_paths.get_folder_paths(MODEL_FOLDER)[0])
    if name in OFFICIAL and download:
        folder = found.get(name, root / name)
        if not all((folder / file).is_file() for file in (*WEIGHTS, PROMPT)):
            _download(OFFICIAL[name], folder, node_id)
        return folder
    if name in found:
        return found[name]
    if name in OFFICIAL:
        raise ValueError(
            f"{node}: expected the official {name} in {root / name}; it is not there. Turn on download "
            f"({OFFICIAL_GB} GB), or put its files there."
        )
    raise ValueError(
        f"{node}: expected a model set of {', '.join(choices())}; got {name!r}. Put its folder or merged file into "
        f"{root} and reload the node definitions."
    )


def files_of(path: Path) -> list[Path]:
    """The weight files of a set, which is a folder or one merged file."""
    return [path] if path.is_file() else _weights(path)


def fingerprint(name: str) -> str:
    """Changes when a file of the set is replaced: names, sizes and modification times."""
    path = NANO_FILE if name == NANO else found_sets().get(name)
    stats = [(file.name, file.stat()) for file in (files_of(path) if path is not None else ())]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _download(version: str, folder: Path, node_id: str | None) -> None:
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def progress(_file: str, done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    download_flashvsr(version, folder, progress=progress)
