"""A gate, and what is watched before it, on a card whose numbers are those of ComfyUI's books and of this file."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy_execution.utils import CurrentNodeContext
from host import BASE, CPU, ON_DOUBLE, SERVER, error_of, mm, node, pack
from torch import nn

CARD = torch.device("cpu", 0)
WEIGHTS = (64 * 64 + 64) * 4
GIB = 1 << 30
kept = pack("patches.kept")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)


class Transformer(Network):
    """Another name in a table."""


class Card:
    """Its live tensors are the books' and `more`; its peak is the most that was read or planted since a reset."""

    def __init__(self) -> None:
        self.more, self.peak, self.capacity = 0, 0, 1 << 30

    def script(self, device: str) -> Any:
        reading = pack("memory.reading")
        live = self.more + sum(x.model.loaded_size() for x in mm.current_loaded_models if x.model is not None)
        self.peak = max(self.peak, live)
        figures = {"allocated": live, "reserved": live, "used": live, "peak": self.peak, "total": self.capacity}
        return reading.Reading(device, **{name: reading.exact(size, "planted") for name, size in figures.items()})


@contextmanager
def a_card() -> Iterator[Card]:
    """ComfyUI's only accelerator for a while."""
    card, names = Card(), ("get_torch_device", "get_all_torch_devices")
    process, stock = vars(sys.modules["steadyvsr_state"]), {n: getattr(mm, n) for n in names if hasattr(mm, n)}
    pack("memory.probe").current()
    probe = process["probe"]
    process["probe"] = made = pack("memory.probe").ScriptedProbe(card.script)
    made.reset_peak = lambda device: setattr(card, "peak", 0)
    for name in stock:
        setattr(mm, name, (lambda *_, **__: CARD) if name == names[0] else (lambda *_, **__: [CARD]))
    cleared()
    try:
        yield card
    finally:
        cleared()
        process["probe"] = probe
        for name, original in stock.items():
            setattr(mm, name, original)


def cleared() -> None:
    SERVER.prompt_queue.currently_running.clear()
    kept.registry().release()
    mm.unload_all_models()
    mm.current_loaded_models.clear()
    gc.collect()


def patcher(network: type[nn.Module] = Network) -> Any:
    return pack("patches.versions").patcher_class()(network(), load_device=CARD, offload_device=CPU)


def owned(name: str, policy: str) -> Any:
    path = BASE / name
    path.touch()
    return kept.registry().obtain(kept.Key.of("model", [path]), policy, patcher, lambda value: [value], name)


def gate(**inputs: Any) -> Any:
    """A gate's report, or its error in words."""
    widgets = {"value": 1, "phase": "p", "budget_gb": -1.0, "needs_gb": 0.0, "on_violation": "error", **inputs}
    lists = {name: value if isinstance(value, list) else [value] for name, value in widgets.items()}
    clone = node("PhaseGate").PREPARE_CLASS_CLONE({})
    clone.hidden.unique_id = None
    with torch.inference_mode():
        return clone.execute(**lists).args[1]


class Visible:
    """As a CLIP_VISION is made: a network, and a patcher for it."""

    def __init__(self) -> None:
        self.model = Network()
        self.patcher = pack("patches.versions").patcher_class()(self.model, load_device=CARD, offload_device=CPU)


class Controlling:
    """As a CONTROL_NET tells its models, on the double."""

    def __init__(self) -> None:
        self.own = patcher()

    def get_models(self) -> list:
        return [self.own]


def control_net() -> Any:
    if ON_DOUBLE:
        return Controlling()
    # Its own patcher is made inside.
    return importlib.import_module("comfy.controlnet").ControlNet(Network(), load_device=CARD, manual_cast_dtype=None)


class Described:
    """As an UPSCALE_MODEL and a STYLE_MODEL are made: a network without a patcher."""

    def __init__(self) -> None:
        self.model = Network()


def kinds() -> dict:
    """Models of other kinds on a gate's model inputs: their bytes on the card before and after it."""
    seen: dict[str, Any] = {}
    makers = {"CLIP_VISION": Visible, "CONTROL_NET": control_net, "GLIGEN": patcher, "UPSCALE_MODEL": Described}
    with a_card():
        for kind, make in makers.items():
            value = make()
            residency = pack("patches.residency")
            patchers = [] if kind == "UPSCALE_MODEL" else residency.patchers_of(value) if kind != "none" else []
            mm.load_models_gpu(patchers)
            before = sum(x.loaded_size() for x in patchers)
            error = error_of(gate, model_1=value)
            report = "" if error != "no error" else gate(model_1=value)
            seen[kind] = [before, sum(x.loaded_size() for x in patchers), error, "does not manage it" in report]
            del value, patchers
        seen["no model"] = error_of(gate, model_1="a word")
    return seen


def scopes() -> dict:
    """What is left on the card by a gate, of its own model, one that nobody keeps, a kept one and a pinned one."""
    seen = {}
    with a_card():
        for scope in ("these", "everything else too", "everything", None):
            cleared()
            models = {"own": patcher(), "other": patcher(), "kept": owned("K", "keep"), "pinned": owned("P", "pin")}
            mm.load_models_gpu(list(models.values()))
            gate(model_1=models["own"], **({} if scope is None else {"offload": scope}))
            seen[str(scope)] = sorted(name for name, model in models.items() if model.loaded_size())
            del models
    return seen


PROMPT = {
    "1": {"class_type": "Loader", "inputs": {}},
    "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0]}},
    "3": {"class_type": "SteadyVSR_PhaseGate",
          "inputs": {"value": ["2", 0], "phase": "sample", "peak_gb": 20_000 / GIB, "on_violation": "error"}},
    "4": {"class_type": "Decoder", "inputs": {"samples": ["3", 0], "vae": ["7", 0]}},
    "5": {"class_type": "SteadyVSR_PhaseGate",
          "inputs": {"value": ["4", 0], "phase": "decode", "peak_gb": 22_000 / GIB, "on_violation": "error"}},
    "6": {"class_type": "Preview", "inputs": {"image": ["5", 0]}},
    "7": {"class_type": "Loader", "inputs": {}},
}  # fmt: skip


@contextmanager
def running(name: str, **changes: Any) -> Iterator[None]:
    """A node in work, as ComfyUI's worker and executor tell it; `changes` are inputs of the first gate."""
    nodes = {**PROMPT, "3": {**PROMPT["3"], "inputs": {**PROMPT["3"]["inputs"], **changes}}}
    running.count = getattr(running, "count", 0) + 1  # type: ignore[attr-defined]
    prompt = f"prompt-{running.count}"  # type: ignore[attr-defined]
    SERVER.prompt_queue.currently_running[0] = (0, prompt, nodes)
    try:
        mm.throw_exception_if_processing_interrupted()  # as ComfyUI does before each node
        with CurrentNodeContext(prompt, name):
            yield
    finally:
        SERVER.prompt_queue.currently_running.clear()


def interrupted() -> str:
    """What ComfyUI's question for an interrupt, at a step of a sampler, comes to."""
    return error_of(mm.throw_exception_if_processing_interrupted)


@contextmanager
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("steadyvsr.patches")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def watched() -> dict:
    """A phase of at most 20,000 bytes in which a model of 16,640 works, with 1,000 and then 9,000 bytes of its own."""
    seen: dict[str, Any] = {}
    with a_card() as card:
        model = patcher()

        def work(name: str, before: int = 0, **changes: Any) -> list[str]:
            cleared()
            card.more = 0
            pack("memory.ledger").current().devices = [CARD]
            pack("memory.ledger").current().begin_sequence()
            card.peak = before
            with running(name, **changes):
                mm.load_models_gpu([model])
                card.more = 1_000
                found = [interrupted()]
                card.peak = WEIGHTS + 9_000
                limits = pack("patches.limits")
                limits._watched().next_reading = 0.0
                return [*found, interrupted()]

        seen["before the gate"] = work("2")
        seen["a loader, before both gates"] = work("1")
        seen["a loader of the next phase, after a larger one"] = work("7", before=WEIGHTS + 9_000)
        seen["a gate"] = work("3")
        seen["behind all gates"] = work("6")
        seen["without a limit"] = work("2", peak_gb=-1.0)
        seen["a limit that another node computes"] = work("2", peak_gb=["1", 0])
        seen["a node that the prompt does not have"] = work("99")
        with warnings() as lines:
            seen["warn"] = work("2", on_violation="warn")
        seen["warned"] = lines
        card.peak = 1 << 30
        seen["outside a prompt"] = interrupted()
    return seen


def admitted() -> dict:
    """Loading beside a pinned model on a card of 30,000 bytes, without and with a limit."""
    seen: dict[str, Any] = {}
    with a_card() as card:
        card.capacity = 30_000
        pinned, loose, new = owned("pinned.safetensors", "pin"), patcher(), patcher(Transformer)

        def load(more: int = 0, beside: Any = pinned, **changes: Any) -> dict:
            mm.unload_all_models()
            mm.current_loaded_models.clear()
            new.detach()
            mm.load_models_gpu([beside])
            with running("2", **changes), warnings() as lines:
                error = error_of(mm.load_models_gpu, [new], memory_required=more)
            return {"error": error, "said": lines, "loaded": new.loaded_size() > 0}

        seen["no limit"] = load(peak_gb=-1.0)
        seen["a limit"] = load(peak_gb=32_000 / GIB)
        seen["a limit, warn"] = load(peak_gb=32_000 / GIB, on_violation="warn")
        kept.registry().release()
        seen["it fits"] = load(peak_gb=34_000 / GIB, beside=loose)
        card.capacity = 1 << 30
        seen["room"] = load(peak_gb=-1.0)
        kept.registry().release()
    return seen


SCENARIOS = {"kinds": kinds, "scopes": scopes, "watched": watched, "admitted": admitted}
