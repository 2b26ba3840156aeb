"""Pushes the panel's state to the pages that show it: one thread, which runs only while there is such a page."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from server import PromptServer

from ...memory.process import shared
from . import state as panel_state

log = logging.getLogger("steadyvsr.nodes")

EVENT = "steadyvsr.state"
PERIOD_SECONDS = 1.0
"""Between two states; reading one costs a few milliseconds of one core."""


class StatePush:
    """Sends the state to every page that watches; a page that is gone without a word is forgotten with its websocket.

    Attributes:
        cpu_seconds: what its threads have used of one core since the process began.
        seconds: how long they have run, by the clock.
        pushes: how many states were sent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching: set[str] = set()
        self._thread: threading.Thread | None = None
        self.cpu_seconds = self.seconds = 0.0
        self.pushes = 0

    def figures(self) -> dict[str, bool | int | float]:
        """What the push costs; none of these numbers grows while `running` is false."""
        return {
            "running": self._thread is not None,
            "cpu_seconds": self.cpu_seconds,
            "seconds": self.seconds,
            "pushes": self.pushes,
        }

    def watch(self, client: str, wanted: bool) -> None:
        """Starts or ends the push to one page, by the id of its websocket."""
        with self._lock:
            (self._watching.add if wanted else self._watching.discard)(client)
            if self._watching and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="steadyvsr-panel-push", daemon=True)
                self._thread.start()

    def send(self, event: str, data: Any) -> None:
        """Sends something to every page that watches, and to no other."""
        with self._lock:
            clients = sorted(self._watching.intersection(PromptServer.instance.sockets))
        for client in clients:
            PromptServer.instance.send_sync(event, data, client)

    def _run(self) -> None:
        cpu, clock = time.thread_time(), time.monotonic()
        while clients := self._audience():
            try:
                state = panel_state.state()
            except RuntimeError as error:  # a list of ComfyUI changed while it was read, or a driver failed
                log.debug("no state this time: %s", error)
            else:
                for client in clients:
                    PromptServer.instance.send_sync(EVENT, state, client)
                    self.pushes += 1
            time.sleep(PERIOD_SECONDS)
            now_cpu, now = time.thread_time(), time.monotonic()
            self.cpu_seconds += now_cpu - cpu
            self.seconds += now - clock
            cpu, clock = now_cpu, now

    def _audience(self) -> list[str]:
        """The pages that watch and are still there. Without any the thread ends: under the lock, so `watch` knows."""
        with self._lock:
            sockets: Any = PromptServer.instance.sockets
            self._watching = {client for client in self._watching if client in sockets}
            if not self._watching:
                self._thread = None
            return sorted(self._watching)


def state_push() -> StatePush:
    """The push of the process."""
    return shared("panel_push", StatePush)
