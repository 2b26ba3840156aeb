"""Measurements of one machine, block by block: each answers one question, or says in a sentence why it cannot."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...memory import probe
from ...memory.reading import size_text

FINE, MISSED, NOT_MEASURED = 0, 1, 2
"""Exit codes: all is as promised; something is not; something could not be measured here."""
LIMIT_SECONDS = 15 * 60
PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:;,'\"()]+){2,}")


class NotHere(Exception):  # noqa: N818
    """A question that this machine cannot answer; the message says why, in one sentence."""


@dataclass(frozen=True)
class Setting:
    """Where and how large to measure.

    Attributes:
        device, dtype: of the computation.
        reduced: tiny weights and clips, for a rehearsal in seconds on any device; else the released sizes.
        reader: what to read memory with; None: the probe of the process.
        golden: the folder of golden vectors, where there is one.
    """

    device: torch.device
    dtype: torch.dtype
    reduced: bool = False
    reader: probe.Probe | None = None
    golden: Path | None = None

    @property
    def probe(self) -> probe.Probe:
        return self.reader or probe.current()

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def needs_card(self, why: str) -> None:
        """Raises `NotHere` on a CPU, unless the rehearsal is measured."""
        if self.on_cpu and not self.reduced:
            raise NotHere(f"No card was found here: {why}.")


@dataclass
class Found:
    """What a block found.

    Attributes:
        figures: plain values for the record; bytes and seconds end in their unit.
        lines: the same for people.
        missed: promises that were not kept, in words.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


Block = Callable[[Setting], Found]


def measure(
    setting: Setting,
    blocks: Mapping[str, Block],
    on_block: Callable[[dict[str, Any]], None] = lambda record: None,
    limit_seconds: float = LIMIT_SECONDS,
) -> dict[str, Any]:
    """Runs the blocks one after another; one that fails costs no more than itself.

        record = measure(Setting(torch.device("cuda"), torch.bfloat16), FULL, lambda record: save(record, path))

    Args:
        on_block: called with the record so far after every block.

    Returns:
        machine, then block → seconds, figures, lines, missed, and `not_measured` or `failed` with the reason.
    """
    started, record = time.monotonic(), {"machine": machine(setting.device), "reduced": setting.reduced, "blocks": {}}
    for name, block in blocks.items():
        began, found, outcome = time.monotonic(), Found(), {}
        try:
            if began - started > limit_seconds:
                raise NotHere(f"No time was left: the blocks before it took {began - started:.0f} s.")
            found = block(setting)
        except NotHere as reason:
            outcome = {"not_measured": str(reason)}
        # Whatever a driver, a compiler or a backend raises belongs into the record; the next block may work.
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        gc.collect()
        probe.empty_cache(setting.device)
        record["blocks"][name] = scrubbed({**vars(found), **outcome, "seconds": round(time.monotonic() - began, 2)})
        record["exit_code"] = exit_code(record)
        on_block(record)
    return record


def exit_code(record: Mapping[str, Any]) -> int:
    blocks = record["blocks"].values()
    if any(block["missed"] or "failed" in block for block in blocks):
        return MISSED
    return NOT_MEASURED if any("not_measured" in block for block in blocks) else FINE


def page(record: Mapping[str, Any]) -> str:
    """The record for people: a heading for each block, and what was missed at the end of its lines."""
    text = [" · ".join(f"{what} {value}" for what, value in record["machine"].items() if value)]
    if record["reduced"]:
        text.append("A rehearsal with tiny weights: the numbers say nothing about speed.")
    for name, block in record["blocks"].items():
        text.append(f"{name} ({block['seconds']:.1f} s)")
        text += [f"  {line}" for line in block["lines"]]
        text += [f"  MISSED: {what}" for what in block["missed"]]
        text += [f"  {word}: {block[key]}" for key, word in (("not_measured", "NOT MEASURED"), ("failed", "FAILED"))
                 if key in block]  # fmt: skip
    return "\n".join(text)


def save(record: Mapping[str, Any], path: Path) -> None:
    """Writes the record so that a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def machine(device: torch.device) -> dict[str, Any]:
    """Card, driver and versions; no path, no name of a person or a computer."""
    found: dict[str, Any] = {"card": None, "driver": None, "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    found["processor"] = named[1] if named else platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory": size_text(properties.total_memory), "driver": _driver()}
        found["capability"] = f"{properties.major}.{properties.minor}"
    elif device.type != "cpu":
        found["card"] = device.type
    found |= {"torch": torch.__version__, "CUDA": torch.version.cuda, "HIP": torch.version.hip}
    for package in ("triton", "av"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"Python": platform.python_version(), "on": platform.system()}


def _driver() -> str | None:
    """NVIDIA's driver, where its management library is installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # an optional library in front of a driver
        return None


def scrubbed(value: Any) -> Any:
    """The value with every path replaced: an error may name a folder, and with it a person."""
    if isinstance(value, str):
        return PATH.sub("PATH", value)
    if isinstance(value, Mapping):
        return {key: scrubbed(item) for key, item in value.items()}
    return [scrubbed(item) for item in value] if isinstance(value, list | tuple) else value
