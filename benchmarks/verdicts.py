"""Verdicts of offloads on cards of every behaviour, the holders of planted leaks, and how well growth is found.

    python -m steadyvsr.benchmarks.verdicts [--json FILE]

The cards, the plants and the series are those of tests/memory (test_offload.py, test_holders.py, test_leak.py). Exit
status 1 where a verdict is wrong, fewer than nine of ten holders are named, or more than 1 % of level series alarm.
"""

from __future__ import annotations

import sys

import numpy as np
from steadyvsr.benchmarks import frame
from steadyvsr.benchmarks.frame import MIB
from steadyvsr.memory import leak
from steadyvsr.tests.memory import test_holders, test_leak, test_offload

SERIES, LEVEL_SERIES, LEVEL_RUNS = 300, 1000, 40
HOLDERS_NAMED, FALSE_ALARMS = 0.9, 0.01


def verdicts() -> list[dict]:
    """One row for each behaviour and size of a model."""
    rows = []
    for behaviour, expected in test_offload.VERDICTS:
        for size in (6 << 30, 100 * MIB, 3 * MIB):
            verdict = test_offload.Model(behaviour, size).offload().verdict
            rows.append({"card": behaviour, "bytes": size, "verdict": verdict.value, "right": verdict is expected})
    return rows


def holders() -> list[dict]:
    """One row for each planted leak: what the search called its holder, and whether that is true."""
    rows = []
    for plant, roots, words in test_holders.PLANTED:
        found = test_holders.search(plant, roots or (lambda kept: {}))
        name = " | ".join(holder.name for holder in found.holders)
        rows.append(
            {
                "planted": plant.__name__,
                "named": name,
                "bytes": found.holders[0].bytes if found.holders else 0,
                "right": all(word in name for word in words) and found.unnamed == 0,
                "seconds": round(found.seconds, 2),
            }
        )
    for leaked in (test_holders.LEAKED_LIST, test_holders.LEAKED_FUNCTIONS, test_holders.LEAKED_ERRORS):
        leaked.clear()
    return rows


def growth() -> dict[str, float]:
    """Shares of drawn series: a leak of 1 MiB per run in noise of ± 4 MiB, and no leak in the same noise."""
    generator = np.random.default_rng(7)
    planted = [test_leak.planted(generator, 20, MIB) for _ in range(SERIES)]

    def slopes(runs: int) -> np.ndarray:
        """In MiB per run."""
        fitted = [leak.fit(series[:runs].tolist()) for series in planted]
        return np.array([line.slope / MIB for line in fitted if line])

    level = [500 * MIB + generator.uniform(-test_leak.NOISE, test_leak.NOISE, LEVEL_RUNS) for _ in range(LEVEL_SERIES)]
    return {
        "reported_by_run_12": float(np.mean([test_leak.reported(series[:12]) for series in planted])),
        "mean_slope_at_run_12": float(np.mean(slopes(12))),
        "slope_within_20_percent_at_run_12": float(np.mean(np.abs(slopes(12) - 1) < 0.2)),
        "slope_within_20_percent_at_run_20": float(np.mean(np.abs(slopes(20) - 1) < 0.2)),
        "false_alarms": float(np.mean([test_leak.reported(series) for series in level])),
    }


def main(arguments: list[str] | None = None) -> int:
    options = frame.parser(__doc__).parse_args(arguments)
    judged, named, found = verdicts(), holders(), growth()
    for row in judged:
        print(f"{row['card']:<18}{row['bytes'] / MIB:>8.0f} MiB  {row['verdict']:<14}{'' if row['right'] else 'WRONG'}")
    right = sum(row["right"] for row in judged)
    print(f"{right} of {len(judged)} verdicts right\n")
    for row in named:
        print(f"{row['planted']:<18}{row['bytes'] / MIB:>5.2f} MiB  {row['named'] or 'nobody'}"
              f"{'' if row['right'] else '  WRONG'}")  # fmt: skip
    true = sum(row["right"] for row in named)
    print(f"{true} of {len(named)} planted holders named\n")
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<36}{value:.3f}")
    targets = {
        "verdicts": right == len(judged),
        "holders": true >= HOLDERS_NAMED * len(named),
        "false alarms": found["false_alarms"] <= FALSE_ALARMS,
    }
    figures = {"verdicts": judged, "holders": named, "growth": found}
    return frame.finish(options.json, figures, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
