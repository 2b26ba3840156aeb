"""Attacks nights: parents and workers of folder runs are killed at random moments, by benchmarks/night.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steadyvsr.tests.attack.outcome import Outcome

KILLS = 10
"""Of one attack."""
LIMIT_SECONDS = 1800


def run(seed: int) -> Outcome:
    """Nights with ten kills in all."""
    case, started = f"{KILLS} kills", time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "night.json"
        asked = ["--kills", str(KILLS), "--seed", str(seed), "--json", str(target)]
        command = [sys.executable, "-m", "steadyvsr.benchmarks.night", *asked]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(case, "hangs", False, f"not done after {LIMIT_SECONDS} s", units=KILLS)
        seconds = time.monotonic() - started
        if not target.exists():
            return Outcome(case, "the night ends", False, done.stderr[-300:], seconds, units=KILLS)
        missed = json.loads(target.read_text())["missed"]
        return Outcome(case, "missed" if missed else "whole", not missed, "; ".join(missed), seconds, units=KILLS)
