"""The first steps of a worker process: it is bound to the life of its parent before anything slow is imported.

Imports nothing of torch. A parent that is killed while its worker still loads libraries must not leave it behind.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

STOP = None
"""The message that stops the clip in work; all others are orders."""
_PR_SET_PDEATHSIG = 1


def begin(pipe: Connection, parent: int, module: str) -> None:
    """What a worker process runs, from its first line to its last.

    Args:
        pipe: to the parent, which holds the other end as long as it lives.
        parent: its process id.
        module: name of the one whose `serve(pipe, orders, stop)` is the work itself.
    """
    # Ctrl-C goes to every process of a terminal, but whether a clip stops is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=listen, args=(pipe, orders, stop), daemon=True).start()
    importlib.import_module(module).serve(pipe, orders, stop)


def end_with(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, even in the middle of a computation; Linux alone can."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def listen(pipe: Connection, orders: queue.SimpleQueue[Any], stop: threading.Event) -> None:
    """Takes the parent's messages until the pipe closes, which ends this process: then the parent is gone.

    Messages are plain values: unpickling one of our classes would import its module here, while the main thread is at
    it, too. And `os._exit`, because that thread may be anywhere, in an import or in a computation of minutes.
    """
    with suppress(EOFError, OSError):
        while True:
            message = pipe.recv()
            if message is STOP:
                stop.set()
            else:
                orders.put(message)
    os._exit(1)
