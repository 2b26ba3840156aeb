"""Receipts of what was asked for, kept in a ring and pushed to the pages that have the memory panel open."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..memory.process import shared

RING_RECEIPTS = 64
EVENT = "steadyvsr.receipt"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Line:
    """One model in a receipt: whether it stayed, and its bytes on the device before and after."""

    name: str
    policy: str | None
    stayed: bool
    before: int
    after: int
    id: str = ""


@dataclass(frozen=True)
class ReceiptCard:
    """What the panel shows of one action.

    Attributes:
        title: what was asked.
        line: what was measured.
        verdict: of memory.offload, or DONE | PENDING | FAILED.
        models: what became of each.
        id: a card replaces an earlier one of the same id, such as PENDING by its result.
        time: seconds of `time.time`.
    """

    title: str
    line: str
    verdict: str
    models: tuple[Line, ...] = ()
    id: str = ""
    time: float = field(default_factory=time.time)


def new_id() -> str:
    return f"r{next(_numbers)}-{time.time_ns():x}"


def give(card: ReceiptCard) -> dict[str, Any]:
    """Keeps a card, tells the listeners, and returns it as plain values."""
    plain = asdict(card) | {"id": card.id or new_id()}
    ring = _ring()
    for old in [old for old in ring if old["id"] == plain["id"]]:
        ring.remove(old)
    ring.append(plain)
    for listener in _listeners():
        listener(plain)
    return plain


def listen(listener: Callable[[dict[str, Any]], None]) -> None:
    """Calls `listener` with every card, as plain values."""
    _listeners().append(listener)


def _listeners() -> list[Callable[[dict[str, Any]], None]]:
    return shared("receipt_listeners", list)


def newest() -> Sequence[dict[str, Any]]:
    """All cards in the ring, newest first."""
    return list(reversed(_ring()))


def _ring() -> deque[dict[str, Any]]:
    return shared("receipts", lambda: deque(maxlen=RING_RECEIPTS))
