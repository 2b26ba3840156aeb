"""Work for the thread that runs prompts, done when no prompt is running.

Models must not be moved by a web request while a prompt computes with them. ComfyUI's worker asks its queue for flags
after every prompt, and whenever a flag is set while nothing runs. What waits here is done right then, on that thread:
hooks.py wraps the call.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..memory.process import shared

log = logging.getLogger("steadyvsr.patches")

FLAG = "steadyvsr"


def run_when_idle(queue: Any, action: Callable[[], None]) -> None:
    """Has the worker of `queue` call `action` after the running prompt, or now if there is none.

    What the action raises is logged; it never reaches the worker, whose end would be the end of all prompts.
    """
    _waiting().append(action)
    queue.set_flag(FLAG, True)  # wakes the worker


def lock_of(queue: Any) -> AbstractContextManager[Any]:
    """The lock that a queue waits with, if a thread that has it may take it once more."""
    lock = getattr(queue, "mutex", None)
    return lock if isinstance(lock, type(threading.RLock())) else nullcontext()


def run_waiting() -> None:
    """Called by the worker between prompts."""
    actions = _waiting()
    while actions:
        action = actions.popleft()
        try:
            action()
        except Exception as error:
            log.error("an action of the memory panel failed", exc_info=error)


def _waiting() -> deque[Callable[[], None]]:
    return shared("idle_actions", deque)
