"""A hundred random sequences of free_state_machine.py, in a process that has the double of ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("free_state_machine.py")
EXAMPLES = 100


def test_a_hundred_random_sequences_keep_the_invariants():
    run = subprocess.run([sys.executable, str(SCRIPT), str(EXAMPLES)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-6000:]
    assert run.stdout == f"{EXAMPLES} sequences\n"
