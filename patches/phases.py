"""The end of a phase: its models offloaded and verified, what is still on the cards, and whether that is allowed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import torch

from ..memory import budget, ledger, probe
from ..memory.offload import Receipt, Verdict, where
from ..memory.process import shared
from ..memory.reading import Reading, size_text
from . import prompt, residency, versions
from .kept import EJECTABLE, POLICIES, registry

CPU = torch.device("cpu")
THESE, REST, EVERYTHING = "these", "everything else too", "everything"
SCOPES = (THESE, REST, EVERYTHING)
"""What a gate takes off the cards: its models; with them all that nobody keeps; kept and pinned models as well."""


@dataclass(frozen=True)
class PhaseLimits:
    """What a phase may take and must leave free; None is no limit.

    Attributes:
        resident: bytes that may still be on each card after it.
        peak: bytes of live tensors that it may have had on each card at its peak.
        free: bytes that must be free on ComfyUI's device for what follows.
    """

    resident: int | None = None
    peak: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Card:
    """One accelerator after a phase, counted by ComfyUI's books and by a probe.

    Attributes:
        models: by ComfyUI's books, largest first; those with nothing on the card are left out.
        reading: by the probe.
        peak: the most during the phase.
    """

    models: tuple[residency.Resident, ...]
    reading: Reading
    peak: ledger.Peak

    @property
    def books(self) -> int:
        return sum(model.bytes for model in self.models)

    @property
    def tensors(self) -> int | None:
        """Live tensors and dynamic weights; None where nothing counts them."""
        return None if self.reading.allocated.bytes is None else self.reading.tensors.bytes

    @property
    def resident(self) -> int:
        """The larger of both counts."""
        return max(self.books, self.tensors or 0)

    @property
    def source(self) -> str:
        """Who said `resident`."""
        return "ComfyUI's books" if self.books >= (self.tensors or 0) else self.reading.tensors.source

    def contents(self) -> str:
        """`WAN21 3.33 MiB (3,495,584 B), 0.50 MiB (524,288 B) of other tensors`"""
        parts = [
            f"{model.name} {exact_text(model.bytes)}"
            + (" (lost: somebody holds it, and ComfyUI can no longer move it)" if model.dead else "")
            for model in self.models
        ]
        beyond = (self.tensors or 0) - self.books
        if beyond > 0:
            parts.append(f"{exact_text(beyond)} of other tensors")
        return ", ".join(parts) or "nothing"

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.reading.device,
            "resident_bytes": self.resident,
            "resident_source": self.source,
            "books_bytes": self.books,
            "models": [model.to_json() for model in self.models],
            "reading": self.reading.to_json(),
            "peak": {name: vars(figure) for name, figure in vars(self.peak).items()},
        }


@dataclass(frozen=True)
class Ended:
    """The outcome of a phase; every number in it was read at the end of the phase.

    Attributes:
        receipts: one for each network that was to be offloaded.
        violations: what exceeds the limits, each as (expected, got, what to do).
    """

    phase: ledger.Phase
    limits: PhaseLimits
    receipts: tuple[Receipt, ...]
    cards: tuple[Card, ...]
    admission: budget.Admission | None
    violations: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """What a person reads."""
        said = [str(self.phase), *(f"{receipt.name}: {receipt}" for receipt in self.receipts)]
        said += [f"{card.reading.device} still holds {card.contents()}" for card in self.cards]
        return [*said, *([str(self.admission)] if self.admission else []), *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "phase": self.phase.name,
            "text": self.lines(),
            "violations": [f"expected {wanted}; got {got}. {todo}" for wanted, got, todo in self.violations],
            "limits_bytes": vars(self.limits),
            "offloaded": [receipt.to_json() for receipt in self.receipts],
            "cards": [card.to_json() for card in self.cards],
            "admission": self.admission
            and {**vars(self.admission), "in_the_way": [vars(item) for item in self.admission.in_the_way]},
            "before": [reading.to_json() for reading in self.phase.before],
            "after": [reading.to_json() for reading in self.phase.after],
            "seconds": self.phase.seconds,
        }


def end_phase(name: str, models: Iterable[Any], limits: PhaseLimits, scope: str = THESE) -> Ended:
    """Offloads the models of a phase, ends it in the ledger, and compares what is left with the limits.

    Args:
        scope: one of `SCOPES`: whether other models on the cards go as well.

    Raises:
        TypeError: something among `models` is no model.
    """
    book = residency.prompt_ledger()
    models = list(models)
    resting = [note for model in models if (note := _rests(model))]
    patchers = [patcher for model in models if not _rests(model) for patcher in residency.patchers_of(model)]
    own = {id(patcher.model) for patcher in patchers}
    patchers += [patcher for patcher in _on_cards(scope) if id(patcher.model) not in own]
    receipts = tuple(receipt for patcher in patchers for receipt in residency.offload_model(patcher))
    phase = book.end_phase(name)
    devices = accelerators()
    readings = {reading.device: reading for reading in phase.after}
    cards = tuple(
        Card(
            tuple(model for model in residency.residents(device) if model.bytes),
            readings[_name(device, readings)],
            phase.peaks[_name(device, readings)],
        )
        for device in devices
    )
    admission = residency.may_load(limits.free, mm.get_torch_device()) if limits.free is not None else None
    notes = [*resting, *(f"{card.reading.device}: {note}" for card in cards for note in card.reading.notes)]
    if not devices:
        notes.append("no accelerator: models rest where they compute, and only needs_gb has a meaning here")
    for card in cards:
        if card.tensors is None and limits.resident is not None:
            notes.append(f"{card.reading.device}: live tensors cannot be counted; judged by ComfyUI's books alone")
        if card.peak.allocated.bytes is None and limits.peak is not None:
            notes.append(f"{card.reading.device}: the peak cannot be read; its limit was not checked")
    if admission is not None and admission.free is None:
        notes.append(f"{admission.device}: free memory cannot be read; what is needed was not checked")
    violations = tuple(_violations(name, limits, receipts, cards, admission))
    # Its own models only: what else went may belong to a later phase, whose return is no reason to run again.
    _memory_of(prompt.running()).models = [
        weakref.ref(patcher.model) for patcher in patchers if id(patcher.model) in own
    ]
    return Ended(phase, limits, receipts, cards, admission, violations, tuple(notes))


def _on_cards(scope: str) -> list[Any]:
    """Patchers of the models on the cards that a scope takes beside those of the phase."""
    taken = {THESE: (), REST: (None, EJECTABLE), EVERYTHING: (None, *POLICIES)}[scope]
    listed = [item.model for item in mm.current_loaded_models if item.model is not None and item.device != CPU]
    owners = [(patcher, registry().owner_of(patcher)) for patcher in listed if patcher.loaded_size()]
    return [patcher for patcher, owner in owners if (owner and owner.policy) in taken]


def _rests(model: Any) -> str:
    """Where the weights of a model without a patcher are, such as an UPSCALE_MODEL's; "" for one that has a patcher.

    The nodes that use such a model move it themselves: there is nothing to offload through ComfyUI's books.
    """
    network: Any = getattr(model, "model", None)
    if not isinstance(network, torch.nn.Module) or residency.is_model(model):
        return ""
    found = ", ".join(f"{exact_text(size)} on {device}" for device, size in where(network.named_parameters()).items())
    return f"{type(network).__name__}: ComfyUI does not manage it; {found or 'it has no weights'}"


def work_counter(limits: PhaseLimits) -> int:
    """How often the gate that asks has had something to do when a prompt began; for its fingerprint.

    ComfyUI skips a gate whose inputs did not change, and everything behind it. That is right as long as the card is as
    the gate would leave it: then no phase before it has run. It is wrong if a model of that phase is back on the card,
    or if the card is fuller than the gate allows: then the number changes, and the gate runs.
    """
    residency.prompt_ledger()  # the first phase of a prompt begins here, before any node has run
    memory = _memory_of(prompt.running())
    own = {id(module) for reference in memory.models if (module := reference()) is not None}
    back = any(id(patcher.model) in own for patcher in _on_cards(EVERYTHING))
    if back or _beyond(limits):
        memory.count += 1
    return memory.count


def accelerators() -> list[torch.device]:
    """ComfyUI's devices without the CPU, where models rest and compute in one place and nothing has to be kept free."""
    return [device for device in versions.torch_devices() if device != CPU]


def exact_text(amount: int) -> str:
    """`3.33 MiB (3,495,584 B)`"""
    return f"{size_text(amount)} ({amount:,} B)"


@dataclass
class _GateMemory:
    count: int = 0
    models: list[weakref.ref] = field(default_factory=list)


def _memory_of(running: prompt.RunningPrompt | None) -> _GateMemory:
    """What is remembered of one gate, by its id in the graph."""
    return shared("phase_gates", dict).setdefault(running and running.node, _GateMemory())


def _beyond(limits: PhaseLimits) -> bool:
    """Whether the cards are fuller now than a gate allows."""
    for device in accelerators() if limits.resident is not None else ():
        card = Card(tuple(residency.residents(device)), probe.read(device, settled=True), ledger.Peak())
        if card.resident > (limits.resident or 0):
            return True
    return limits.free is not None and residency.may_load(limits.free, mm.get_torch_device()).short > 0


def _name(device: torch.device, readings: dict[str, Reading]) -> str:
    """The name under which a device was read: a probe may say `cuda:0` where ComfyUI says `cuda`."""
    exact = str(device)
    return exact if exact in readings else next((name for name in readings if name.startswith(device.type)), exact)


def _violations(
    phase: str,
    limits: PhaseLimits,
    receipts: tuple[Receipt, ...],
    cards: tuple[Card, ...],
    admission: budget.Admission | None,
) -> Iterable[tuple[str, str, str]]:
    end = f'at the end of phase "{phase}"'
    for receipt in receipts:
        wanted = f"{receipt.name} ({exact_text(receipt.asked)}) off {receipt.device} {end}"
        if receipt.verdict is Verdict.STILL_HELD:
            held = sum(holder.bytes for holder in receipt.held) + receipt.unnamed
            there = receipt.still_loaded or held or receipt.asked - (receipt.left_tensors or 0)
            todo = "Remove what holds it, or press Free model and node cache, and queue again."
            yield wanted, f"{exact_text(there)} still there: {receipt}", todo
        # On the CPU nothing can be offloaded, and nothing has to be.
        if receipt.verdict is Verdict.CANNOT_OFFLOAD and torch.device(receipt.device) != CPU:
            todo = "Start ComfyUI without --gpu-only and --highvram."
            yield wanted, "a model that rests where it computes", todo
    for card in cards:
        if limits.resident is not None and card.resident > limits.resident:
            yield (
                f"at most {exact_text(limits.resident)} resident on {card.reading.device} {end}",
                f"{exact_text(card.resident)} by {card.source}: {card.contents()}",
                "Connect these models to the gate, or raise budget_gb.",
            )
        peak = card.peak.allocated
        if limits.peak is not None and peak.bytes is not None and peak.bytes > limits.peak:
            yield (
                f'at most {exact_text(limits.peak)} on {card.reading.device} during phase "{phase}"',
                f"a peak of {exact_text(peak.bytes)} ({peak.source})",
                "Use smaller tiles or fewer frames in this phase, offload more before it, or raise peak_gb.",
            )
    if admission is not None and admission.short:
        yield (
            f"{exact_text(admission.needed)} free on {admission.device} {end}",
            f"{exact_text(admission.free or 0)} ({admission}). ".removesuffix(". "),
            "Connect to the gate what is in the way, end other programs on this card, or lower needs_gb.",
        )
