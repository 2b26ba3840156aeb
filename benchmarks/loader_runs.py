"""Fifty runs of each loader node in a real ComfyUI: do live tensors stay what they were after the third?

python -m steadyvsr.benchmarks.loader_runs --comfyui PATH [--python INTERPRETER] [--runs 50] [--output JSON]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has its requirements")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=Path, help="where to write the series as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "custom_nodes" / "steadyvsr"
        pack.parent.mkdir()
        pack.symlink_to(ROOT, target_is_directory=True)
        done = subprocess.run(
            [options.python, str(ROOT / "tests" / "comfy" / "loaders_session.py"), str(pack), folder],
            cwd=options.comfyui,
            env={**os.environ, "STEADYVSR_RUNS": str(options.runs)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    series = json.loads(done.stdout.splitlines()[-1])["repeated"]
    steady = True
    for name, seen in series.items():
        third, later = seen["bytes"][2], seen["bytes"][3:]
        steady &= set(later) <= {third}
        print(f"{name}: {seen['loaded']} B on the card in a run; {third} B live after run 3, after runs 4 to "
              f"{options.runs}: {min(later)} to {max(later)} B")  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps({"runs": options.runs, "loaders": series}, indent=1) + "\n")
    return 0 if steady else 1


if __name__ == "__main__":
    sys.exit(main())
