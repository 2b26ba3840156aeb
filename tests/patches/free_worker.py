"""As much of ComfyUI's worker as the scenarios of free_worlds.py need; once imported, it is the module `execution`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PromptQueue: Any = runpy.run_path(str(Path(__file__).resolve().parents[1] / "double" / "execution.py"))["PromptQueue"]


class NodeCache:
    """Outputs of nodes, in a reference cycle like ComfyUI's: they die at a collection, not when they are dropped."""

    def __init__(self) -> None:
        self.outputs: dict[tuple, Any] = {}
        self.changed = {"cache": self}


class PromptExecutor:
    """ComfyUI's, as far as its node cache goes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.cache = NodeCache()

    def execute(self, prompt: dict, prompt_id: str, extra_data: Any = None, execute_outputs: Any = ()) -> None:
        self.work()


async def execute(node: Callable[[], None]) -> None:
    """One node of a prompt."""
    node()


sys.modules["execution"] = sys.modules[__name__]
