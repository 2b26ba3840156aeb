"""Which prompt ComfyUI is working on, as far as it tells, and which thread works on it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..memory.process import shared
from .versions import executing_context


@dataclass(frozen=True)
class RunningPrompt:
    """A prompt in work.

    Attributes:
        id: ComfyUI's own.
        node: id of the node that is executing, as a workflow numbers it.
        nodes: all nodes of the prompt by id, as the API spells them; empty where no queue tells them.
    """

    id: str
    node: str
    nodes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def definitions(self) -> dict[str, str]:
        """Each node's class and inputs as text: ids alone say little, every workflow counts its nodes from 1."""
        return {id: repr((node.get("class_type"), node.get("inputs"))) for id, node in self.nodes.items()}

    @property
    def own_definition(self) -> str:
        """Of the executing node; one that the queue does not tell, as within an expanded node, is named by its id."""
        return self.definitions.get(self.node, f"{self.id}/{self.node}")


def running() -> RunningPrompt | None:
    """The prompt whose node is executing in this thread; None outside a node."""
    context = executing_context()
    if context is None:
        return None
    nodes = next((item[2] for item in _queued() if item[1] == context.prompt_id), {})
    return RunningPrompt(context.prompt_id, context.node_id, nodes)


def queued() -> RunningPrompt | None:
    """The prompt that ComfyUI's worker has taken from its queue, also between two nodes; None while it is idle."""
    return next((RunningPrompt(item[1], "", item[2]) for item in _queued()), None)


def executing() -> tuple[str, str] | None:
    """The prompt and the node that are executing in this thread; cheaper than `running`."""
    context = executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def in_work() -> bool:
    """Whether any prompt is being executed, by this thread or another."""
    return executing_context() is not None or bool(_queued())


class _Worker:
    thread: int | None = None


def worker_is_here() -> None:
    """This thread is the one that runs prompts; models live and die on it."""
    shared("worker", _Worker).thread = threading.get_ident()


def on_worker() -> bool:
    """Whether this thread runs prompts. Without a server, any thread may be the one."""
    known = shared("worker", _Worker).thread
    return known == threading.get_ident() if known is not None else server() is None


def server() -> Any | None:
    """ComfyUI's server; None where it runs without one."""
    # Looked up, not imported: the module starts things.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _queued() -> list[Any]:
    """The queue's running items: (number, prompt id, prompt, …)."""
    queue = getattr(server(), "prompt_queue", None)
    return list(getattr(queue, "currently_running", {}).values())
