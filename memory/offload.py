"""Verified offload: expected → move → drop → collect → clean → synchronise → measured → verdict.

What a model is, how it is moved and what the books say comes in as plain callables (`Subject`). The verdict rests on
counters that are read before and after; the holders of memory are searched for only when some is still held.
"""

from __future__ import annotations

import enum
import gc
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import holders, probe
from .reading import EXACT, MIB, Figure, Reading, size_text, spelled

log = logging.getLogger("steadyvsr.memory")

# Tolerances (research on real cards: 512 B rounding for each tensor, 2 MiB segments for small ones, 20 MiB for large).
ALLOCATED_FLOOR_BYTES, ALLOCATED_SHARE = 16 * MIB, 0.02
POOL_FLOOR_BYTES, POOL_SHARE = 64 * MIB, 0.05
PROCESS_FLOOR_BYTES, PROCESS_SHARE = 32 * MIB, 0.10
DEVICE_FLOOR_BYTES, DEVICE_SHARE = 256 * MIB, 0.10
LARGEST_TOLERANCE = 0.25
"""Of what was asked: no floor may be larger than a small model, or every outcome would pass."""
ALIVE_BYTES = 1 * MIB
"""Of the model's storages, by torch's own weak references, which have no noise to allow for."""

LINE_CHARACTERS = 600
"""Of a receipt as text, at most; `to_json` has everything."""
WIDTHS = (100, 60, 30, 15)
"""Of a name in it, the first that fits."""
NAMED_HOLDERS = 3


class Verdict(str, enum.Enum):
    """What an offload came to."""

    FREED = "FREED"
    FREED_TO_POOL = "FREED_TO_POOL"
    STILL_HELD = "STILL_HELD"
    NOT_LOADED = "NOT_LOADED"
    CANNOT_OFFLOAD = "CANNOT_OFFLOAD"
    UNVERIFIABLE = "UNVERIFIABLE"


@dataclass(frozen=True)
class Subject:
    """One model as an offload sees it.

    Attributes:
        name: for reports.
        load_device, offload_device: equal where nothing can be offloaded.
        loaded_bytes: what the books say is on the load device now.
        move: offloads through the owner of the books. A RuntimeError goes into the receipt; all else leaves `offload`.
        tensors: the model's parameters and buffers as they are now, with their names.
        roots: labelled objects that may hold copies, such as {"patcher backup": patcher.backup}; a function is called
            for its object when it is needed.
    """

    name: str
    load_device: torch.device
    offload_device: torch.device
    loaded_bytes: Callable[[], int]
    move: Callable[[], None]
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]
    roots: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """What was asked, what was measured, and what that means.

    Attributes:
        name, device: of the model, and where it was.
        verdict: only FREED means that the driver has the memory back.
        asked: bytes on the load device by the books, before.
        still_loaded: the same, after.
        left_tensors: bytes by which live tensors went down; None where they cannot be counted.
        left_driver: bytes by which the driver's figure went down, with its source.
        held: who holds memory that should be gone.
        unnamed: bytes for which no holder could be named.
        searched: whether the search for holders ended before its time was up.
        parameters: bytes of parameters and buffers by the device where they are now.
        before, after: the readings; None where nothing was moved.
        seconds: of the offload and both readings.
        error: what the move raised.
        notes: what limits this receipt.
    """

    name: str
    device: str
    verdict: Verdict
    asked: int
    still_loaded: int
    left_tensors: int | None = None
    left_driver: Figure = Figure()
    held: tuple[holders.Holder, ...] = ()
    unnamed: int = 0
    searched: bool = True
    parameters: Mapping[str, int] = field(default_factory=dict)
    before: Reading | None = None
    after: Reading | None = None
    seconds: float = 0.0
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def freed(self) -> bool:
        """Whether the tensors are gone, to the driver or to the pool."""
        return self.verdict in (Verdict.FREED, Verdict.FREED_TO_POOL)

    def __str__(self) -> str:
        """`asked 6.10 GiB · left the tensors 6.10 · left the driver 6.02 (NVML) · held 0.08 by the cache · 0.41 s`"""
        if self.verdict is Verdict.NOT_LOADED:
            return f"asked {size_text(0)} · not loaded on {self.device}"
        if self.verdict is Verdict.CANNOT_OFFLOAD:
            return f"asked {size_text(self.asked)} · cannot offload: {self.device} is also where it rests"
        lines = [self._line(width) for width in WIDTHS]
        return next((line for line in lines if len(line) <= LINE_CHARACTERS), lines[-1])

    def _line(self, width: int) -> str:
        """The line with names of at most `width` characters."""
        said = [("asked", self.asked, "")]
        if self.left_tensors is not None:
            said.append(("left the tensors", self.left_tensors, ""))
        if self.left_driver.bytes is not None:
            scope = "" if self.left_driver.confidence == EXACT else f", {self.left_driver.confidence}"
            said.append(("left the driver", self.left_driver.bytes, f" ({self.left_driver.source}{scope})"))
        said += [("held", holder.bytes, f" by {holder.words(width)}") for holder in self.held[:NAMED_HOLDERS]]
        if rest := self.held[NAMED_HOLDERS:]:
            said.append(("held", sum(holder.bytes for holder in rest), f" by {len(rest)} more"))
        if self.unnamed:
            shown = "nothing that Python shows (C++, or a running function)"
            said.append(("held", self.unnamed, f" by {shown if self.searched else 'nobody found in time'}"))
        numbers = spelled([amount for _, amount, _ in said])
        parts = [f"{verb} {number}{more}" for (verb, _, more), number in zip(said, numbers, strict=True)]
        if self.left_tensors is None:
            parts.append("tensors not countable")
        if self.verdict is not Verdict.FREED:
            parts.append(self.verdict.value)
        if self.error:
            parts.append(holders.shortened(self.error, 3 * width))
        return " · ".join([*parts, f"{self.seconds:.2f} s"])

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            **asdict(self),
            "verdict": self.verdict.value,
            "line": str(self),
        }


def offload(
    subject: Subject,
    clean: Callable[[], None],
    *,
    reader: probe.Probe | None = None,
    drop: Callable[[], None] = lambda: None,
    seconds: float = holders.SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Receipt:
    """Offloads one model and says what became of its memory.

    Args:
        clean: gives the allocator's unused memory back (ComfyUI: `soft_empty_cache`).
        reader: what to read with; None is the probe of the process.
        drop: lets go of the caller's own references, after the move.
        seconds: most time for the search for holders.
    """
    device = subject.load_device
    asked = int(subject.loaded_bytes())
    if asked == 0 or subject.load_device == subject.offload_device:
        verdict = Verdict.NOT_LOADED if asked == 0 else Verdict.CANNOT_OFFLOAD
        return Receipt(subject.name, str(device), verdict, asked, asked, parameters=where(subject.tensors()))
    reader = reader or probe.current()
    started = clock()
    watched = holders.watch(
        (name, tensor) for name, tensor in subject.tensors() if holders.same_device(tensor.device, device)
    )
    before = probe.attempt(reader, device, settled=True)
    error = ""
    try:
        subject.move()
    except RuntimeError as failure:  # torch's, out of memory among them; measured all the same
        error = f"{type(failure).__name__}: {failure}"
        log.error("offload of %s: %s", subject.name, error)
    drop()
    gc.collect()
    clean()
    _synchronise(reader, device)
    after = probe.attempt(reader, device, settled=True)
    elapsed = clock() - started
    receipt = weigh(
        subject.name,
        device,
        (asked, int(subject.loaded_bytes())),
        (before, after),
        watched,
        subject.roots,
        seconds=seconds,
        clock=clock,
    )
    if receipt.verdict is not Verdict.STILL_HELD and not receipt.held and device.type != "cpu":
        # Nothing of the model is held: what the labelled roots have on the device is shown all the same.
        sizes = {label: holders.root_bytes(root, device) for label, root in subject.roots.items()}
        receipt = replace(receipt, held=tuple(holders.Holder(label, size) for label, size in sizes.items() if size))
    return replace(receipt, parameters=where(subject.tensors()), seconds=elapsed, error=error)


def weigh(
    name: str,
    device: torch.device,
    books: tuple[int, int],
    readings: tuple[Reading, Reading],
    watched: Sequence[holders.Watched],
    roots: Mapping[str, Any],
    *,
    seconds: float = holders.SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Receipt:
    """The receipt of models that were taken off a device, by readings before and after.

    Args:
        name: of the models.
        books: bytes that were to leave the device, and what of them the books still have there.
        readings: of the device, before and after.
        watched: their storages on the device, from `holders.watch`, made before.
        roots: as in `Subject`.
        seconds: most time for the search for holders; 0 searches nothing.
    """
    (asked, still_loaded), (before, after) = books, readings
    # On the CPU what rests and what is loaded look alike.
    alive = sum(item.bytes for item in watched if item.alive) if device.type != "cpu" else 0
    verdict, notes = judge(asked, still_loaded, alive, before, after)
    held: tuple[holders.Holder, ...] = ()
    unnamed, searched = 0, True
    if (verdict is Verdict.STILL_HELD or alive) and seconds:
        found = holders.find(watched, roots, seconds, clock)
        held, unnamed, searched = found.holders, found.unnamed, found.complete
        if not searched:
            notes.append(f"the search for holders was stopped after {found.seconds:.1f} s")
    return Receipt(
        name,
        str(device),
        verdict,
        asked,
        still_loaded,
        left_tensors=tensor_drop(before, after),
        left_driver=_driver_drop(before, after),
        held=held,
        unnamed=unnamed,
        searched=searched,
        before=before,
        after=after,
        seconds=after.moment - before.moment,
        notes=tuple(dict.fromkeys([*notes, *before.notes, *after.notes])),
    )


def judge(asked: int, still_loaded: int, alive: int, before: Reading, after: Reading) -> tuple[Verdict, list[str]]:
    """The verdict on two readings, and what limits it.

    Args:
        asked, still_loaded: bytes on the device by the books, before and after.
        alive: bytes of the model's storages that are alive on the device after it.
    """
    notes: list[str] = []
    if still_loaded:
        notes.append(f"the books still say {size_text(still_loaded)}")
    if alive > ALIVE_BYTES:
        notes.append(f"storages of {size_text(alive)} are alive")
    held = still_loaded > 0 or alive > ALIVE_BYTES
    tensors, process = tensor_drop(before, after), _dropped(before.process, after.process)
    if tensors is None:
        if held:
            return Verdict.STILL_HELD, notes
        if process is None or process < asked - _tolerance(asked, PROCESS_FLOOR_BYTES, PROCESS_SHARE):
            notes.append("tensors cannot be counted on this device, and the process did not shrink by as much")
            return Verdict.UNVERIFIABLE, notes
        notes.append("judged by the process alone: tensors cannot be counted on this device")
        return Verdict.FREED, notes
    if held or tensors < asked - _tolerance(asked, ALLOCATED_FLOOR_BYTES, ALLOCATED_SHARE):
        return Verdict.STILL_HELD, notes
    returned = _returned(asked, before, after, notes)
    return (Verdict.FREED if returned else Verdict.FREED_TO_POOL), notes


def where(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes of unique storages by device. Tensors without memory (meta) count 0 under their device."""
    found: dict[str, dict[int | None, int]] = {}
    for _, tensor in tensors:
        pointer = holders.storage_of(tensor)
        size = 0 if pointer is None else tensor.untyped_storage().nbytes()
        found.setdefault(str(tensor.device), {})[pointer] = size
    return {device: sum(sizes.values()) for device, sizes in found.items()}


def _returned(asked: int, before: Reading, after: Reading, notes: list[str]) -> bool:
    """Whether the memory went back to the driver, by every exact figure that there is."""
    tolerance = _tolerance(asked, POOL_FLOOR_BYTES, POOL_SHARE)
    pool = _dropped(before.reserved, after.reserved)
    if pool is not None:
        # Dynamic weights lie outside the pool.
        pool += _dropped(before.dynamic, after.dynamic) or 0
    process = _dropped(before.process, after.process)
    if known := [drop for drop in (pool, process) if drop is not None]:
        return min(known) >= asked - tolerance
    device = _dropped(before.used, after.used)
    if device is not None and device >= asked - _tolerance(asked, DEVICE_FLOOR_BYTES, DEVICE_SHARE):
        notes.append("the driver's side is known for the whole device only, other processes included")
        return True
    notes.append("the driver's side is unknown")
    return False


def _synchronise(reader: probe.Probe, device: torch.device) -> None:
    try:
        reader.synchronise(device)
    except Exception as error:  # a probe that fails is a marked reading, see probe.attempt
        log.warning("synchronise %s: %s", device, error)


def _tolerance(asked: int, floor: int, share: float) -> float:
    return min(max(floor, share * asked), LARGEST_TOLERANCE * asked)


def _dropped(before: Figure, after: Figure) -> int | None:
    """How far a figure went down; None where either is unknown or they come from different sources."""
    if before.bytes is None or after.bytes is None or before.source != after.source:
        return None
    return before.bytes - after.bytes


def tensor_drop(before: Reading, after: Reading) -> int | None:
    """Bytes by which live tensors went down between two readings; None where they cannot be counted."""
    counted = before.allocated.bytes is not None and after.allocated.bytes is not None
    return _dropped(before.tensors, after.tensors) if counted else None


def _driver_drop(before: Reading, after: Reading) -> Figure:
    for first, second in ((before.process, after.process), (before.used, after.used)):
        if (drop := _dropped(first, second)) is not None:
            return Figure(drop, first.source, first.confidence)
    return Figure(note="the driver's side could not be read before and after from one source")
