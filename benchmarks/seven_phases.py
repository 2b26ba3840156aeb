"""The seven phases of a Wan workflow in a real ComfyUI, on a simulated card that holds one model: what lay there when.

    python -m steadyvsr.benchmarks.seven_phases --comfyui PATH [--python PYTHON] [--json FILE]

load → LoRA → text encode → sampling patch → VAE encode → sample → VAE decode with small random models, each ended by a
Phase Gate, three rounds, then once for each phase with its offload stubbed out. Runs tests/comfy/phases_session.py
with the Python that has ComfyUI's requirements.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCENARIOS = ("phases", "stubbed")


def observe(comfyui: Path, python: str) -> dict:
    """What the session saw.

    Raises:
        RuntimeError: the session, or a scenario of it, failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "custom_nodes" / "steadyvsr"
        pack.parent.mkdir()
        pack.symlink_to(ROOT, target_is_directory=True)
        script = ROOT / "tests" / "comfy" / "phases_session.py"
        command = [python, str(script), str(pack), folder, *SCENARIOS]
        run = subprocess.run(command, cwd=comfyui, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    seen = json.loads(run.stdout.splitlines()[-1])
    for name in SCENARIOS:
        if "error" in seen[name]:
            raise RuntimeError(seen[name]["error"])
    return seen


def version_of(comfyui: Path) -> str:
    text = (comfyui / "comfyui_version.py").read_text()
    found = re.search(r"__version__ = \"([^\"]+)\"", text)
    if found is None:
        raise RuntimeError(f"{comfyui}: expected a version in comfyui_version.py; got none")
    return found.group(1)


def rows(seen: dict) -> list[dict]:
    """One row for each phase: the second round, compared with the third, and what the stubbed offload came to."""
    first, second, third = seen["phases"]["rounds"]
    made = []
    for one, two, three in zip(first["phases"], second["phases"], third["phases"], strict=True):
        stubbed = seen["stubbed"][two["phase"]]
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
                "stubbed_gate_fails": all(
                    word in (stubbed["error"] or "") for word in (model, f"{resident:,} B", f'"{two["phase"]}"')
                ),
            }
        )
    return made


def table(found: list[dict]) -> str:
    """The rows as text."""
    heads = {
        "phase": "phase", "model": "model", "resident_bytes": "resident B", "peak_bytes": "peak B",
        "after_by_books": "after: books", "after_by_probe": "after: probe", "verdict": "verdict",
        "rounds_equal": "3 rounds equal", "stubbed_gate_fails": "stubbed: gate fails",
    }  # fmt: skip
    cells = [list(heads.values()), *([_cell(row[key]) for key in heads] for row in found)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: str | bool | int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,}" if isinstance(value, int) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--python", default=os.environ.get("COMFYUI_PYTHON") or sys.executable)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/seven_phases_<version>.json")
    options = parser.parse_args(arguments)
    version = version_of(options.comfyui)
    seen = observe(options.comfyui.resolve(), options.python)
    found, live = rows(seen), [outcome["live_bytes"] for outcome in seen["phases"]["rounds"]]
    print(f"ComfyUI {version} · simulated card of {seen['phases']['capacity']:,} B\n")
    print(table(found))
    print(f"\nlive tensor bytes in RAM after rounds 1 to 3: {', '.join(f'{size:,}' for size in live)}")
    path = options.json or RESULTS / f"seven_phases_{version}.json"
    result = {"comfyui": version, "capacity": seen["phases"]["capacity"], "live_bytes": live, "phases": found}
    path.write_text(json.dumps(result, indent=2) + "\n")
    good = all(
        row["resident_bytes"] == row["peak_bytes"] > 0
        and row["after_by_books"] == row["after_by_probe"] == 0
        and row["rounds_equal"]
        and row["stubbed_gate_fails"]
        for row in found
    )
    return 0 if good and live[1] == live[2] else 1


if __name__ == "__main__":
    raise SystemExit(main())
