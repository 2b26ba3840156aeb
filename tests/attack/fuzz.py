"""Fuzzes the parsers of file headers and options with atheris, which looks for new paths through the code.

    python -m steadyvsr.tests.attack.fuzz header|archive|options [-max_total_time=120] [libFuzzer's options]

A parser answers with a value or with its own kind of error. Anything else ends the run, and the input is left in a file
crash-…. atheris is no dependency of the tests: `pip install "steadyvsr[fuzz]"`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    text = 'fuzz: expected the package atheris; it is not installed. Run `pip install "steadyvsr[fuzz]"`.'
    raise SystemExit(text) from None

with atheris.instrument_imports(include=["steadyvsr"]):
    from steadyvsr import cli
    from steadyvsr.models import weight_file
    from steadyvsr.models.flashvsr import StreamOptions

PLACE = Path(tempfile.mkdtemp()) / "fuzzed.safetensors"
OPTIONS = (
    "--scale", "--seed", "--sparse-ratio", "--kv-ratio", "--local-range", "--tile", "--crf", "--workers",
    "--frame-rate", "--colour", "--attention", "--precision", "--codec", "--version", "--force", "--json",
)  # fmt: skip


def opened(content: bytes) -> None:
    PLACE.write_bytes(content)
    with contextlib.suppress(weight_file.CheckpointError):
        file = weight_file.WeightFile.open(PLACE)
        for _ in file.read(list(file.entries)[:4]):
            pass


def header(data: bytes) -> None:
    """A safetensors file: the header is fuzzed, its length is right most of the time."""
    opened((len(data) - 8).to_bytes(8, "little") + b"{" + data if data[:1] < b"\xf0" and len(data) > 8 else data)
    weight_file.read_header(PLACE)


def archive(data: bytes) -> None:
    opened((b"PK\3\4" if data[:1] < b"\x80" else b"\x80\2") + data)


def options(data: bytes) -> None:
    """The command line up to the file that is not there, and the options of the engine."""
    provider = atheris.FuzzedDataProvider(data)
    words = []
    for _ in range(provider.ConsumeIntInRange(0, 6)):
        words += [provider.PickValueInList(list(OPTIONS)), provider.ConsumeUnicodeNoSurrogates(24)]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(["upscale", "/nowhere/in.mp4", "/nowhere/out.mp4", *words])
        except SystemExit as error:  # argparse
            code = error.code
        assert code in (0, cli.EXIT_BAD_INPUT), code
    with contextlib.suppress(ValueError):
        number, integer = provider.ConsumeFloat, provider.ConsumeInt
        StreamOptions(number(), integer(9), number(), number(), number(), integer(4), "adain", "auto", integer(4))


PARSERS: dict[str, Callable[[bytes], None]] = {"header": header, "archive": archive, "options": options}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        raise SystemExit(f"fuzz: expected {', '.join(PARSERS)}; got {' '.join(sys.argv[1:2]) or 'nothing'}.")
    logging.disable()
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], PARSERS[sys.argv[1]], enable_python_coverage=True)
    atheris.Fuzz()
