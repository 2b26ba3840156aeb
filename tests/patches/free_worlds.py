"""What becomes of kept models when memory is freed: scenarios on ComfyUI's model management, or on its double.

    python tests/patches/free_worlds.py PACK_FOLDER double          anywhere
    python tests/patches/free_worlds.py PACK_FOLDER comfyui         in ComfyUI's folder, by ComfyUI's Python

The last line of its output is JSON: column → scenario → what was seen. Columns are "keep", "pin" and "stock": the same
prompts without wrappers and without owners. Networks are one Linear of some MiB on a simulated accelerator, `cpu:0`;
prompts and the tail of ComfyUI's worker are played by `World`, in the worker's own order. "B+A" is listed/alive.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MIB = 1 << 20

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "session"))
    importlib.import_module("comfyui_place").prepare(sys.argv[2], Path(sys.argv[1]))

import psutil  # noqa: E402
import torch  # noqa: E402
from free_worker import NodeCache, PromptExecutor, PromptQueue  # noqa: E402

mm: Any = importlib.import_module("comfy.model_management")
ModelPatcher: Any = importlib.import_module("comfy.model_patcher").ModelPatcher
CurrentNodeContext: Any = importlib.import_module("comfy_execution.utils").CurrentNodeContext
kept: Any = importlib.import_module("steadyvsr.patches.kept")
presses: Any = importlib.import_module("steadyvsr.patches.presses")
READING: Any = importlib.import_module("steadyvsr.memory.reading").Reading
hooks: Any = importlib.import_module("steadyvsr.patches.hooks")

FIRST, SECOND, REST = torch.device("cpu:0"), torch.device("cpu:1"), torch.device("cpu")
EVERYTHING = {"unload_models": True, "free_memory": True}
STOCK = "stock"


class NoProbe:
    """Reads nothing: the real one takes most of the time, and the books are what is looked at here."""

    def sample(self, device: Any, *, settled: bool = False) -> Any:
        return READING(str(device))

    def reset_peak(self, device: Any) -> None:
        pass

    def synchronise(self, device: Any) -> None:
        pass


class Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


ERRORS = Errors()
logging.getLogger("steadyvsr").addHandler(ERRORS)


class World:
    """One ComfyUI from its start: models, prompts, buttons."""

    def __init__(self, column: str, capacity: int = 10_000, devices: tuple[torch.device, ...] = (FIRST,)) -> None:
        self.column, self.capacity, self.devices = column, capacity * MIB, devices
        self.executor = PromptExecutor()
        self.modules: list[weakref.ref] = []
        self.reads: dict[str, int] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.prompts = 0
        self.queue = PromptQueue()
        server = types.ModuleType("server")
        server.PromptServer = types.SimpleNamespace(instance=types.SimpleNamespace(prompt_queue=self.queue))
        sys.modules["server"] = server
        state = vars(sys.modules["steadyvsr_state"]) if "steadyvsr_state" in sys.modules else {}
        for name in ("retention", "presses", "relief"):
            state.pop(name, None)
        mm.current_loaded_models.clear()
        mm.DISABLE_SMART_MEMORY = False
        gc.collect()
        ERRORS.lines.clear()
        self._simulate_devices()
        self.place_wrappers()

    def place_wrappers(self) -> None:
        hooks.uninstall()
        for name in ("wrappers", "shortage_of_kept_models"):
            vars(sys.modules["steadyvsr_state"]).pop(name, None)
        if self.column != STOCK:
            hooks.install()

    def _simulate_devices(self) -> None:
        def free(device: Any = None, torch_free_too: bool = False) -> Any:
            amount = max(0, self.capacity - self.used(device or FIRST))
            return (amount, 0) if torch_free_too else amount

        mm.get_torch_device = lambda: self.devices[0]
        mm.get_all_torch_devices = lambda *_, **__: list(self.devices)
        mm.get_free_memory = free
        mm.get_total_memory = lambda device=None, torch_total_too=False: self.capacity
        # Reserves for a real card's allocator; the scenarios count MiB.
        mm.minimum_inference_memory, mm.EXTRA_RESERVED_VRAM = lambda: 0, 0

    # What there is.

    @property
    def cache(self) -> NodeCache:
        return self.executor.cache

    @cache.setter
    def cache(self, fresh: NodeCache) -> None:
        self.executor.cache = fresh

    def alive(self) -> list[torch.nn.Module]:
        return [module for module in (ref() for ref in self.modules) if module is not None]

    def used(self, device: torch.device) -> int:
        """By the networks themselves, not by ComfyUI's list: what that has lost is still there."""
        return sum(m.model_loaded_weight_memory for m in self.alive() if getattr(m, "device", None) == device)

    def resident(self) -> str:
        return self._names(m for m in self.alive() if m.device in self.devices and m.model_loaded_weight_memory)

    def state(self) -> str:
        listed = [loaded for loaded in mm.current_loaded_models if loaded.model is not None]
        dead = "+dead" if len(listed) < len(mm.current_loaded_models) else ""
        names = self._names(loaded.model.model for loaded in listed)
        return f"{names or '-'}{dead}/{self._names(self.alive()) or '-'}"

    @staticmethod
    def _names(modules: Iterator | list) -> str:
        return "".join(sorted(type(module).__name__ for module in modules))

    # Models.

    def path(self, name: str) -> Path:
        path = Path(self.folder.name) / name
        if not path.exists():
            path.write_text(name)
        return path

    def read(self, name: str, mib: int = 1, device: torch.device = FIRST, module: Any = torch.nn.Module) -> Any:
        """Reads a network from disk, as far as the world knows."""
        self.reads[name] = self.reads.get(name, 0) + 1
        made = type(name, (module,), {})()
        made.linear = torch.nn.Linear(256 * mib, 1024, bias=False)
        self.modules.append(weakref.ref(made))
        return ModelPatcher(made, device, REST)

    def load(self, name: str, keep: bool, mib: int = 1, device: torch.device = FIRST, module: Any = torch.nn.Module):
        """A loader node: the registry's if it owns the file, else from disk."""
        if self.column == STOCK:
            return self.read(name, mib, device, module)
        policy = self.column if keep else kept.EJECTABLE
        key = kept.Key.of("model", [self.path(name)])
        return (
            kept.registry()
            .obtain(key, policy, lambda: self.read(name, mib, device, module), lambda patcher: [patcher], name)
            .clone()
        )

    def node(self, name: str, keep: bool, how: str = "plain", **options: Any) -> Any:
        """The output of a loader, or of a LoRA node behind it; from the node cache if it is there."""
        outputs = self.cache.outputs
        if (name, keep) not in outputs:
            with CurrentNodeContext(f"p{self.prompts}", name):
                outputs[name, keep] = self.load(name, keep, **options)
        if how == "plain":
            return outputs[name, keep]
        if (name, keep, how) not in outputs:
            clone = outputs[name, keep].clone()
            clone.add_patches({"linear.weight": (torch.ones(1024, clone.model.linear.in_features),)}, 1.0)
            if how == "cycle":
                clone.model_options["wrapper"] = lambda: clone
            outputs[name, keep, how] = clone
        return outputs[name, keep, how]

    def prompt(self, *steps: tuple, fails: BaseException | None = None, together: bool = False, **options: Any) -> None:
        """A workflow: every step's loader, LoRA and use. With `fails` its last use raises."""
        self.prompts += 1
        # Of two steps with one model, the loader that asks for something is the node that the definition shows.
        asking = sorted(steps, key=lambda step: step[1] != "unmanaged")
        inputs = {name: {"name": name, "keep": keep, **options} for name, keep, *_ in asking}
        nodes = {name: {"class_type": "Load", "inputs": given} for name, given in inputs.items()}
        self.queue.currently_running[0] = (0, f"p{self.prompts}", nodes)

        def used(step: tuple) -> None:
            patcher = self.node(*step, **options)
            with CurrentNodeContext(f"p{self.prompts}", "use"):
                mm.load_models_gpu([patcher])

        def work() -> None:
            try:
                if together:
                    mm.load_models_gpu([self.node(*step, **options) for step in steps])
                for step in () if together else steps:
                    self.executed(lambda step=step: used(step))
                if fails is not None:
                    raise fails
            except mm.OOM_EXCEPTION:
                mm.unload_all_models()  # as the executor's handler does
            except mm.InterruptProcessingException:
                pass

        self.executor.work = work
        try:
            self.executor.execute(nodes, f"p{self.prompts}")
        finally:
            self.queue.currently_running.clear()
            del self.executor.work
        if mm.DISABLE_SMART_MEMORY:
            mm.unload_all_models()

    @staticmethod
    def executed(node: Callable[[], None]) -> None:
        """Has the executor's module execute a node, which waits for nothing."""
        with suppress(StopIteration):
            sys.modules["execution"].execute(node).send(None)

    def tail(self, unload_models: bool = False, free_memory: bool = False) -> dict[str, str]:
        """The end of a turn of ComfyUI's worker, with these flags; what was there after each of its steps."""
        self.queue.get_flags()
        seen = {"pre": self.state()}
        if unload_models or free_memory:
            mm.unload_all_models()
        seen["unloaded"] = self.state()
        if free_memory:
            self.executor.reset()
        seen["reset"] = self.state()
        gc.collect()
        seen["collected"] = self.state()
        mm.soft_empty_cache()
        seen["end"] = self.state()
        return seen


# Scenarios. A is not kept, B to E are; X, Y, Z are others.

A, B, C, D, E = ("A", False), ("B", True), ("C", True), ("D", True), ("E", True)


def s1(world: World, how: str = "plain") -> dict:
    """Both buttons, the same prompt, and two more presses."""
    steps = (A, (*B, how), C)
    world.prompt(*steps)
    first = world.tail(**EVERYTHING)
    stages = [snapshot.stage for snapshot in presses.latest()]
    callers = sorted({snapshot.caller for snapshot in presses.latest()})
    world.prompt(*steps)
    again = world.state()
    return {
        "first": first, "again": again, "second": world.tail(**EVERYTHING), "third": world.tail(**EVERYTHING),
        "stages": stages, "callers": callers,
    }  # fmt: skip


def s2(world: World) -> dict:
    """All are kept."""
    world.prompt(D, E)
    first = world.tail(**EVERYTHING)
    world.prompt(D, E)
    return {"first": first, "again": world.state()}


def s3(world: World) -> dict:
    """The button "Unload Models", which leaves the node cache."""
    world.prompt(A, B, C)
    first = world.tail(unload_models=True)
    world.prompt(A, B, C)
    return {"first": first, "again": world.state()}


def s4a(world: World) -> dict:
    """B through a LoRA clone, then plain: nothing of the LoRA is left in its weights."""
    before = world.node(*B).model.linear.weight.clone()
    seen = s1(world, "lora")
    if world.column != STOCK:  # there, this B is another one
        world.prompt((*B, "lora"))
        weight = world.node(*B).model.linear.weight
        seen["patched"] = not torch.equal(weight, before)
        world.prompt(B)
        seen["residue"] = not torch.equal(world.node(*B).model.linear.weight, before)
    return seen


def s4b(world: World) -> dict:
    """B through a LoRA clone that its own options hold."""
    return s1(world, "cycle")


def s5(world: World) -> dict:
    """100 MiB: B takes 40, Y fits beside it, X does not."""
    seen = {}
    for name, mib in (("Y", 30), ("X", 80)):
        world.__init__(world.column, 100)
        world.prompt(B, mib=40)
        world.prompt(B)
        world.prompt((name, False), mib=mib)
        seen[name] = {"resident": world.resident(), "over": world.used(FIRST) > world.capacity}
        world.cache = NodeCache()
        gc.collect()
        mm.soft_empty_cache()
        world.prompt(B, mib=40)
        seen[name] |= {"again": world.resident(), "reads": world.reads["B"]}
        if world.column != STOCK:
            (entry,) = kept.registry().owned()
            seen[name]["yields"] = entry.yields
    return seen


def s6(world: World) -> dict:
    """A node runs out of memory."""
    world.prompt(B, C)
    world.prompt(B, C, ("X", False), fails=mm.OOM_EXCEPTION("planted"))
    after = world.state()
    gc.collect()
    world.prompt(B, C)
    return {"after": after, "again": world.state()}


def s7(world: World) -> dict:
    """--disable-smart-memory."""
    mm.DISABLE_SMART_MEMORY = True
    world.prompt(A, B, C)
    first = world.state()
    world.prompt(A, B, C)
    return {"first": first, "again": world.state()}


class Broken(torch.nn.Module):
    """A network that cannot be moved to the accelerator."""

    def to(self, device: Any = None, *arguments: Any, **keywords: Any) -> Any:
        if device == FIRST:
            raise RuntimeError("planted: cannot be moved")
        return super().to(device, *arguments, **keywords)


def s8(world: World) -> dict:
    """Another model fails to load in the same call, twelve times: ComfyUI 0.3.64 takes a call's models in any order."""
    untracked, kept_whole = 0, True
    for round in range(12):
        world.__init__(world.column)
        world.prompt(B)
        broken = world.load(f"X{round}", False, module=Broken)
        # Both orders: ComfyUI takes what was popped in the order of the call.
        pair = [world.node(*B), broken] if round % 2 else [broken, world.node(*B)]
        try:
            mm.load_models_gpu(pair)
        except RuntimeError as error:
            kept_whole &= "planted" in str(error)
        else:
            raise AssertionError("the planted error did not come")
        own = world.node(*B).model
        listed = [loaded for loaded in mm.current_loaded_models if loaded.model and loaded.model.model is own]
        untracked += bool(own.model_loaded_weight_memory) and not listed
        kept_whole &= len(listed) <= 1
    world.tail()
    return {"untracked": untracked, "error_as_it_was": kept_whole, "end": world.state()}


def s9(world: World) -> dict:
    """An interrupt."""
    world.prompt(B)
    world.prompt(B, ("X", False), fails=mm.InterruptProcessingException())
    return {"after": world.state(), "resident": world.resident()}


def s10(world: World) -> dict:
    """A network whose patcher died while somebody holds it is in the list."""
    world.prompt(B, A)
    zombie = world.read("Z")
    mm.load_models_gpu([zombie])
    held = zombie.model
    del zombie
    seen = {"first": world.tail(**EVERYTHING), "held": type(held).__name__}
    world.prompt(B)
    return seen | {"again": world.state()}


def s11(world: World) -> dict:
    """Other workflows in between, with every kind of node cache."""
    reads = {}
    for kind, size in (("classic", 1), ("lru", 2), ("none", 0)):
        world.__init__(world.column)
        recent: list[tuple] = []
        for step in (B, *((name, False) for name in "PQRS"), B):
            world.prompt(step)
            recent = [*(item for item in recent if item != step), step][-size:] if size else []
            world.cache.outputs = {key: value for key, value in world.cache.outputs.items() if key in recent}
            world.tail()
        reads[kind] = world.reads["B"]
    return reads


@contextmanager
def ram(available: float) -> Iterator[None]:
    """The machine's RAM with that share free."""
    real = psutil.virtual_memory
    total = 100 << 30
    free = int(available * total)
    seen = types.SimpleNamespace(total=total, available=free, used=total - free, percent=100 * (1 - available))
    psutil.virtual_memory = lambda: seen
    try:
        yield
    finally:
        psutil.virtual_memory = real


def s12(world: World) -> dict:
    """Caches are emptied in the middle of a prompt, and idle, while RAM is short."""
    world.prompt(B, C)
    seen = {}
    with ram(0.09):
        world.queue.currently_running[0] = (0, "p1", {})
        mm.soft_empty_cache(True)
        seen["in_prompt"] = owned()
        world.queue.currently_running.clear()
        mm.soft_empty_cache(True)
        seen["idle"] = owned()
        world.cache = NodeCache()
        world.prompt(B, C)
        mm.soft_empty_cache()
        seen["once"] = owned()
    with ram(0.2):
        mm.soft_empty_cache()
    with ram(0.09):
        mm.soft_empty_cache()
        seen["armed_again"] = owned()
    return seen | {"flags": sorted(world.queue.flags)}


def owned() -> str:
    return "".join(sorted(entry.name for entry in kept.registry().owned()))


def s13(world: World) -> dict:
    """An entry that was unloaded and stays listed breaks ComfyUI: it never comes from us."""
    patcher = world.read("Z")
    mm.load_models_gpu([patcher])
    mm.current_loaded_models[0].model_unload()
    try:
        mm.cleanup_models_gc()
        contract = "no error"
    except TypeError:
        contract = "TypeError"
    mm.current_loaded_models.clear()
    world.prompt(A, B, C)
    for fails in (mm.OOM_EXCEPTION("planted"), mm.InterruptProcessingException(), None):
        world.prompt(A, B, C, ("X", False), fails=fails)
        world.tail(**EVERYTHING)
        mm.cleanup_models_gc()
    half = [loaded for loaded in mm.current_loaded_models if loaded.real_model is None]
    return {"contract": contract, "half_unloaded": len(half), "end": world.state()}


def two_devices(world: World) -> dict:
    """A kept and another model on each of two accelerators, and a press when only kept ones are left."""
    world.__init__(world.column, devices=(FIRST, SECOND))
    for name, keep, device in (("A", False, FIRST), ("B", True, FIRST), ("C", True, SECOND), ("F", False, SECOND)):
        mm.load_models_gpu([world.node(name, keep, device=device)])
    return {"mixed": world.tail(**EVERYTHING), "all_kept": world.tail(**EVERYTHING)}


SCENARIOS: dict[str, Callable[[World], dict]] = {
    "S1": s1, "S2": s2, "S3": s3, "S4a": s4a, "S4b": s4b, "S5": s5, "S6": s6, "S7": s7, "S8": s8, "S9": s9, "S10": s10,
    "S11": s11, "S12": s12, "S13": s13, "two devices": two_devices,
}  # fmt: skip


def run(column: str) -> dict[str, dict]:
    seen = {}
    for name, scenario in SCENARIOS.items():
        world = World(column)
        result = scenario(world)
        seen[name] = {"seen": result, "reads": world.reads, "errors": list(ERRORS.lines)}
    return seen


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    gc.disable()  # collections happen where the worker makes them, and nowhere else
    sys.stdout.write(json.dumps({column: run(column) for column in ("keep", "pin", STOCK)}))
