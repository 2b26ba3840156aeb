"""The seven phases of a Wan workflow in a real ComfyUI, on a simulated card with room for one: what is on it when.

    python -m steadyvsr.benchmarks.seven_phases --comfyui PATH [--python INTERPRETER] [--json FILE]

load → LoRA → text encode → sampling patch → VAE encode → sample → VAE decode with small random models, each ended by a
Phase Gate, three rounds, then once for each phase with its offload stubbed out. Runs tests/comfy/phases_session.py
with the Python that has ComfyUI's requirements; the figures go to benchmarks/results/seven_phases_VERSION.json unless
--json names another file.
"""

from __future__ import annotations

import sys

from steadyvsr.benchmarks import frame

HEADS = {
    "phase": "phase", "model": "model", "resident_bytes": "resident B", "peak_bytes": "peak B",
    "after_by_books": "after: books", "after_by_probe": "after: probe", "verdict": "verdict",
    "rounds_equal": "3 rounds equal", "stubbed_gate_fails": "stubbed: gate fails",
}  # fmt: skip


def rows(seen: dict) -> list[dict]:
    """One row for each phase: the second round, compared with the others, and whether a stubbed offload shows."""
    first, second, third = seen["phases"]["rounds"]
    made = []
    for one, two, three in zip(first["phases"], second["phases"], third["phases"], strict=True):
        error = seen["stubbed"][two["phase"]]["error"] or ""
        ((model, resident),) = two["resident_in_phase"].items()
        made.append(
            {
                "phase": two["phase"],
                "model": model,
                "resident_bytes": resident,
                "peak_bytes": two["peak_bytes"],
                "after_by_books": sum(two["after_by_books"].values()),
                "after_by_probe": two["after_by_probe"],
                "verdict": two["receipts"][0]["verdict"],
                "rounds_equal": one == two == three,
                "stubbed_gate_fails": all(word in error for word in (model, f"{resident:,} B", f'"{two["phase"]}"')),
            }
        )
    return made


def good(row: dict) -> bool:
    alone = row["resident_bytes"] == row["peak_bytes"] > 0 == row["after_by_books"] == row["after_by_probe"]
    return alone and row["rounds_equal"] and row["stubbed_gate_fails"]


def cell(value: str | bool | int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,}" if isinstance(value, int) else value


def main(arguments: list[str] | None = None) -> int:
    options = frame.comfyui_parser(__doc__, of_its_own=True).parse_args(arguments)
    version = frame.version_of(options.comfyui)
    seen = frame.session(options.comfyui, options.python, "phases_session.py", "phases", "stubbed")
    found, live = rows(seen), [outcome["live_bytes"] for outcome in seen["phases"]["rounds"]]
    capacity = seen["phases"]["capacity"]
    print(f"ComfyUI {version} · simulated card of {capacity:,} B\n")
    print(frame.table([list(HEADS.values()), *([cell(row[key]) for key in HEADS] for row in found)]))
    print(f"\nlive tensor bytes in RAM after rounds 1 to 3: {', '.join(f'{size:,}' for size in live)}")
    missed = [row["phase"] for row in found if not good(row)]
    missed += ["live bytes after round 3"] if live[1] != live[2] else []
    target = options.json or frame.RESULTS / f"seven_phases_{version}.json"
    figures = {"comfyui": version, "capacity": capacity, "live_bytes": live, "phases": found}
    return frame.finish(target, figures, missed)


if __name__ == "__main__":
    sys.exit(main())
