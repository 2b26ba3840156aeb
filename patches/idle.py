"""Work for the thread that runs prompts, done when no prompt is running.

Models must not be moved by a web request while a prompt computes with them. ComfyUI's worker asks the queue for flags
after every prompt, and whenever a flag is set while nothing runs: what waits here is done right then, on that thread.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import execution

from ..memory.process import shared

log = logging.getLogger("steadyvsr.patches")

FLAG = "steadyvsr"


def run_when_idle(queue: Any, action: Callable[[], None]) -> None:
    """Has the worker of `queue` call `action` after the running prompt, or now if there is none.

    What the action raises is logged; it never reaches the worker, whose end would be the end of all prompts.
    """
    install()
    shared("idle_actions", deque).append(action)
    queue.set_flag(FLAG, True)  # wakes the worker


def install() -> None:
    """Wraps `PromptQueue.get_flags`; calling it again changes nothing."""
    original = execution.PromptQueue.get_flags
    if getattr(original, "steadyvsr", False):
        return

    @functools.wraps(original)
    def get_flags(*arguments: Any, **keywords: Any) -> Any:
        flags = original(*arguments, **keywords)
        _run_all()
        return flags

    get_flags.steadyvsr = True  # type: ignore[attr-defined]
    execution.PromptQueue.get_flags = get_flags


def _run_all() -> None:
    actions: deque[Callable[[], None]] = shared("idle_actions", deque)
    while actions:
        action = actions.popleft()
        try:
            action()
        except Exception as error:
            log.error("an action of the memory panel failed", exc_info=error)
