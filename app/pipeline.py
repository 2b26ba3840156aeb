"""Reading and writing beside the engine: a thread for each, and a bounded number of bytes between them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")

LOOK_SECONDS = 0.5
"""Longest wait at a time: on Windows, Ctrl-C is heard between two waits only."""


class Channel(Generic[Value]):
    """Hands values from one thread to another, in order.

    Args:
        limit_bytes: what may wait in it; a larger value waits alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._waiting: deque[tuple[Value, int]] = deque()
        self._bytes = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, value: Value, size: int) -> bool:
        """Waits until there is room. False: nobody takes any more, see `close`."""
        with self._changed:
            while not self._closed and self._waiting and self._bytes + size > self._limit:
                self._changed.wait(LOOK_SECONDS)
            if not self._closed:
                self._waiting.append((value, size))
                self._bytes += size
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be put; `error` is what the taker meets after the values before it."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Value]:
        while True:
            with self._changed:
                while not (self._waiting or self._ended or self._closed):
                    self._changed.wait(LOOK_SECONDS)
                if not self._waiting:
                    error, self._error = self._error, None
                    break
                value, size = self._waiting.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield value
            del value
        if error is not None:
            raise error

    def close(self) -> None:
        """Nothing more will be taken; drops what waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()


def read_ahead(
    source: Generator[Value, None, None], size: Callable[[Value], int], limit_bytes: int
) -> Generator[Value, None, None]:
    """The values of `source`, which a thread of its own pulls and closes.

    What `source` raises is raised here, after the values before it. Closing this generator ends the thread, which may
    still finish the value that it is at.

    Args:
        size: bytes of a value.
        limit_bytes: how much may wait.
    """
    channel: Channel[Value] = Channel(limit_bytes)

    def pull() -> None:
        try:
            with closing(source):
                for value in source:
                    if not channel.put(value, size(value)):
                        return
        except BaseException as error:
            channel.end(error)
        else:
            channel.end()

    thread = threading.Thread(target=pull, name="steadyvsr reader", daemon=True)
    thread.start()
    try:
        yield from channel
    finally:
        channel.close()
        thread.join()


@contextmanager
def written_behind(
    write: Callable[[Value], object], size: Callable[[Value], int], limit_bytes: int
) -> Iterator[Callable[[Value], None]]:
    """A function that hands values to a thread of its own, which writes them in order.

        with written_behind(writer.write, lambda frame: frame.nbytes, 1 << 28) as put:
            for frame in frames:
                put(frame)

    The block ends when everything is written. An exception that leaves it drops what waits; either way the thread has
    ended then. What `write` raises, the next call or the end of the block raises.

    Args:
        size: bytes of a value.
        limit_bytes: how much may wait; a call waits for room.
    """
    channel: Channel[Value] = Channel(limit_bytes)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            for value in channel:
                write(value)
                del value
        except BaseException as error:
            failure.append(error)
            channel.close()

    def put(value: Value) -> None:
        if not channel.put(value, size(value)) and failure:
            raise failure.pop()

    thread = threading.Thread(target=work, name="steadyvsr writer", daemon=True)
    thread.start()
    try:
        yield put
        channel.end()
        thread.join()
    finally:
        channel.close()
        thread.join()
    if failure:
        raise failure.pop()
