"""Where models and files lie: under the folder given as --base-directory."""

from __future__ import annotations

import sys
from pathlib import Path

base_path = Path(sys.argv[sys.argv.index("--base-directory") + 1] if "--base-directory" in sys.argv else ".")
models_dir = str(base_path / "models")
FOLDERS = ("checkpoints", "diffusion_models", "embeddings", "loras", "text_encoders", "vae", "vae_approx")
folder_names_and_paths = {name: [str(base_path / "models" / name)] for name in FOLDERS}


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    paths = folder_names_and_paths.setdefault(folder_name, [])
    if full_folder_path not in paths:
        paths.insert(0 if is_default else len(paths), full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return list(folder_names_and_paths[folder_name])


def get_filename_list(folder_name: str) -> list[str]:
    folders = [Path(path) for path in folder_names_and_paths[folder_name]]
    return sorted(file.name for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())


def get_full_path(folder_name: str, filename: str) -> str | None:
    paths = [Path(path) / filename for path in folder_names_and_paths[folder_name]]
    return next((str(path) for path in paths if path.is_file()), None)


def get_temp_directory() -> str:
    return str(base_path / "temp")
