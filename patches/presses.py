"""What a press of "free memory" did: four looks at every kept model and every device, in a ring.

before unloading → after unloading → after the reset of the node caches → after the collection that follows it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import comfy.model_management as mm

from ..memory import probe
from ..memory.process import shared
from ..memory.reading import Reading, size_text
from .kept import Key, registry
from .residency import Resident, residents
from .versions import torch_devices

log = logging.getLogger("steadyvsr.patches")

RING_SNAPSHOTS = 64
BUTTON, OUT_OF_MEMORY, HOUSEKEEPING = "button", "OOM", "housekeeping"
PRE_UNLOAD, POST_UNLOAD, POST_RESET, POST_COLLECT = "pre-unload", "post-unload", "post-reset", "post-collect"


@dataclass(frozen=True)
class Kept:
    """One owned model in a snapshot.

    Attributes:
        id, name, kind, policy: of the registry's entry.
        key: kind, files and options that make it this model; no path.
        networks: classes of its networks.
        listed: how many of its networks are in ComfyUI's list.
        dead: how many of those have lost their patcher.
        resident: bytes on the device.
        size: of all its weights.
    """

    id: str
    name: str
    kind: str
    policy: str
    key: str
    networks: tuple[str, ...]
    listed: int
    dead: int
    resident: int
    size: int
    hits: int
    loads: int
    yields: int


@dataclass(frozen=True)
class Snapshot:
    """One look.

    Attributes:
        press: number of the press that it belongs to.
        stage: pre-unload | post-unload | post-reset | post-collect.
        caller: button | OOM | housekeeping.
        reason: what the Free Memory node was given, or "".
        kept: every owned model.
        residents: everything in ComfyUI's list.
        devices: one reading each.
        time: seconds of `time.time`.
    """

    press: int
    stage: str
    caller: str
    reason: str
    kept: tuple[Kept, ...]
    residents: tuple[Resident, ...]
    devices: tuple[Reading, ...]
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            **{name: getattr(self, name) for name in ("press", "stage", "caller", "reason", "time")},
            "kept": [asdict(entry) for entry in self.kept],
            "residents": [{**vars(item), "device": str(item.device)} for item in self.residents],
            "devices": [reading.to_json() for reading in self.devices],
        }

    @property
    def line(self) -> str:
        """The kept models in words: what of each is on its device."""
        words = [
            f"{entry.name} {size_text(entry.resident)} of {size_text(entry.size)}"
            f"{'' if entry.listed else ', not listed'}{', dead' if entry.dead else ''}"
            for entry in self.kept
        ]
        return f"{self.stage}: {'; '.join(words) or 'nothing is kept'}"


@dataclass(frozen=True)
class Press:
    """A press and what it came to.

    Attributes:
        before, after: the first and the last snapshot.
        lost: kept models that left their device or ComfyUI's list, though nobody gave them up and they did not yield.
        left: bytes that left the devices, by ComfyUI's books.
    """

    before: Snapshot
    after: Snapshot
    lost: tuple[Kept, ...]
    left: int

    @property
    def line(self) -> str:
        gone = [item for item in self.before.residents if _bytes_now(self.after, item) < item.bytes]
        stayed = [entry for entry in self.after.kept if entry.resident]
        names = ", ".join(f"{item.name} {size_text(item.bytes)}" for item in gone if item.bytes) or "nothing"
        kept = ", ".join(f"{entry.name} {size_text(entry.resident)}" for entry in stayed) or "none"
        why = f" · {self.before.reason}" if self.before.reason else ""
        return f"{size_text(self.left)} left the devices: {names} · kept: {kept}{why}"

    @property
    def looks(self) -> list[Snapshot]:
        """Its snapshots, as far as the ring still has them."""
        return [snapshot for snapshot in latest() if snapshot.press == self.before.press]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "caller": self.before.caller,
            "reason": self.before.reason,
            "left_bytes": self.left,
            "lost": [entry.name for entry in self.lost],
            "snapshots": [snapshot.to_json() for snapshot in self.looks],
        }


class _Presses:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ring: deque[Snapshot] = deque(maxlen=RING_SNAPSHOTS)
        self.count = 0
        self.reason = ""
        self.open: tuple[Snapshot, Snapshot] | None = None
        self.last: Press | None = None
        self.listeners: list[Callable[[Press], None]] = []


def _presses() -> _Presses:
    return shared("presses", _Presses)


def set_reason(text: str) -> None:
    """Why the next press is asked for."""
    _presses().reason = text


def listen(listener: Callable[[Press], None]) -> None:
    """Calls `listener` after every press by a button or a node."""
    _presses().listeners.append(listener)


def latest() -> list[Snapshot]:
    """All snapshots in the ring, oldest first."""
    with _presses().lock:
        return list(_presses().ring)


def to_json() -> list[dict[str, Any]]:
    return [snapshot.to_json() for snapshot in latest()]


def last_press() -> Press | None:
    """The newest press by a button, or unloading after an out-of-memory error, that is over."""
    return _presses().last


def begin(caller: str) -> Snapshot:
    """Before unloading."""
    presses = _presses()
    with presses.lock:
        presses.count += 1
        presses.open = None
        reason = ""
        if caller == BUTTON:
            reason, presses.reason = presses.reason, ""
        return _take(presses.count, PRE_UNLOAD, caller, reason)


def unloaded(before: Snapshot | None) -> None:
    """After unloading. What follows a press by a button is looked at as well; an OOM or housekeeping ends here."""
    if before is None:
        return
    after = _take(before.press, POST_UNLOAD, before.caller, before.reason)
    if before.caller == BUTTON:
        _presses().open = before, after
    else:
        _judge(before, after)


def press_open() -> bool:
    return _presses().open is not None


def was_reset() -> None:
    """When ComfyUI empties caches for the first time after a press, which is after the reset and the collection."""
    if (opened := _presses().open) is not None:
        before, _ = opened
        _take(before.press, POST_RESET, before.caller, before.reason)


def collected() -> None:
    """When it has emptied them: the press is over."""
    if (opened := _taken_open()) is not None:
        before, _ = opened
        _judge(before, _take(before.press, POST_COLLECT, before.caller, before.reason))


def end_early() -> None:
    """When caches were not emptied before something else began: the press is over with what it had unloaded."""
    if (opened := _taken_open()) is not None:
        _judge(*opened)


def _taken_open() -> tuple[Snapshot, Snapshot] | None:
    presses = _presses()
    with presses.lock:
        opened, presses.open = presses.open, None
    return opened


def _judge(before: Snapshot, after: Snapshot) -> None:
    left = sum(max(0, item.bytes - _bytes_now(after, item)) for item in before.residents)
    now = {entry.id: entry for entry in after.kept}
    lost = tuple(entry for entry in before.kept if entry.resident and _is_lost(entry, now.get(entry.id)))
    press = Press(before, after, lost, left)
    if before.caller != HOUSEKEEPING:
        _presses().last = press
    # At the end of every prompt, where smart memory is off, is not worth a line.
    log.log(logging.DEBUG if before.caller == HOUSEKEEPING else logging.INFO, "%s: %s", before.caller, press.line)
    for entry in lost:
        log.error(
            "a kept model was lost: %s of %s (%s, %s; %s), %s on the device before, %s and %s now",
            "+".join(entry.networks), entry.name, entry.id, entry.policy, entry.key, size_text(entry.resident),
            size_text(now[entry.id].resident), "listed" if now[entry.id].listed else "not listed",
        )  # fmt: skip
    for listener in list(_presses().listeners):
        listener(press)


def _is_lost(before: Kept, now: Kept | None) -> bool:
    """Whether a kept model left its device or ComfyUI's list though nobody gave it up and it did not yield."""
    if now is None or now.yields > before.yields:
        return False
    return now.resident < before.resident or now.listed < min(1, before.listed)


def _bytes_now(after: Snapshot, item: Resident) -> int:
    """Bytes of that network in a later snapshot."""
    return sum(other.bytes for other in after.residents if other.handle == item.handle)


def _take(press: int, stage: str, caller: str, reason: str) -> Snapshot:
    snapshot = Snapshot(
        press,
        stage,
        caller,
        reason,
        tuple(_kept(entry) for entry in registry().owned()),
        tuple(residents()),
        tuple(probe.attempt(probe.current(), device) for device in torch_devices()),
    )
    _presses().ring.append(snapshot)
    log.debug("%s %d: kept %s", stage, press, [(entry.name, entry.resident) for entry in snapshot.kept])
    return snapshot


def _kept(entry: Any) -> Kept:
    patchers = entry.patchers
    modules = {id(patcher.model) for patcher in patchers}
    listed = dead = 0
    for loaded in list(mm.current_loaded_models):
        module = loaded.real_model() if loaded.real_model is not None else None
        if module is not None and id(module) in modules:
            listed += 1
            dead += loaded.model is None
    return Kept(
        id=entry.id,
        name=entry.name,
        kind=entry.key.kind,
        policy=entry.policy,
        key=_key_text(entry.key),
        networks=tuple(type(patcher.model).__name__ for patcher in patchers),
        listed=listed,
        dead=dead,
        resident=sum(patcher.loaded_size() for patcher in patchers),
        size=entry.size_bytes,
        hits=entry.hits,
        loads=entry.loads,
        yields=entry.yields,
    )


def _key_text(key: Key) -> str:
    """`vae wan.safetensors, device='cuda:0'`"""
    files = " ".join(os.path.basename(file.path) for file in key.files)
    return ", ".join([f"{key.kind} {files}", *(f"{name}={value}" for name, value in key.options)])
