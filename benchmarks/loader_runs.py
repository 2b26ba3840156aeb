"""Fifty runs of each loader node in a real ComfyUI: are live tensors the same after each run as after the third?

python -m steadyvsr.benchmarks.loader_runs --comfyui PATH [--python INTERPRETER] [--runs 50] [--json FILE]
"""

from __future__ import annotations

import sys

from steadyvsr.benchmarks import frame


def main(arguments: list[str] | None = None) -> int:
    parser = frame.comfyui_parser(__doc__, "--output", of_its_own=True)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args(arguments)
    seen = frame.session(
        options.comfyui, options.python, "loaders_session.py", "repeated", STEADYVSR_RUNS=str(options.runs)
    )
    missed = []
    for name, loader in seen["repeated"].items():
        third, later = loader["bytes"][2], loader["bytes"][3:]
        print(f"{name}: {loader['loaded']} B on the card in a run; {third} B live after run 3, after runs 4 to "
              f"{options.runs}: {min(later)} to {max(later)} B")  # fmt: skip
        if set(later) != {third}:
            missed.append(f"{name}: {third} B after every run")
    figures = {"comfyui": frame.version_of(options.comfyui), "runs": options.runs, "loaders": seen["repeated"]}
    return frame.finish(options.json, figures, missed)


if __name__ == "__main__":
    sys.exit(main())
