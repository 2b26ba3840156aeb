"""What scripts saw that run in processes of their own: in a ComfyUI, or on the double of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from steadyvsr.tests.comfy.server import PYTHON

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1800
"""Of one script, against hanging: a minute or two on a machine that has nothing else to do."""


def ran(script: Path, *arguments: str | Path, place: Path | None = None, **environment: str) -> Any:
    """The JSON on the last line of a script's output.

    Args:
        place: the folder of a ComfyUI, which is the script's working directory and whose Python runs it; None: it runs
            here, by the tests' own Python.
        environment: variables beside those of the tests.
    """
    done = subprocess.run(
        [sys.executable if place is None else PYTHON, str(script), *map(str, arguments)],
        cwd=place, capture_output=True, text=True, timeout=LIMIT_SECONDS, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@cache
def played(script: Path, place: Path | None) -> Any:
    """What a script that takes PACK_FOLDER and double | comfyui saw in a place; None is the double. Run once."""
    return ran(script, ROOT, "double" if place is None else "comfyui", place=place)


def scenario(observed: dict[str, Any], name: str) -> Any:
    """One scenario's part, unless an error ended it."""
    found = observed[name]
    error = str(found.get("error", "")) if isinstance(found, dict) else ""
    assert "Traceback" not in error, error
    return found
