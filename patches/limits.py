"""The limit of the phase that is running: watched while it runs, and asked before a model is loaded.

A phase ends at a gate, so its limit stands at its end. The prompt's definition says which gate that is: the nearest one
behind the node that is executing. A node that leads to no gate belongs to no phase, and is not watched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..memory import budget, probe
from ..memory.process import shared
from ..memory.reading import Figure, size_text
from . import prompt, residency, versions
from .kept import PINNED, registry

log = logging.getLogger("steadyvsr.patches")

GATE_CLASS, GATE = "SteadyVSR_PhaseGate", "Phase Gate"
CPU = torch.device("cpu")
PERIOD_SECONDS = 0.1
"""Between two readings: since 0.33 ComfyUI asks for interrupts at every operation of a network. Peaks are counted by
the allocator meanwhile, so none is missed where it has such a counter."""


class PhaseLimitExceeded(RuntimeError):
    """A phase takes more than its gate allows."""


@dataclass(frozen=True)
class PhaseLimit:
    """What a gate says of the phase that it ends.

    Attributes:
        peak: bytes of live tensors on each card.
        stops: whether the workflow stops there, or a warning is logged.
    """

    phase: str
    peak: int
    stops: bool


@dataclass
class _Watch:
    """The node that was asked about last, the limit of its phase, and what was said last.

    Attributes:
        before: the peak on each device when the node began: what earlier nodes took is not its doing.
    """

    node: tuple[str, str] | None = None
    limit: PhaseLimit | None = None
    before: dict[str, int] = field(default_factory=dict)
    next_reading: float = 0.0
    said: str = ""


def limit_of(running: prompt.RunningPrompt) -> PhaseLimit | None:
    """The limit of the phase that the executing node belongs to; None where no gate sets one."""
    if running.nodes[running.node].get("class_type") == GATE_CLASS:
        return None
    children = _children(running.nodes)
    gates = _nearest_gates(running.node, running.nodes, children)
    # A loader may lead to several gates: the first of them ends the phase that is running.
    later = {other for gate in gates for other in _reached(gate, children)}
    limits = [_limit(running.nodes[gate].get("inputs") or {}) for gate in gates if gate not in later]
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.peak, default=None)


def exceeded() -> PhaseLimitExceeded | None:
    """The error with which the executing node has to stop because its phase took too much; None goes on."""
    watch = _watched()
    if watch.node is None and (queued := prompt.queued()) is not None and any(_limits(queued.nodes)):
        # ComfyUI asks once before each node, outside of it.
        watch.before = {device: figure.bytes or 0 for device, figure in _peaks().items()}
    if watch.limit is None or (now := time.perf_counter()) < watch.next_reading:
        return None
    watch.next_reading = now + PERIOD_SECONDS
    for device, figure in _peaks().items():
        peak = figure.bytes or 0
        if peak > max(watch.limit.peak, watch.before.get(device, 0)):
            got = f"a peak of {_exact(peak)} ({figure.source})"
            todo = "Use smaller tiles or fewer frames in this phase, offload more before it, or raise peak_gb."
            return _refused(watch, device, got, todo)
    return None


def refusal(models: Sequence[Any], memory_required: float = 0) -> PhaseLimitExceeded | None:
    """Says which of these loads is predicted not to fit, and what is in the way.

    Args:
        models: ModelPatchers, as `load_models_gpu` takes them.
        memory_required: bytes that their work will need beside the weights.

    Returns:
        The error with which the load has to stop, where the phase has a limit; None goes on.
    """
    watch = _watched()
    patchers = {id(x.model): x for model in models for x in (model, *model.model_patches_models())}
    for device in dict.fromkeys(patcher.load_device for patcher in patchers.values()):
        own = [patcher for patcher in patchers.values() if patcher.load_device == device]
        # Dynamic VRAM takes what is free and goes on with less: it always fits.
        weights = sum(max(0, x.model_size() - x.loaded_size()) for x in own if versions.dynamic_vram(x) is None)
        if device == CPU or not weights:
            continue
        reading, needed = probe.read(device, settled=True), int(weights + memory_required)
        others = [item for item in residency.residents(device) if item.bytes and item.handle not in _handles(own)]
        admission = budget.may_load(needed, reading, [_occupant(item) for item in others])
        may_go = sum(item.bytes for item in others if not item.dead and item.policy != PINNED)
        free_to_go = sum(item.bytes for item in others if not item.dead and item.policy not in ("keep", PINNED))
        names = " + ".join(type(patcher.model).__name__ for patcher in own)
        if admission.short > free_to_go:
            _say(watch, f"loading {names} on {admission}")
        if watch.limit is not None and reading.allocated.bytes is not None:
            # ComfyUI moves others only as far as it is short of memory.
            peak = reading.allocated.bytes + weights - min(may_go, admission.short)
            if peak > watch.limit.peak:
                got = f"{names}, with which {_exact(peak)} would be there ({admission})"
                return _refused(watch, str(device), got, "Offload more before this phase, or raise peak_gb.")
    return None


def _watched() -> _Watch:
    watch, node = shared("phase_watch", _Watch), prompt.executing()
    if node != watch.node:
        watch.node, watch.next_reading = node, 0.0
        running = prompt.running() if node is not None else None
        watch.limit = limit_of(running) if running is not None and running.node in running.nodes else None
    return watch


def _peaks() -> dict[str, Figure]:
    """The most live tensors on each card in the phase that is running."""
    peaks = residency.prompt_ledger().running_peaks()
    return {device: peak.allocated for device, peak in peaks.items() if device != str(CPU)}


def _limits(nodes: Mapping[str, Any]) -> Iterator[PhaseLimit]:
    for node in nodes.values():
        if node.get("class_type") == GATE_CLASS and (limit := _limit(node.get("inputs") or {})) is not None:
            yield limit


def _refused(watch: _Watch, device: str, got: str, todo: str) -> PhaseLimitExceeded | None:
    assert watch.limit is not None
    limit = watch.limit
    text = f'{GATE}: expected at most {_exact(limit.peak)} on {device} during phase "{limit.phase}"; got {got}. {todo}'
    text = "\n".join([text, *_table(device)])
    if limit.stops:
        return PhaseLimitExceeded(text)
    watch.limit = None  # it has been said, and more would follow at every step
    _say(watch, text)
    return None


def _say(watch: _Watch, text: str) -> None:
    if text != watch.said:
        watch.said = text
        log.warning("%s", text)


def _table(device: str) -> Iterator[str]:
    """What is on a device now, one line each."""
    reading = probe.read(device, settled=True)
    items = [item for item in residency.residents() if item.bytes and str(item.device) == device]
    rest = (reading.allocated.bytes or 0) - sum(item.bytes for item in items)
    yield f"on {device} now:"
    for item in items:
        yield f"  {size_text(item.bytes)}  {_occupant(item).name}"
    if rest > 0:
        yield f"  {size_text(rest)}  other tensors"


def _occupant(item: residency.Resident) -> budget.Occupant:
    """A model with who keeps it: `WAN21 (wan.safetensors, kept by node 4)`."""
    entry = next((entry for entry in registry().owned() if entry.id == item.id), None)
    if entry is None:
        return budget.Occupant(item.name, item.bytes, movable=not item.dead)
    nodes = ", ".join(sorted(entry.wishes_in(prompt.running()))) or "another workflow"
    by = f"{'pinned' if entry.policy == PINNED else 'kept'} by {'node ' * (nodes != 'another workflow')}{nodes}"
    return budget.Occupant(f"{item.name} ({entry.name}, {by})", item.bytes, movable=entry.policy != PINNED)


def _handles(patchers: Sequence[Any]) -> set[str]:
    return {residency.handle_of(patcher.model) for patcher in patchers}


def _exact(amount: int) -> str:
    return f"{size_text(amount)} ({amount:,} B)"


def _limit(inputs: Mapping[str, Any]) -> PhaseLimit | None:
    """A gate's limit where its widget sets one; what another node computes is not known yet."""
    peak, phase = inputs.get("peak_gb"), inputs.get("phase")
    if isinstance(peak, bool) or not isinstance(peak, int | float) or peak < 0:
        return None
    name = phase if isinstance(phase, str) else "phase"
    return PhaseLimit(name, budget.gib(peak), inputs.get("on_violation") != "warn")


def _children(nodes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Node → nodes that take something from it."""
    found: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for value in (node.get("inputs") or {}).values():
            if isinstance(value, list) and len(value) == 2:
                found.setdefault(str(value[0]), []).append(name)
    return found


def _nearest_gates(start: str, nodes: Mapping[str, Any], children: Mapping[str, list[str]]) -> list[str]:
    """The gates behind a node that no other gate stands before, on some way."""
    waiting, seen, gates = [start], {start}, []
    while waiting:
        for name in children.get(waiting.pop(), ()):
            if name in seen:
                continue
            seen.add(name)
            (gates if nodes[name].get("class_type") == GATE_CLASS else waiting).append(name)
    return gates


def _reached(start: str, children: Mapping[str, list[str]]) -> set[str]:
    waiting, seen = [start], set()
    while waiting:
        new = set(children.get(waiting.pop(), ())) - seen
        seen |= new
        waiting += new
    return seen
