"""Inputs and outputs that nodes of several products share, and how a node hands out its report."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..patches.kept import EJECTABLE, POLICIES
from ..patches.versions import supported, torch_devices

FlashVSRType = io.Custom("FLASHVSR")

ADVANCED = supported(io.Float.Input, advanced=True)
"""For inputs that a user rarely needs; every type of input knows the keyword in the same versions."""


def keep_loaded_input(
    tooltip: str = "Whether the model outlives ComfyUI's free-memory buttons and other workflows. no: ComfyUI decides. "
    "keep: it stays in RAM and is not read again; it makes room on the card when another model needs it. pin: it stays "
    "on the card too, even if another model then does not fit; with dynamic VRAM (a start option of ComfyUI 0.33) the "
    "driver decides that.",
) -> io.Input:
    return io.Combo.Input("keep_loaded", options=list(POLICIES), default=EJECTABLE, optional=True, tooltip=tooltip)


def offload_input(
    tooltip: str = "Leaves the model in RAM, off its device; the report verifies that by measurement. A model that was "
    "on the device before this node ran stays there, and so does a pinned one.",
) -> io.Input:
    return io.Boolean.Input("offload_after_load", default=True, optional=True, tooltip=tooltip)


def device_input(choices: list[str], tooltip: str, **more: Any) -> io.Input:
    """`choices`, then every accelerator of ComfyUI, then the CPU; the first choice is the default."""
    options = list(dict.fromkeys([*choices, *map(str, torch_devices()), "cpu"]))
    return io.Combo.Input("device", options=options, default=choices[0], tooltip=tooltip, **more)


def allow_cpu_input(tooltip: str) -> io.Input:
    return io.Boolean.Input("allow_cpu", default=False, optional=True, tooltip=tooltip, **ADVANCED)


def passed_output(**more: Any) -> io.Output:
    return io.AnyType.Output("passed", display_name="value", tooltip="The value, unchanged.", **more)


def report_output(tooltip: str) -> io.Output:
    return io.String.Output("report", display_name="report", tooltip=tooltip)


def with_report(*values: Any, report: dict[str, Any]) -> io.NodeOutput:
    """The outputs of a node whose last one is `report_output`; the node shows the report as well."""
    text = as_json(report)
    return io.NodeOutput(*values, text, ui=ui.PreviewText(text))


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)
