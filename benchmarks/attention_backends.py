"""Every attention backend's self-check on this machine: exact against float64, or the reason why it is not used.

    python -m steadyvsr.benchmarks.attention_backends [--device cpu] [--json FILE]

flex_attention is compiled on its first call, which takes most of a minute on a CPU and needs a C++ compiler there.
"""

from __future__ import annotations

import sys
import time

import torch
from steadyvsr.benchmarks import frame
from steadyvsr.models.flashvsr.attention import BACKENDS, self_check


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device, rows = torch.device(options.device), []
    for backend in BACKENDS:
        for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16):
            started = time.perf_counter()
            problem = self_check(backend, device, dtype)
            seconds = time.perf_counter() - started
            rows.append({"backend": backend, "dtype": str(dtype), "problem": problem, "seconds": round(seconds, 2)})
            print(f"{backend:7} {str(dtype):15} {problem or 'exact'} ({seconds:.1f} s)")
    missed = [f"{row['backend']} {row['dtype']}" for row in rows if row["problem"]]
    return frame.finish(options.json, {"device": device.type, "checks": rows}, missed)


if __name__ == "__main__":
    sys.exit(main())
