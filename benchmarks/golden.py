"""Checks every golden vector of a folder against the networks and the engine, in fp32 on the CPU.

    python -m steadyvsr.benchmarks.golden FOLDER [--json FILE]

Sizes, cases and tolerances come from the folder's index.json; see app/card/golden.py. Exit status 1 where a vector is
missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steadyvsr.app.card.golden import Folder, check_entry
from steadyvsr.benchmarks import frame


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    folder = Folder(options.folder)
    report, missed = {}, []
    for name in folder.entries:
        checks = check_entry(folder, name)
        failed = [check for check in checks if not check.passed]
        missed += [f"{name} {check.name}" for check in failed] if checks else [f"{name} compares nothing"]
        worst = max((check.difference for check in checks if "mask" not in check.name), default=float("nan"))
        flips = sum(int(check.difference) for check in checks if "mask" in check.name)
        tolerance = folder.entries[name]["tolerance"]
        report[name] = {"comparisons": len(checks), "failed": len(failed), "largest_difference": worst}
        report[name] |= {"mask_bits_different": flips, "rtol": tolerance["rtol"], "atol": tolerance["atol"]}
        print(f"{name:10} {len(checks):3} comparisons, {len(failed)} missed, largest difference {worst:.2e}, "
              f"mask bits different {flips} (rtol {tolerance['rtol']:g}, atol {tolerance['atol']:g})")  # fmt: skip
        for check in failed:
            print(f"    missed: {check.name}: {check.difference:.3e}, {check.excess:.3e} beyond the tolerance")
    total = sum(row["comparisons"] for row in report.values())
    print(f"{len(report)} entries, {total} comparisons, {len(missed)} missed")
    return frame.finish(options.json, {"entries": report}, missed)


if __name__ == "__main__":
    sys.exit(main())
