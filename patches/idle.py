"""Work for the thread that runs prompts, done when no prompt is running, and relief while RAM is short.

Models must not be moved by a web request while a prompt computes with them. ComfyUI's worker asks its queue for flags
after every prompt, and whenever a flag is set while nothing runs. What waits here is done right then, on that thread:
hooks.py wraps the call.

ComfyUI's node cache keeps the results of nodes, and with them models that nobody uses, for as long as nothing else asks
for memory; 0.3.64 never looks at the machine's RAM. So while nothing runs and little of it is available, the worker is
given the flag that resets the cache. Kept models yield only if that was not enough (`hooks.yield_ram`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil

from ..memory.process import shared
from ..memory.reading import size_text
from .kept import registry

log = logging.getLogger("steadyvsr.patches")

FLAG = "steadyvsr"
LOOK_SECONDS = 30.0
"""Between two looks at the machine's RAM while nothing runs; one costs microseconds."""
ENOUGH_RAM = 1.5
"""Times the threshold: relief comes once below that, and again only after this was reached."""


def run_when_idle(queue: Any, action: Callable[[], None]) -> None:
    """Has the worker of `queue` call `action` after the running prompt, or now if there is none.

    What the action raises is logged; it never reaches the worker, whose end would be the end of all prompts.
    """
    _waiting().append(action)
    queue.set_flag(FLAG, True)  # wakes the worker


def lock_of(queue: Any, get: Callable[..., Any]) -> AbstractContextManager[Any]:
    """The lock that a queue's own `get` gives up while it waits, so that a flag cannot come just before.

    Another pack's `get` may wait in another way, so it is called without the lock; a flag that came just before is then
    heard at the next look at the RAM.
    """
    lock, own = getattr(queue, "mutex", None), getattr(get, "__module__", None) == type(queue).__module__
    own = own and not hasattr(get, "__wrapped__") and isinstance(lock, type(threading.RLock()))
    return lock if own and lock is not None else nullcontext()


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


@dataclass
class Shortage:
    """Whether RAM has become short: once, and again only after there was enough of it.

    Attributes:
        armed: whether there was enough since the last time.
    """

    armed: bool = True

    def is_new(self, available: int, least: int) -> bool:
        """Whether these bytes are a shortage that nobody has answered; who answers it sets `armed` to False."""
        self.armed = self.armed or available >= ENOUGH_RAM * least
        return self.armed and available < least


@dataclass
class Relief:
    """Resets the node cache while nothing runs and RAM is short.

    Attributes:
        enabled: whether it does.
        shortage: the one that it answers.
        before: bytes that were available when it did so, until the next look tells what came of it.
    """

    enabled: bool = True
    shortage: Shortage = field(default_factory=Shortage)
    before: int | None = None

    def flags(self, queue: Any, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags of the worker's turn, with `free_memory` where the node cache is to be reset."""
        available, least = psutil.virtual_memory().available, registry().least_available_bytes()
        if self.before is not None:
            log.info("RAM relief: %s were available before, %s are now", size_text(self.before), size_text(available))
            self.before = None
        if not self.shortage.is_new(available, least) or not self.enabled or queue.queue:
            return flags
        self.shortage.armed, self.before = False, available
        log.info("less than %s of RAM are available: the node cache is reset", size_text(least))
        # Without "unload_models" ComfyUI takes the one for both.
        return {"unload_models": False, **flags, "free_memory": True}


def relief() -> Relief:
    """The relief of the process."""
    return shared("relief", Relief)
