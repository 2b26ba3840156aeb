"""ComfyUI, or its double, in the process of session.py, with the pack's nodes as its extension lists them.

Importing it starts everything; sys.argv is that of session.py.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK, KIND, BASE = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.path[:0] = [str(PACK / "tests" / name) for name in ("session", "comfy")]
importlib.import_module("comfyui_place").prepare(KIND, PACK, "--base-directory", str(BASE))
ON_DOUBLE = KIND == "double"
if not ON_DOUBLE:
    importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first

import comfy.model_management as mm  # noqa: E402
import server  # noqa: E402
import torch  # noqa: E402

if os.environ.get("STEADYVSR_CHANGED"):
    importlib.import_module("changed_comfyui").change(os.environ["STEADYVSR_CHANGED"])
    mm = sys.modules["comfy.model_management"]

CPU = torch.device("cpu")
LOOP = asyncio.new_event_loop()
asyncio.set_event_loop(LOOP)
SERVER: Any = server.PromptServer(LOOP)
EVENTS: list[tuple[str, Any, str | None]] = []
SERVER.client_id = "page"
SERVER.send_sync = lambda event, data, sid=None: EVENTS.append((event, data, sid))


def pack(module: str) -> Any:
    return importlib.import_module(f"steadyvsr.{module}")


EXTENSION = pack("nodes").FlashVSRExtension()
NODES = {node.define_schema().node_id: node for node in LOOP.run_until_complete(EXTENSION.get_node_list())}
NODE_ID = "7"


def node(name: str) -> Any:
    return NODES[f"SteadyVSR_{name}"]


def executed(name: str, **inputs: Any) -> Any:
    """A node's output, computed the way the executor does: on a clone of the class, in inference mode."""
    clone = node(name).PREPARE_CLASS_CLONE({})
    clone.hidden.unique_id = NODE_ID
    with torch.inference_mode():
        return clone.execute(**inputs)


def call(name: str, **inputs: Any) -> tuple[Any, ...]:
    return executed(name, **inputs).args


def events_of(function: Callable[[], Any], event: str) -> list[Any]:
    """What was sent to pages while `function` ran."""
    EVENTS.clear()
    function()
    return [data for name, data, _ in EVENTS if name == event]


def digest(frames: torch.Tensor) -> str:
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


def listed() -> dict[str, int]:
    """Name → loaded bytes of every model in ComfyUI's list."""
    return {type(entry.model.model).__name__: entry.model_loaded_memory() for entry in mm.current_loaded_models}


def live_bytes() -> int:
    """Bytes of all tensors that anything holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    try:
        function(*arguments, **keywords)
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def report_of(outputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """A node's first output and its report, which is the last one."""
    return outputs[0], json.loads(outputs[-1])
