"""What the wrappers cost while nothing is kept: µs per call of soft_empty_cache and free_memory, beside ComfyUI's own.

    python -m steadyvsr.benchmarks.free_overhead [--json FILE]                       on the double of the tests
    python -m steadyvsr.benchmarks.free_overhead --comfyui PATH [--json FILE]        in ComfyUI, by ComfyUI's Python

Rounds of both kinds alternate, each short enough to be left alone on a busy machine now and then; the smallest mean
of a round counts. Exit status 1 above 20 µs.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

from steadyvsr.benchmarks import frame
from steadyvsr.tests.session.comfyui_place import find_comfyui

LIMIT_US = 20.0
CALLS, ROUNDS = 100, 300


def mean_us(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def main(arguments: list[str] | None = None) -> int:
    options = frame.comfyui_parser(__doc__, required=False).parse_args(arguments)
    if options.comfyui:
        frame.enter(options.comfyui)
    else:
        find_comfyui("double")
    mm: Any = importlib.import_module("comfy.model_management")
    hooks: Any = importlib.import_module("steadyvsr.patches.hooks")
    device = mm.get_torch_device()

    def round_of(prepare: Callable[[], Any]) -> dict[str, float]:
        prepare()
        soft_empty_cache, free_memory = mm.soft_empty_cache, mm.free_memory
        return {
            "soft_empty_cache": mean_us(soft_empty_cache),
            "free_memory": mean_us(lambda: free_memory(0, device)),
        }

    rounds = frame.in_turn(
        {"stock": lambda: round_of(hooks.uninstall), "wrapped": lambda: round_of(hooks.install)}, ROUNDS
    )
    found, missed = {}, []
    for name in ("soft_empty_cache", "free_memory"):
        stock, wrapped = (min(seen[name] for seen in rounds[kind]) for kind in ("stock", "wrapped"))
        found[name] = {"stock": stock, "wrapped": wrapped, "overhead": wrapped - stock, "ratio": wrapped / stock}
        print(f"{name}: {stock:.2f} µs alone, {wrapped:.2f} µs with wrappers, "
              f"{wrapped - stock:+.2f} µs, ratio {wrapped / stock:.2f}")  # fmt: skip
        if wrapped - stock > LIMIT_US:
            missed.append(f"{name} within {LIMIT_US:g} µs")
    place = f"ComfyUI {frame.version_of(options.comfyui)}" if options.comfyui else "double"
    return frame.finish(options.json, {"place": place, "calls": CALLS, "rounds": ROUNDS, "us": found}, missed)


if __name__ == "__main__":
    sys.exit(main())
