"""ComfyUI in the process of a session script: its executor, the pack, a simulated card, and what watches them.

Import it from a script that ComfyUI's Python runs in ComfyUI's folder with the arguments PACK_FOLDER BASE_FOLDER;
importing it starts everything.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

PACK, BASE = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, os.getcwd())
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import execution  # noqa: E402
import phases_card  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402

CAPACITY = {"books": 5_000_000, "simcard": 64_000_000}
"""Bytes. By the books only weights take any: one model fits, and no two."""
GIB = 1 << 30
FLASHVSR = {
    "version": "auto", "precision": "auto", "device": "auto", "attention": "auto", "lq_cache_order": "fixed",
}  # fmt: skip


def pack(module: str) -> types.ModuleType:
    """A module of the pack, as ComfyUI's loader named it."""
    return importlib.import_module(str(PACK).replace(".", "_x_") + "." + module)


class PutOnCard:
    """Stands for a loader, LoRA or patch node that leaves its model on the card."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("CONDITIONING",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "put", "test"

    def put(self, model, after=None):
        mm.load_models_gpu([model])
        return (model,)


class Keep:
    """A node whose output, a LATENT, holds a view of a weight of the model as it lies on the card."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT", "MODEL"), "keep", "test"

    def keep(self, model):
        mm.load_models_gpu([model])
        return ({"samples": largest_weight(model).view(-1)}, model)


class Lists:
    """A node that makes a list of values."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {"default": 3})}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("IMAGE",), "make", "test", (True,)

    def make(self, count):
        return ([torch.full((1, 2, 2, 3), float(index)) for index in range(count)],)


class Sink:
    """An output node that remembers what reached it."""

    seen: list = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

    def take(self, image):
        Sink.seen.append(image)
        return {}


def largest_weight(patcher) -> torch.Tensor:
    return max(patcher.model.parameters(), key=lambda weight: weight.nbytes).data


class Witness:
    """Stands before the card's probe: remembers every answer, adds what a scenario plants, and can die."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.answers: list = []
        self.others = 0
        self.watched: list = []
        self.dies_after: int | None = None

    def sample(self, device, *, settled: bool = False):
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise RuntimeError("NVML: GPU is lost")
        reading = self.inner.sample(device, settled=settled)
        if str(device) == str(CARD.device):
            more = sum(item.bytes for item in self.watched if item.alive)
            changes = {name: self._plus(getattr(reading, name), more) for name in ("allocated", "reserved", "process")}
            changes["used"] = self._plus(reading.used, more + self.others)
            reading = dataclasses.replace(reading, **changes)
        self.answers.append(reading)
        return reading

    @staticmethod
    def _plus(figure, more: int):
        return figure if figure.bytes is None else dataclasses.replace(figure, bytes=figure.bytes + more)

    def reset_peak(self, device) -> None:
        self.inner.reset_peak(device)

    def synchronise(self, device) -> None:
        self.inner.synchronise(device)


class Recorder:
    """What was on the card in which phase, by ComfyUI's list; phases end where gates say so."""

    def __init__(self) -> None:
        self.loads: list[dict] = []
        self.ended: list[dict] = []
        self.stubbed: str | None = None
        self.before_move: Callable[[], None] = lambda: None
        self.after_move: Callable[[], None] = lambda: None
        load, free, gates = mm.load_models_gpu, mm.free_memory, pack("patches.phases")
        end_phase, residency = gates.end_phase, pack("patches.residency")
        running = [""]

        def load_models_gpu(*args, **keywords):
            result = load(*args, **keywords)
            self.loads.append({"phase": len(self.ended), "resident": resident()})
            return result

        def free_memory(*args, **keywords):
            if not residency.is_explicit():
                return free(*args, **keywords)
            if running[0] == self.stubbed:
                return []
            self.before_move()
            result = free(*args, **keywords)
            self.after_move()
            return result

        def ends(name, models, limits, *scope):
            models, running[0] = list(models), name
            before = resident()
            try:
                result = end_phase(name, models, limits, *scope)
            finally:
                running[0] = ""
            self.ended.append({"name": name, "before": before, "after": resident(), "ended": result})
            return result

        mm.load_models_gpu, mm.free_memory, gates.end_phase = load_models_gpu, free_memory, ends

    def take(self) -> tuple[list[dict], list[dict]]:
        loads, ended = self.loads, self.ended
        self.loads, self.ended = [], []
        return loads, ended


def resident() -> dict[str, int]:
    """Name → bytes of what ComfyUI's books say is on the simulated card."""
    found = {}
    for loaded in mm.current_loaded_models:
        if loaded.device == CARD.device and loaded.model is not None and loaded.model_loaded_memory():
            found[type(loaded.model.model).__name__] = loaded.model_loaded_memory()
    return found


class Server:
    """As much of ComfyUI's server as its executor needs."""

    client_id = last_node_id = last_prompt_id = None

    def send_sync(self, *_) -> None:
        pass


class Executor:
    """ComfyUI's executor in this process."""

    def __init__(self) -> None:
        arguments = {"cache_type": execution.CacheType.CLASSIC}
        if hasattr(execution.CacheType, "RAM_PRESSURE"):  # 0.33
            arguments["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.executor = execution.PromptExecutor(Server(), **arguments)
        self.count = 0

    def run(self, prompt: dict) -> dict:
        """Runs a prompt; which nodes were cached, the error if there was one, and the reports."""
        self.count += 1
        prompt, name = copy.deepcopy(prompt), f"prompt-{self.count}"
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(name, prompt, None))
        if not valid:
            raise AssertionError(f"the prompt was refused: {error} {node_errors}")
        self.executor.execute(prompt, name, {}, outputs)
        messages = dict(self.executor.status_messages)
        failed = messages.get("execution_error")
        made = self.executor.history_result["outputs"]
        return {
            "error": failed and failed["exception_message"].strip(),
            "failed_node": failed and failed["node_id"],
            "cached": sorted(messages.get("execution_cached", {}).get("nodes", ())),
            "reports": {node: json.loads(shown["text"][0]) for node, shown in made.items() if "text" in shown},
        }

    def forget(self) -> None:
        """As the button "Free model and node cache" does."""
        mm.unload_all_models()
        self.executor.reset()
        gc.collect()
        mm.soft_empty_cache()
        RECORD.take()


def live_bytes() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def execute(name: str, **inputs) -> tuple:
    """A node's outputs on plain values, computed the way the executor does."""
    lists = {key: item if isinstance(item, list) else [item] for key, item in inputs.items()}
    with torch.inference_mode():
        return nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"].PREPARE_CLASS_CLONE({}).execute(**lists).args


def gate(value=None, **inputs) -> tuple:
    widgets = {"phase": "test", "budget_gb": -1.0, "needs_gb": 0.0, "on_violation": "error"}
    return execute("PhaseGate", **{**widgets, "value": value, **inputs})


def error_of(function, *arguments, **keywords) -> str:
    try:
        function(*arguments, **keywords)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def execute_plain(name: str, **inputs):
    with torch.inference_mode():
        return nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"].PREPARE_CLASS_CLONE({}).execute(**inputs).args[0]


def numbers_of(value, skipped=("seconds", "moment", "pid", "index")) -> Iterator[int]:
    """Every whole number of a report."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in skipped:
                yield from numbers_of(item, skipped)
    elif isinstance(value, list):
        for item in value:
            yield from numbers_of(item, skipped)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def texts_of(value) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value


def gate_models(node: str) -> list:
    """The models that a node of the last prompt gave, from ComfyUI's cache."""
    cache = EXECUTOR.executor.caches.outputs
    found = cache.get(node) if not hasattr(cache, "get_local") else cache.get_local(node)
    values = [value for slot in getattr(found, "outputs", found) for value in slot]
    return [value for value in values if hasattr(value, "model_size")]


def allocated() -> int | None:
    """Bytes on the card by the probe."""
    return pack("memory.probe").read(CARD.device).allocated.bytes


def tiny_taesd():
    """A VAE that no gate of the workflow knows."""
    return comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())


def card() -> phases_card.SimulatedCard:
    """The books as a card, or with STEADYVSR_CARD=simcard a card with memory of its own, or two (simcard:2)."""
    kind, _, count = os.environ.get("STEADYVSR_CARD", "books").partition(":")
    if kind == "books":
        return phases_card.SimulatedCard(CAPACITY[kind])
    return importlib.import_module("simcard_card").AllocatorCards(CAPACITY[kind], int(count or 1))


phases_card.take_small_models()
# Before the pack is loaded: it wraps what ComfyUI has then.
CARD = card()
CARD.install()
vars(sys.modules["steadyvsr_state"]).pop("probe")  # the pack makes its own; it is asked for its reader below
FILES = phases_card.write_models(BASE)
if not asyncio.run(nodes.load_custom_node(str(PACK))):
    raise SystemExit("the pack did not load")
for extra in ("nodes_model_advanced", "nodes_primitive", "nodes_video", "nodes_preview_any"):
    asyncio.run(nodes.load_custom_node(os.path.join("comfy_extras", f"{extra}.py"), module_parent="comfy_extras"))
nodes.NODE_CLASS_MAPPINGS.update(
    {"Test_PutOnCard": PutOnCard, "Test_Keep": Keep, "Test_Lists": Lists, "Test_Sink": Sink}
)
DYNAMIC_READER = pack("memory.probe").current().dynamic
WITNESS = Witness(CARD)
vars(sys.modules["steadyvsr_state"])["probe"] = WITNESS
RECORD = Recorder()
EXECUTOR = Executor()
