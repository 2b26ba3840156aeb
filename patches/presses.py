"""What a press of "free memory" did: its life from before the unloading to the end, with a look at every stage.

| state | entered | snapshot |
|---|---|---|
| pressed | before ComfyUI unloads models | pre-unload |
| unloaded | after it | post-unload |
| reset | after the executor has dropped its node cache, before the garbage of that is collected | post-reset |
| collected | after the collection and the emptying of caches that follows it | post-collect |
| ended | where a press comes to its end without the stages that are left | none |

What left a device is what its own counters say, before against after; where that is less than ComfyUI's books say, the
holders of the models' memory are searched for, as after any offload.

"Unload Models" alone goes from unloaded to collected. Unloading after an out-of-memory error or at the end of a prompt
ends when it is done. So does a press after which neither this thread empties caches nor ComfyUI's worker collects
garbage before its next turn, the next prompt or the next press.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import comfy.model_management as mm
import torch

from ..memory import holders, offload, probe
from ..memory.process import shared
from ..memory.reading import Reading, size_text
from .kept import Entry, registry
from .residency import Resident, handle_of, node_outputs, residents
from .versions import is_dynamic, stream_buffers, torch_devices

log = logging.getLogger("steadyvsr.patches")

RING_SNAPSHOTS = 64
CPU, RAM = torch.device("cpu"), "RAM"
BUTTON, OUT_OF_MEMORY, HOUSEKEEPING = "button", "OOM", "housekeeping"
PRESSED, UNLOADED, RESET, COLLECTED, ENDED = "pressed", "unloaded", "reset", "collected", "ended"
STAGES = {PRESSED: "pre-unload", UNLOADED: "post-unload", RESET: "post-reset", COLLECTED: "post-collect"}
WENT_TO = {"pre-unload": "before unloading", "post-unload": "after unloading", "post-reset": "after the reset"}


@dataclass(frozen=True)
class Kept:
    """One owned model in a snapshot.

    Attributes:
        id, name, kind, policy: of the registry's entry.
        key: kind, files and options that make it this model, without paths: `vae wan.safetensors, device='cuda:0'`.
        networks: classes of its networks.
        listed: how many of its networks are in ComfyUI's list.
        dead: how many of those have lost their patcher.
        resident: bytes on the devices that it computes on.
        size: of all its weights.
        dynamic: whether the driver moves its pages (dynamic VRAM).
        places: bytes by where they are: a device, or "RAM".
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
    places: Mapping[str, int]
    hits: int
    loads: int
    yields: int
    dynamic: bool

    def __str__(self) -> str:
        """`wan.safetensors 3.33 MiB in RAM`, `wan.safetensors 3.33 MiB: 1.00 MiB on cuda:0, 2.33 MiB in RAM`"""
        sizes = {"in RAM" if place == RAM else f"on {place}": size for place, size in self.places.items() if size}
        if len(sizes) < 2:
            return f"{self.name} {size_text(self.size)} {next(iter(sizes), 'in RAM')}"
        return f"{self.name} {size_text(self.size)}: {', '.join(f'{size_text(sizes[x])} {x}' for x in sizes)}"


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
        devices: one reading of each accelerator, and one of the RAM.
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
            "residents": [item.to_json() for item in self.residents],
            "devices": [reading.to_json() for reading in self.devices],
        }

    @property
    def line(self) -> str:
        """The kept models in words, and where each is."""
        words = [
            f"{entry}{', not listed' if entry.resident and not entry.listed else ''}{', dead' if entry.dead else ''}"
            for entry in self.kept
        ]
        return f"{self.stage}: {'; '.join(words) or 'nothing is kept'}"


class Press:
    """One press. Its methods are the events of its life; those that do not fit its state change nothing.

    Attributes:
        number: counts presses from 1.
        caller: button | OOM | housekeeping.
        reason: what the Free Memory node was given, or "".
        state: pressed | unloaded | reset | collected | ended.
        looks: the snapshots of the stages that it came to.
        lost: kept models that left their device or ComfyUI's list, though nobody gave them up and they did not yield;
            known when the press is over, like `receipts`.
        receipts: one for each device on which ComfyUI's books went down: what of that left it, by its own counters.
    """

    def __init__(self, number: int, caller: str, reason: str) -> None:
        self.number, self.caller, self.reason = number, caller, reason
        self.looks: list[Snapshot] = []
        self.lost: tuple[Kept, ...] = ()
        self.receipts: tuple[offload.Receipt, ...] = ()
        self._alive: dict[str, int] = {}
        self._thread = threading.get_ident()
        loaded = [(item.device, item.model) for item in list(mm.current_loaded_models)]
        self._devices = list(dict.fromkeys([*torch_devices(), *(device for device, _ in loaded), CPU]))
        self._watched = {
            handle_of(patcher.model): holders.watch(_weights(patcher.model, device))
            for device, patcher in loaded
            if patcher is not None
        }
        self._enter(PRESSED)

    @property
    def over(self) -> bool:
        return self.state in (COLLECTED, ENDED)

    def unloaded(self) -> None:
        """ComfyUI has unloaded models. An out-of-memory error and housekeeping end here."""
        self._enter(UNLOADED)
        if self.caller != BUTTON:
            self.end()

    def was_reset(self) -> None:
        """The executor has dropped its node cache."""
        if self.state == UNLOADED and self._thread == threading.get_ident():
            self._enter(RESET)

    def emptied(self) -> None:
        """Caches were emptied; that this thread has collected garbage before is read from Python's own count."""
        if self.over or self._thread != threading.get_ident():
            return
        if _collections() > self._seen_collections:
            self._enter(COLLECTED)
            self._settle()
        else:
            self.end()

    def end(self) -> None:
        """No further stage of this press will come."""
        if not self.over:
            self.state = ENDED
            self._settle()

    @property
    def before(self) -> Snapshot:
        return self.looks[0]

    @property
    def after(self) -> Snapshot:
        return self.looks[-1]

    @property
    def left_out(self) -> str:
        """Which stages this press did not come to, in words; empty if it came to all."""
        stages = [look.stage for look in self.looks]
        if STAGES[COLLECTED] in stages:
            return "" if STAGES[RESET] in stages else "the node cache was not reset"
        return f"ended {WENT_TO[stages[-1]]}"

    @property
    def left(self) -> int | None:
        """Bytes of tensors that left the accelerators, by their own counters; None where one that unloaded has none."""
        if any(receipt.left_tensors is None for receipt in self.receipts):
            return None
        return sum(receipt.left_tensors or 0 for receipt in self.receipts) + sum(self._left_besides().values())

    @property
    def verdict(self) -> offload.Verdict:
        """The least good one of its receipts."""
        order = [offload.Verdict.STILL_HELD, offload.Verdict.UNVERIFIABLE, offload.Verdict.FREED_TO_POOL]
        found = [receipt.verdict for receipt in self.receipts]
        done = offload.Verdict.FREED if found else offload.Verdict.NOT_LOADED
        return next((verdict for verdict in order if verdict in found), done)

    @property
    def line(self) -> str:
        left = [_said(receipt) for receipt in self.receipts] or ["no model was unloaded"]
        left += [
            f"{size_text(size)} left {device}: tensors of no model" for device, size in self._left_besides().items()
        ]
        kept = ", ".join(map(str, self.after.kept)) or "none"
        return " · ".join(filter(None, [*left, f"kept: {kept}", self.left_out, self.reason]))

    def bytes_after(self, item: Resident) -> int:
        """Of a network of the first look, what is on its device now: by ComfyUI's books, or storages that live on."""
        on_cpu = item.device.type == "cpu"  # where what rests and what is loaded look alike
        return max(_bytes_now(self.after, item), 0 if on_cpu else self._alive.get(item.handle, 0))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "caller": self.caller,
            "reason": self.reason,
            "state": self.state,
            "left_out": self.left_out,
            "verdict": self.verdict.value,
            "left_bytes": self.left,
            "receipts": [receipt.to_json() for receipt in self.receipts],
            "lost": [entry.name for entry in self.lost],
            "snapshots": [snapshot.to_json() for snapshot in self.looks],
        }

    def _enter(self, state: str) -> None:
        there = tuple(residents())
        snapshot = Snapshot(
            self.number,
            STAGES[state],
            self.caller,
            self.reason,
            tuple(_kept(entry, there) for entry in registry().owned()),
            there,
            # The first and the last look are compared: both without heap pages that the C library keeps.
            tuple(probe.read(device, settled=state in (PRESSED, COLLECTED)) for device in self._devices),
        )
        self.state = state
        self.looks.append(snapshot)
        _presses().ring.append(snapshot)
        self._seen_collections = _collections()
        log.debug("%s %d: kept %s", snapshot.stage, self.number, [(x.name, x.resident) for x in snapshot.kept])

    def _settle(self) -> None:
        """What the press came to, said to the log and to whoever listens."""
        self.receipts = tuple(self._receipts())
        self._alive = {
            handle: sum(item.bytes for item in watched if item.alive) for handle, watched in self._watched.items()
        }
        self._watched.clear()
        now = {entry.id: entry for entry in self.after.kept}
        self.lost = tuple(e for e in self.before.kept if e.resident and _is_lost(e, now.get(e.id)))
        presses = _presses()
        with presses.lock:
            if presses.open is self:
                presses.open = None
            if self.caller != HOUSEKEEPING:
                presses.last = self
        # At the end of every prompt, where smart memory is off, is not worth a line.
        log.log(logging.DEBUG if self.caller == HOUSEKEEPING else logging.INFO, "%s: %s", self.caller, self.line)
        for entry in self.lost:
            log.error(
                "a kept model was lost: %s of %s (%s, %s; %s), %s on the device before, %s and %s now",
                "+".join(entry.networks), entry.name, entry.id, entry.policy, entry.key, size_text(entry.resident),
                size_text(now[entry.id].resident), "listed" if now[entry.id].listed else "not listed",
            )  # fmt: skip
        for listener in list(presses.listeners):
            listener(self)

    def _left_besides(self) -> dict[str, int]:
        """Bytes of tensors that left devices on which no model was unloaded, such as results in the node cache."""
        unloaded = {receipt.device for receipt in self.receipts}
        looks = zip(self._devices, self.before.devices, self.after.devices, strict=True)
        drops = {
            str(device): offload.tensor_drop(before, after) or 0 for device, before, after in looks if device != CPU
        }
        return {
            device: drop for device, drop in drops.items() if device not in unloaded and drop >= offload.ALIVE_BYTES
        }

    def _receipts(self) -> Iterator[offload.Receipt]:
        for index, device in enumerate(self._devices):
            gone = {
                item: item.bytes - now
                for item in self.before.residents
                if item.device == device and (now := _bytes_now(self.after, item)) < item.bytes
            }
            if not gone:
                continue
            whole = [item for item, size in gone.items() if size == item.bytes]
            yield offload.weigh(
                ", ".join(f"{item.name} {size_text(size)}" for item, size in gone.items()),
                device,
                (sum(gone.values()), 0),
                (self.before.devices[index], self.after.devices[index]),
                [storage for item in whole for storage in self._watched.get(item.handle, ())],
                {"ComfyUI's stream buffers": stream_buffers, "ComfyUI's node cache": node_outputs},
                # Garbage that nobody has collected yet would be named as a holder.
                seconds=holders.SECONDS if self.state == COLLECTED else 0.0,
            )


class _Presses:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ring: deque[Snapshot] = deque(maxlen=RING_SNAPSHOTS)
        self.count = 0
        self.reason = ""
        self.open: Press | None = None
        self.last: Press | None = None
        self.listeners: list[Callable[[Press], None]] = []


def _presses() -> _Presses:
    return shared("presses", _Presses)


def set_reason(text: str) -> None:
    """Why the next press is asked for."""
    _presses().reason = text


def listen(listener: Callable[[Press], None]) -> None:
    """Calls `listener` with every press that is over."""
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


def begin(caller: str) -> Press:
    """Before unloading. A press that was not over yet ends here."""
    end_open()
    presses = _presses()
    with presses.lock:
        presses.count += 1
        reason = ""
        if caller == BUTTON:
            reason, presses.reason = presses.reason, ""
        presses.open = press = Press(presses.count, caller, reason)
        return press


def open_press() -> Press | None:
    """The press that is not over yet."""
    return _presses().open


def end_open() -> None:
    """Something else begins, such as ComfyUI's next turn: a press that is not over yet ends."""
    if (press := open_press()) is not None:
        press.end()


def _collections() -> int:
    """How many full collections of garbage Python has made."""
    return gc.get_stats()[-1]["collections"]


def _is_lost(before: Kept, now: Kept | None) -> bool:
    """Whether a kept model left its device or ComfyUI's list though nobody gave it up and it did not yield."""
    if now is None or now.yields > before.yields:
        return False
    # With dynamic VRAM the driver takes pages and brings them back when they are used.
    fewer = now.resident < before.resident and not now.dynamic
    return fewer or now.listed < min(1, before.listed)


def _said(receipt: offload.Receipt) -> str:
    """What left a device. Where that is not what ComfyUI's books say: the whole receipt."""
    if not receipt.freed or receipt.left_tensors is None:
        return f"{receipt.device}: {receipt.name}: {receipt}"
    pool = " for torch's pool" if receipt.verdict is offload.Verdict.FREED_TO_POOL else ""
    return f"{size_text(receipt.left_tensors)} left {receipt.device}{pool}: {receipt.name}"


def _weights(module: torch.nn.Module, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a network that are on that device."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in named if holders.same_device(tensor.device, device)]


def _bytes_now(after: Snapshot, item: Resident) -> int:
    """Bytes of that network in a later snapshot."""
    return sum(other.bytes for other in after.residents if other.handle == item.handle)


def _kept(entry: Entry, there: Iterable[Resident]) -> Kept:
    patchers = entry.patchers
    files = " ".join(os.path.basename(file.path) for file in entry.key.files)
    handles = {handle_of(patcher.model) for patcher in patchers}
    listed = [item for item in there if item.handle in handles]
    places: dict[str, int] = {}
    for patcher in patchers:
        place = str(patcher.load_device) if patcher.load_device != CPU else RAM
        places[place] = places.get(place, 0) + patcher.loaded_size()
    places[RAM] = max(0, entry.size_bytes - sum(size for place, size in places.items() if place != RAM))
    return Kept(
        id=entry.id,
        name=entry.name,
        kind=entry.key.kind,
        policy=entry.policy,
        key=", ".join([f"{entry.key.kind} {files}", *(f"{name}={value}" for name, value in entry.key.options)]),
        networks=tuple(type(patcher.model).__name__ for patcher in patchers),
        listed=len(listed),
        dead=sum(item.dead for item in listed),
        resident=sum(patcher.loaded_size() for patcher in patchers),
        size=entry.size_bytes,
        places=places,
        hits=entry.hits,
        loads=entry.loads,
        yields=entry.yields,
        dynamic=any(is_dynamic(patcher) for patcher in patchers),
    )
