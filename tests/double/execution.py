"""The queue of prompts, as far as its worker waits for it and asks for flags, and names of what runs them."""

from __future__ import annotations

import threading
from typing import Any


class PromptQueue:
    def __init__(self, server: Any = None) -> None:
        self.server = server
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.queue: list[Any] = []
        self.currently_running: dict[int, tuple] = {}
        self.flags: dict[str, Any] = {}

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

    def set_flag(self, name: str, data: Any) -> None:
        with self.mutex:
            self.flags[name] = data
            self.not_empty.notify()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        with self.mutex:
            flags = dict(self.flags)
            if reset:
                self.flags.clear()
            return flags


class PromptExecutor:
    def __init__(self, server: Any) -> None:
        self.server = server

    def reset(self) -> None:
        pass

    def execute(self, prompt: Any, prompt_id: str, extra_data: Any = None, execute_outputs: Any = ()) -> None:
        pass


async def execute(*_: Any) -> None:
    """One node."""
