"""The attackers for some seconds each: the first seeds, and those that once failed (seeds.json).

For hours, and to try one seed: `python -m steadyvsr.benchmarks.attack`. Kills at night are tested in tests/app.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = json.loads(Path(__file__).with_name("seeds.json").read_text(encoding="utf-8"))
"""Attacker → seeds that failed once: those that are mended, and those that are not, each with the reason."""
FIRST = {"checkpoint": 5, "video": 4, "panel": 10, "faults": 2, "patches": 8}
"""Attacker → how many seeds from 0 on; a few seconds of one core."""
LIMIT_SECONDS = 600

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.mark.parametrize("attacker", FIRST)
def test_no_seed_of_the_attacker_fails(attacker: str, package_environment: dict[str, str]):
    seeds = dict.fromkeys([*KEPT[attacker]["mended"], *range(FIRST[attacker])])
    wanted = ",".join(str(seed) for seed in seeds if str(seed) not in KEPT[attacker]["open"])
    done = subprocess.run(
        [sys.executable, "-m", "steadyvsr.benchmarks.attack", "--only", attacker, "--seeds", wanted],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, env=package_environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("attacker", FIRST)
def test_what_is_open_is_told(attacker: str):
    if told := "; ".join(f"seed {seed}: {reason}" for seed, reason in KEPT[attacker]["open"].items()):
        pytest.skip(f"{attacker}: not mended: {told}")
