"""Which node is executing."""

from __future__ import annotations

import contextvars
from typing import NamedTuple


class Context(NamedTuple):
    prompt_id: str
    node_id: str


_executing: contextvars.ContextVar[Context | None] = contextvars.ContextVar("executing", default=None)


def get_executing_context() -> Context | None:
    return _executing.get()


class CurrentNodeContext:
    def __init__(self, prompt_id: str, node_id: str) -> None:
        self.context = Context(prompt_id, node_id)

    def __enter__(self) -> None:
        self.token = _executing.set(self.context)

    def __exit__(self, *_: object) -> None:
        _executing.reset(self.token)
