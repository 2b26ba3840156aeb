"""What differs between the ComfyUI versions that this pack runs in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher


def supported(target: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of `keywords` that `target` accepts in the running ComfyUI.

    Keywords such as `search_aliases` of a schema or `advanced` of an input only change how a node is shown; they came
    after 0.3.64, where passing them raises TypeError.
    """
    accepted = inspect.signature(target).parameters
    return {name: value for name, value in keywords.items() if name in accepted}


def patcher_class() -> type:
    """The patcher class that ComfyUI gives to its own models: with dynamic VRAM, which 0.3.64 lacks, another one.

    Looked up at each use, because ComfyUI replaces the class after its start-up checks.
    """
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def trim_window(video: Any) -> tuple[float, float]:
    """(start, duration) in seconds of a trimmed VIDEO; a duration of 0 means until the end.

    Since trimming exists, a file read by its stream source is read whole: the trim has to be applied by the reader.
    """
    return video.get_active_trim_window() if hasattr(video, "get_active_trim_window") else (0.0, 0.0)


def unique_id(node: Any) -> str | None:
    """The id of a running node in its graph; None where it is called outside ComfyUI's executor."""
    return node.hidden.unique_id if node.hidden is not None else None


def memory_errors() -> tuple[type[Exception], ...]:
    """The exceptions that may mean that a device is out of memory; ask `is_out_of_memory` whether one does."""
    accelerator = getattr(mm, "ACCELERATOR_ERROR", None)
    return (mm.OOM_EXCEPTION,) if accelerator is None else (mm.OOM_EXCEPTION, accelerator)


def is_out_of_memory(error: Exception) -> bool:
    """Whether one of `memory_errors` means just that.

    Newer versions tell an accelerator that is out of memory from its other errors.
    """
    return bool(mm.is_oom(error)) if hasattr(mm, "is_oom") else isinstance(error, mm.OOM_EXCEPTION)
