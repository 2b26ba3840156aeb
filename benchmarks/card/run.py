"""One command for a person with a card: how fast it is, whether it is right, and how near the predictions are.

    python -m steadyvsr.benchmarks.card.run --out DIR [--device cuda] [--reduced] [--only BLOCK …]

DIR/card_run.json is written after every block, so a run that is stopped keeps what it has. The blocks are those of
`steadyvsr doctor --full`, at four sizes and with every attention backend that passes its self-check, and the tests
marked `gpu`. Random weights of the released size are made on the spot; nothing is downloaded. Exit status 1 where
something is not as promised, 2 where something could not be measured. `--reduced` rehearses it with tiny weights.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch
from steadyvsr.app import card
from steadyvsr.app.card import compute
from steadyvsr.benchmarks.frame import ROOT
from steadyvsr.memory import probe

GPU_TESTS = "tests/gpu"
TEST_SECONDS = 300


def every_size(setting: card.Setting) -> card.Found:
    return compute.speed(setting, compute.SIZES, every_backend=True)


def gpu_marks(setting: card.Setting) -> card.Found:
    """The tests that need a card."""
    if setting.on_cpu:
        raise card.NotHere("No card was found here: the tests marked gpu have nothing to run on.")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    missed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode and not missed:
        missed.append(f"pytest ended with {done.returncode}")
    return card.Found({"returncode": done.returncode, **counts}, [last], missed)


BLOCKS = {
    "ceilings": compute.ceilings,
    "attention": compute.attention,
    "speed at four sizes": every_size,
    "budgets of 6 to 24 GB": compute.budgets,
    "gpu marks": gpu_marks,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--device", default=str(probe.default_device()))
    parser.add_argument("--reduced", action="store_true", help="a rehearsal with tiny weights")
    parser.add_argument("--only", nargs="+", choices=BLOCKS, default=list(BLOCKS), metavar="BLOCK")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    target, device = options.out / "card_run.json", torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    setting = card.Setting(device, dtype, options.reduced)
    record = card.measure(setting, {name: BLOCKS[name] for name in options.only}, lambda seen: card.save(seen, target))
    print(card.page(record))
    return record["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
