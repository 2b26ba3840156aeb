"""Which prompt ComfyUI is working on, as far as it tells."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_execution.utils import get_executing_context


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

    def definition(self, node: str) -> str | None:
        """A node's class and inputs as text: ids alone say little, every workflow counts its nodes from 1."""
        found = self.nodes.get(node)
        return None if found is None else repr((found.get("class_type"), found.get("inputs")))


def running() -> RunningPrompt | None:
    """The prompt whose node is executing in this thread; None outside a node."""
    context = get_executing_context()
    if context is None:
        return None
    nodes = next((item[2] for item in _queued() if item[1] == context.prompt_id), {})
    return RunningPrompt(context.prompt_id, context.node_id, nodes)


def executing() -> tuple[str, str] | None:
    """The prompt and the node that are executing in this thread; cheaper than `running`."""
    context = get_executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def in_work() -> bool:
    """Whether any prompt is being executed, by this thread or another."""
    return get_executing_context() is not None or bool(_queued())


def definition() -> Mapping[str, Any]:
    """All nodes of the prompt in work, between its nodes too; empty where there is none or no queue tells it."""
    return next((item[2] for item in _queued()), {})


def server() -> Any | None:
    """ComfyUI's server; None where it runs without one."""
    # Looked up, not imported: the module starts things.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _queued() -> list[Any]:
    """The queue's running items: (number, prompt id, prompt, …)."""
    queue = getattr(server(), "prompt_queue", None)
    return [] if queue is None else list(queue.currently_running.values())
