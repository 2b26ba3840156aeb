"""What the wrappers cost while nothing is kept: µs per call of soft_empty_cache and free_memory, beside ComfyUI's own.

    python -m steadyvsr.benchmarks.free_overhead [--json FILE]                       on the double of the tests
    python -m steadyvsr.benchmarks.free_overhead --comfyui PATH [--json FILE]        in ComfyUI, by ComfyUI's Python

Rounds of both kinds alternate, each short enough to be left alone on a busy machine now and then; the smallest mean
of a round counts. Exit status 1 above 20 µs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steadyvsr.tests.session.comfyui_place import find_comfyui

LIMIT_US = 20.0
CALLS, ROUNDS = 100, 300


def mean_us(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def model_management(comfyui: Path | None) -> Any:
    """ComfyUI's module, of a checkout or of the tests' double."""
    if comfyui is None:
        find_comfyui("double")
    else:
        os.chdir(comfyui)
        find_comfyui("comfyui")
    return importlib.import_module("comfy.model_management")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    target = options.json and options.json.resolve()
    mm = model_management(options.comfyui and options.comfyui.resolve())
    wrappers = importlib.import_module("steadyvsr.patches.hooks")
    device = mm.get_torch_device()
    calls: dict[str, tuple] = {"soft_empty_cache": (), "free_memory": (0, device)}
    best: dict[str, dict[str, float]] = {name: {"stock": float("inf"), "wrapped": float("inf")} for name in calls}
    for _ in range(ROUNDS):
        for kind, prepare in (("stock", wrappers.uninstall), ("wrapped", wrappers.install)):
            prepare()
            for name, given in calls.items():
                function = getattr(mm, name)
                best[name][kind] = min(best[name][kind], mean_us(lambda f=function, g=given: f(*g)))
    found = {
        name: {**times, "overhead": times["wrapped"] - times["stock"], "ratio": times["wrapped"] / times["stock"]}
        for name, times in best.items()
    }
    for name, times in found.items():
        print(
            f"{name}: {times['stock']:.2f} µs alone, {times['wrapped']:.2f} µs with wrappers, "
            f"{times['overhead']:+.2f} µs, ratio {times['ratio']:.2f}"
        )
    if target:
        version = getattr(sys.modules.get("comfyui_version"), "__version__", None)
        if options.comfyui and version is None:
            version = importlib.import_module("comfyui_version").__version__
        record = {"place": f"ComfyUI {version}" if options.comfyui else "double", "python": platform.python_version()}
        target.write_text(json.dumps({**record, "calls": CALLS, "rounds": ROUNDS, "us": found}, indent=1) + "\n")
    return int(any(times["overhead"] > LIMIT_US for times in found.values()))


if __name__ == "__main__":
    sys.exit(main())
