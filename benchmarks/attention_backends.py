"""Every attention backend's self-check on this machine: exact against float64, or the reason why it is not used.

    python -m steadyvsr.benchmarks.attention_backends [--device cpu] [--json FILE]

flex_attention is compiled on its first call, which takes most of a minute on a CPU and needs a C++ compiler there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from steadyvsr.models.flashvsr.attention import BACKENDS, self_check


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device, rows = torch.device(options.device), []
    for backend in BACKENDS:
        for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
            started = time.perf_counter()
            problem = self_check(backend, device, dtype)
            seconds = time.perf_counter() - started
            rows.append({"backend": backend, "dtype": str(dtype), "problem": problem, "seconds": round(seconds, 2)})
            print(f"{backend:7} {str(dtype):15} {problem or 'exact'} ({seconds:.1f} s)")
    if options.json:
        report = {"device": device.type, "torch": torch.__version__, "checks": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(row["problem"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
