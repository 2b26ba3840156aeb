"""Pushes the state to pages whose panel is open: one thread, which exists only as long as there is such a page."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from server import PromptServer

from ..memory.state import shared
from . import panel_state

log = logging.getLogger("steadyvsr.nodes")

EVENT = "steadyvsr.state"
PERIOD_SECONDS = 1.0
"""Once a second: half of what the panel may be sent, and a reading costs a few milliseconds of one core."""


class Sampler:
    """Knows which pages watch. A page that is gone without saying so is forgotten with its websocket.

    Attributes:
        cpu_seconds: what the running or last thread has used of a core.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching: set[str] = set()
        self._thread: threading.Thread | None = None
        self.cpu_seconds = 0.0

    @property
    def running(self) -> bool:
        return self._thread is not None

    def watch(self, client: str, wanted: bool) -> None:
        """Starts or ends the push to one page, by the id of its websocket."""
        with self._lock:
            (self._watching.add if wanted else self._watching.discard)(client)
            if self._watching and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="steadyvsr-sampler", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        started = time.thread_time()
        while self._audience():
            try:
                state = panel_state.state()
            except RuntimeError as error:  # a list of ComfyUI changed while it was read, or a driver failed
                log.debug("no state this time: %s", error)
            else:
                for client in self._audience():
                    PromptServer.instance.send_sync(EVENT, state, client)
            self.cpu_seconds = time.thread_time() - started
            time.sleep(PERIOD_SECONDS)

    def _audience(self) -> list[str]:
        """The pages that watch and are still there; without any the thread ends, and nobody can miss that."""
        with self._lock:
            sockets: Any = PromptServer.instance.sockets
            self._watching = {client for client in self._watching if client in sockets}
            if not self._watching:
                self._thread = None
            return sorted(self._watching)


def sampler() -> Sampler:
    return shared("panel_sampler", Sampler)
