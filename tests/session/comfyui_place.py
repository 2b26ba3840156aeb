"""Where a scenario script finds ComfyUI: in the folder it was started in, or in the tests' double of it."""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

DOUBLE = Path(__file__).resolve().parents[1] / "double"


def find_comfyui(kind: str, *options: str) -> None:
    """Lets `comfy` be the double ("double") or the ComfyUI in the current folder ("comfyui").

    Args:
        options: of ComfyUI's command line; the double knows `--base-directory`.
    """
    if kind == "double":
        sys.path.insert(0, str(DOUBLE))
        sys.argv += options
        return
    sys.path.insert(0, os.getcwd())
    sys.argv = ["main.py", "--cpu", *options]
    importlib.import_module("comfy.options").enable_args_parsing()


def prepare(kind: str, pack: Path, *options: str) -> None:
    """Finds ComfyUI, and lets `steadyvsr` be the pack in that folder, whatever the folder is called."""
    find_comfyui(kind, *options)
    package = types.ModuleType("steadyvsr")
    package.__path__ = [str(pack)]
    sys.modules["steadyvsr"] = package
