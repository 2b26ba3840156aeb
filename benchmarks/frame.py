"""The frame of every benchmark: its options, its record, alternatives measured in turn, and ComfyUI around it.

def main(arguments: list[str] | None = None) -> int:
    options = frame.parser(__doc__).parse_args(arguments)
    ...
    return frame.finish(options.json, figures, missed)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1 << 20
START_SECONDS, STOP_SECONDS = 120, 30

Measured = TypeVar("Measured")


def resolved(text: str) -> Path:
    """An absolute path: some benchmarks change to ComfyUI's folder later."""
    return Path(text).resolve()


def parser(text: str | None, *json_aliases: str) -> argparse.ArgumentParser:
    """A parser that has `--json FILE` and prints a module's docstring as its help."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", *json_aliases, metavar="FILE", type=resolved, help="write the figures as JSON")
    return made


def finish(target: Path | None, figures: Mapping[str, Any], missed: Sequence[str] = ()) -> int:
    """Prints and writes how it ended.

    Args:
        target: file for the machine, the figures and what was missed; None writes nothing.
        missed: targets that were not met, in words.

    Returns:
        The exit status: 1 where a target was missed.
    """
    print(f"missed: {'; '.join(missed)}" if missed else "passed")
    if target:
        record = {"machine": machine(), **figures, "missed": list(missed)}
        target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if missed else 0


def unmet(targets: Mapping[str, bool]) -> list[str]:
    """Names of the targets that were missed."""
    return [name for name, met in targets.items() if not met]


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_turn(alternatives: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What each alternative returned, called A B A B …: other work on the machine then disturbs all of them alike."""
    found: dict[str, list[Measured]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, measure in alternatives.items():
            found[name].append(measure())
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def comfyui_parser(
    text: str | None, *json_aliases: str, required: bool = True, of_its_own: bool = False
) -> argparse.ArgumentParser:
    """`parser` with `--comfyui PATH`.

    Args:
        required: whether there is nothing to measure without one.
        of_its_own: whether ComfyUI runs in a process of its own, by `--python INTERPRETER`.
    """
    made = parser(text, *json_aliases)
    made.add_argument("--comfyui", metavar="PATH", type=resolved, required=required, help="a ComfyUI checkout")
    if of_its_own:
        made.add_argument(
            "--python",
            metavar="INTERPRETER",
            default=os.environ.get("COMFYUI_PYTHON") or sys.executable,
            help="has ComfyUI's requirements (default: $COMFYUI_PYTHON, or this one)",
        )
    return made


def version_of(comfyui: Path) -> str:
    """The version of a checkout.

    Raises:
        SystemExit: it is none.
    """
    path = comfyui / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', path.read_text() if path.exists() else "")
    if found is None:
        raise SystemExit(f"--comfyui: expected a ComfyUI checkout; got {comfyui}. Give the folder of its main.py.")
    return found[1]


def enter(comfyui: Path) -> None:
    """Turns this process into a ComfyUI on the CPU, as far as imports go; for ComfyUI's own Python."""
    version_of(comfyui)
    os.chdir(comfyui)
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first


@contextmanager
def base_folder() -> Iterator[Path]:
    """A base directory for ComfyUI with this pack as its only custom node."""
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "custom_nodes" / "steadyvsr"
        pack.parent.mkdir()
        pack.symlink_to(ROOT, target_is_directory=True)
        yield Path(folder)


def session(comfyui: Path, python: str, script: str, *scenarios: str, **environment: str) -> dict[str, Any]:
    """What a script of tests/comfy observes in a ComfyUI: scenario → observations.

    Raises:
        SystemExit: the script, or one of these scenarios, failed.
    """
    with base_folder() as base:
        pack = base / "custom_nodes" / "steadyvsr"
        command = [python, str(ROOT / "tests" / "comfy" / script), str(pack), str(base), *scenarios]
        done = subprocess.run(command, cwd=comfyui, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: expected exit status 0; got {done.returncode}:\n{done.stderr[-3000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    for name in scenarios:
        if "error" in seen[name]:
            raise SystemExit(f"{script}, {name}: {seen[name]['error']}")
    return seen


@contextmanager
def server(comfyui: Path, python: str) -> Iterator[tuple[str, int]]:
    """A ComfyUI on the CPU that answers: its URL and process id.

    Raises:
        SystemExit: it does not start; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    with base_folder() as base, (base / "server.log").open("w+") as log:
        place = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
        command = [python, "main.py", "--cpu", *place, "--database-url", "sqlite:///:memory:"]
        process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log)
        try:
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{comfyui}: expected a ComfyUI that starts; got:\n{log.read()[-2000:]}")
                time.sleep(0.3)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/system_stats", timeout=10).close()
    except OSError:
        return False
    return True
