"""As much of ComfyUI's worker as the scenarios of free_worlds.py need; once imported, it is the module `execution`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any


class PromptQueue:
    """As much of ComfyUI's prompt queue as anybody asks for."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.queue: list[Any] = []
        self.flags: dict[str, object] = {}
        self.currently_running: dict[int, tuple] = {}

    def put(self, item: Any) -> None:
        with self.mutex:
            self.queue.append(item)
            self.not_empty.notify()

    def get(self, timeout: float | None = None) -> Any:
        """The next prompt; None when the time is up, or when somebody wakes the worker while it waits."""
        with self.not_empty:
            while not self.queue:
                self.not_empty.wait(timeout=timeout)
                if timeout is not None and not self.queue:
                    return None
            return self.queue.pop(0), 0

    def set_flag(self, name: str, value: object) -> None:
        with self.mutex:
            self.flags[name] = value
            self.not_empty.notify()

    def get_flags(self) -> dict[str, object]:
        with self.mutex:
            flags, self.flags = self.flags, {}
            return flags


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
