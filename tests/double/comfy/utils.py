"""The progress bar of a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_hook: Callable[..., Any] | None = None


def set_progress_bar_global_hook(function: Callable[..., Any] | None) -> None:
    global _hook
    _hook = function


class ProgressBar:
    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total, self.node_id, self.hook = total, node_id, _hook

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = self.total if total is None else total
        if self.hook is not None:
            self.hook(min(value, self.total), self.total, preview, node_id=self.node_id)
