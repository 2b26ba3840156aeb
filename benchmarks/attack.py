"""Attackers against the pack, for as long as wanted: damaged files, hostile requests, faults, kills, presses.

    python -m steadyvsr.benchmarks.attack [--hours N | --count N] [--only checkpoint,video] [--first SEED] [--json FILE]
    python -m steadyvsr.benchmarks.attack --only video --seeds 17,291                     these again

Without --hours and --count each attacker makes as many runs as docs/testing.md tells of. Every failing seed is printed;
once mended it belongs into tests/attack/seeds.json. Exit status 1 where one failed.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from steadyvsr.benchmarks import frame
from steadyvsr.tests.attack.outcome import Outcome

RUNS = {"checkpoint": 2000, "video": 1000, "panel": 2000, "faults": 10_000, "night": 200, "patches": 1_000_000}
"""Attackers, and how many files, clips, requests, faulted runs, kills and steps are asked of each."""
SHOWN_FAILURES = 200
PROGRESS_SECONDS = 60


def seeds_until(first: int, seconds: float) -> Iterator[int]:
    deadline = time.monotonic() + seconds
    for seed in itertools.count(first):
        if time.monotonic() >= deadline:
            return
        yield seed


def printable(text: str) -> str:
    """Text that no terminal obeys and every encoding has."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def attacked(name: str, seeds: Iterable[int], wanted: float) -> dict[str, Any]:
    """Runs one attacker in this process until it has made `wanted` runs, and tells what became of them."""
    run = importlib.import_module(f"steadyvsr.tests.attack.{name}").run
    ends: Counter[str] = Counter()
    failures: dict[str, list[dict[str, Any]]] = {}
    runs = good = 0
    slowest: tuple[float, int] = (0.0, 0)
    largest: tuple[int, int] = (0, 0)
    started = told = time.monotonic()
    for seed in seeds:
        outcome: Outcome = run(seed)
        runs += outcome.units
        ends[outcome.end] += outcome.units
        good += outcome.units if outcome.good else 0
        slowest, largest = max(slowest, (outcome.seconds, seed)), max(largest, (outcome.grown_bytes, seed))
        if not outcome.good:
            case, detail = printable(outcome.case), printable(outcome.detail)
            print(f"{name} {seed}: {outcome.end}: {case}: {detail[:200]}", flush=True)
            failures.setdefault(outcome.end, []).append({"seed": seed, "case": case, "detail": detail})
        if runs >= wanted:
            break
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{name}: {good} of {runs} good after {told - started:.0f} s", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    return {
        "runs": runs, "good": good, "failed": sum(map(len, failures.values())), "ends": dict(ends.most_common()),
        "seconds": round(seconds, 1), "runs_per_second": round(runs / seconds, 2),
        "slowest": {"seconds": round(slowest[0], 2), "seed": slowest[1]},
        "largest_growth": {"bytes": largest[0], "seed": largest[1]},
        "failures": {end: found[:SHOWN_FAILURES] for end, found in sorted(failures.items())},
    }  # fmt: skip


def in_its_own_process(name: str, arguments: list[str]) -> dict[str, Any]:
    """One attacker by this program: some of them make their process a ComfyUI, others fork it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        command = [
            sys.executable,
            "-m",
            "steadyvsr.benchmarks.attack",
            "--only",
            name,
            "--json",
            str(target),
            *arguments,
        ]
        code = subprocess.run(command).returncode
        if not target.exists():
            return {"runs": 0, "good": 0, "failed": 1, "failures": {"the attacker ended": f"exit status {code}"}}
        return json.loads(target.read_text())["attackers"][name]


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--hours", type=float, help="in all, shared among the attackers")
    parser.add_argument("--count", type=int, help="runs of each attacker")
    parser.add_argument("--only", default=",".join(RUNS), help="names, joined by commas (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", help="these alone, joined by commas")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - set(RUNS):
        parser.error(f"--only: expected {', '.join(RUNS)}; got {', '.join(sorted(unknown))}.")
    found = {}
    for name in names:
        seconds = options.hours * 3600 / len(names) if options.hours else None
        wanted = options.count or (RUNS[name] if seconds is None else float("inf"))
        if len(names) > 1:
            limit = ["--hours", str(seconds / 3600)] if seconds else ["--count", str(wanted)]
            found[name] = in_its_own_process(name, [*limit, "--first", str(options.first)])
        else:
            seeds: Iterable[int] = itertools.count(options.first)
            if options.seeds:
                seeds = [int(seed) for seed in options.seeds.split(",")]
            elif seconds is not None:
                seeds = seeds_until(options.first, seconds)
            found[name] = attacked(name, seeds, wanted)
    rows = [["attacker", "runs", "good", "failing seeds", "seconds"]]
    rows += [
        [name, *(str(figures.get(key, "")) for key in ("runs", "good", "failed", "seconds"))]
        for name, figures in found.items()
    ]
    print(frame.table(rows))
    missed = [f"{name}: {figures['failed']} failing seeds" for name, figures in found.items() if figures["failed"]]
    return frame.finish(options.json, {"attackers": found}, missed)


if __name__ == "__main__":
    sys.exit(main())
