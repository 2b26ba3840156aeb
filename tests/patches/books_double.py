"""A small double of ComfyUI's model management, for the free-memory scenarios where there is no checkout.

`install()` registers this one module as `comfy.model_management`, `comfy.model_patcher` and `comfy_execution.utils`.
test_free_worlds.py runs the same scenarios on it and on real checkouts, which is how it is known to be faithful. What
it reproduces: ComfyUI's list owns nothing; a load takes clones out of the list and puts itself in; a dead clone's place
goes to its parent if that lives; entries go with their networks; `is_dead` fails on an entry without a network.
"""

from __future__ import annotations

import contextvars
import copy
import gc
import importlib
import os
import sys
import types
import uuid
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch

CPU = torch.device("cpu")
OOM_EXCEPTION = torch.OutOfMemoryError
DISABLE_SMART_MEMORY = False
current_loaded_models: list[LoadedModel] = []


class InterruptProcessingException(BaseException):
    pass


class Context(NamedTuple):
    prompt_id: str
    node_id: str


_executing: contextvars.ContextVar[Context | None] = contextvars.ContextVar("executing", default=None)


def get_executing_context() -> Context | None:
    return _executing.get()


class CurrentNodeContext:
    def __init__(self, prompt_id: str, node_id: str) -> None:
        self.context = Context(prompt_id, node_id)

    def __enter__(self) -> None:
        self.token = _executing.set(self.context)

    def __exit__(self, *_: object) -> None:
        _executing.reset(self.token)


class ModelPatcher:
    """Weights of one network, patches for them, and on which device they are; clones share all but the patches."""

    def __init__(self, model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.parent: ModelPatcher | None = None
        self.patches: dict[str, list[tuple[float, torch.Tensor]]] = {}
        self.patches_uuid = self.clone_base_uuid = uuid.uuid4()
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.backup: dict[str, torch.Tensor] = {}
        defaults = {"device": offload_device, "model_loaded_weight_memory": 0, "current_weight_patches_uuid": None}
        for name, value in defaults.items():
            if getattr(model, name, None) is None:
                setattr(model, name, value)

    def clone(self) -> ModelPatcher:
        made = type(self)(self.model, self.load_device, self.offload_device)
        made.parent, made.backup, made.clone_base_uuid = self, self.backup, self.clone_base_uuid
        made.patches = {name: list(patches) for name, patches in self.patches.items()}
        made.patches_uuid, made.model_options = self.patches_uuid, copy.copy(self.model_options)
        return made

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    def is_dynamic(self) -> bool:
        return False

    def add_patches(self, patches: dict[str, tuple[torch.Tensor]], strength: float = 1.0) -> None:
        for name, (difference,) in patches.items():
            self.patches.setdefault(name, []).append((strength, difference))
        self.patches_uuid = uuid.uuid4()

    def model_size(self) -> int:
        return sum(weight.nbytes for weight in self.model.state_dict().values())

    def loaded_size(self) -> int:
        return self.model.model_loaded_weight_memory

    def current_loaded_device(self) -> torch.device:
        return self.model.device

    def model_patches_to(self, device: Any) -> None:
        pass

    def model_patches_models(self) -> list[ModelPatcher]:
        return []

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _unpatch(self) -> None:
        for name, weight in self.backup.items():
            self.model.get_parameter(name).data = weight
        self.backup.clear()
        self.model.to(self.offload_device)
        self.model.device, self.model.model_loaded_weight_memory = self.offload_device, 0
        self.model.current_weight_patches_uuid = None

    def partially_load(self, device: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        applied = self.model.current_weight_patches_uuid
        if applied is not None and (applied != self.patches_uuid or force_patch_weights):
            self._unpatch()
        if self.loaded_size():
            return 0
        try:
            for name, patches in self.patches.items():
                weight = self.model.get_parameter(name)
                self.backup[name] = weight.data
                weight.data = weight.data + sum(strength * difference for strength, difference in patches)
            self.model.to(device)
        except Exception:
            self.detach()
            raise
        self.model.device, self.model.model_loaded_weight_memory = device, self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid
        return self.loaded_size()

    def partially_unload(self, device: torch.device, memory_to_free: float = 0) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:
            self._unpatch()
        return self.model

    def __del__(self) -> None:
        self.detach(unpatch_all=False)


class LoadedModel:
    """One line of ComfyUI's list: three weak references."""

    def __init__(self, model: ModelPatcher) -> None:
        self._patcher_finalizer: Any = None
        self._set_model(model)
        self.device = model.load_device
        self.real_model: Any = None
        self.model_finalizer: Any = None
        self.currently_used = True

    def _set_model(self, model: ModelPatcher) -> None:
        self._model = weakref.ref(model)
        if model.parent is not None:
            self._parent_model = weakref.ref(model.parent)
            self._patcher_finalizer = weakref.finalize(model, self._switch_parent)

    def _switch_parent(self) -> None:
        parent = self._parent_model()
        if parent is not None:
            self._set_model(parent)

    @property
    def model(self) -> Any:
        return self._model()

    def model_memory(self) -> int:
        return self.model.model_size()

    def model_loaded_memory(self) -> int:
        return self.model.loaded_size()

    def model_offloaded_memory(self) -> int:
        return self.model_memory() - self.model_loaded_memory()

    def model_memory_required(self, device: torch.device) -> int:
        here = self.model.current_loaded_device() == device
        return self.model_offloaded_memory() if here else self.model_memory()

    def model_load(self, memory: float = 1e32, force_patch_weights: bool = False) -> None:
        self.model.partially_load(self.device, memory, force_patch_weights)
        self.real_model = weakref.ref(self.model.model)
        self.model_finalizer = weakref.finalize(self.model.model, cleanup_models)

    def model_unload(self, memory_to_free: float | None = None, unpatch_weights: bool = True) -> bool:
        partly = memory_to_free is not None and memory_to_free < self.model.loaded_size()
        if partly and self.model.partially_unload(self.model.offload_device, memory_to_free) >= memory_to_free:
            return False
        self.model.detach(unpatch_weights)
        self.model_finalizer.detach()
        self.model_finalizer = self.real_model = None
        return True

    def is_dead(self) -> bool:
        return self.real_model() is not None and self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is other.model

    def __del__(self) -> None:
        if self._patcher_finalizer is not None:
            self._patcher_finalizer.detach()


def cleanup_models() -> None:
    for index in reversed(range(len(current_loaded_models))):
        if current_loaded_models[index].real_model() is None:
            del current_loaded_models[index]


def cleanup_models_gc() -> None:
    if any(loaded.is_dead() for loaded in current_loaded_models):
        gc.collect()
        soft_empty_cache()


def eviction_order(device: Any, keep_loaded: Any) -> list[LoadedModel]:
    """Candidates of `free_memory`, the first to go first."""
    found = []
    for index in reversed(range(len(current_loaded_models))):
        loaded = current_loaded_models[index]
        if loaded.device == device and loaded not in keep_loaded and not loaded.is_dead():
            rank = (-loaded.model_offloaded_memory(), sys.getrefcount(loaded.model), loaded.model_memory(), index)
            found.append((rank, loaded))
    return [loaded for _, loaded in sorted(found, key=lambda item: item[0])]


def free_memory(memory_required: float, device: Any, keep_loaded: Any = ()) -> list[LoadedModel]:
    cleanup_models_gc()
    freed: list[LoadedModel] = []
    for loaded in eviction_order(device, keep_loaded):
        missing = None
        if not DISABLE_SMART_MEMORY:
            free = get_free_memory(device)
            if free > memory_required:
                break
            missing = memory_required - free
        if loaded.model_unload(missing):
            freed.append(loaded)
    gone = {id(loaded) for loaded in freed}
    current_loaded_models[:] = [loaded for loaded in current_loaded_models if id(loaded) not in gone]
    if freed:
        soft_empty_cache()
    return freed


def load_models_gpu(models: list[ModelPatcher], memory_required: float = 0) -> None:
    cleanup_models_gc()
    loads = []
    for patcher in reversed(list(dict.fromkeys(models))):
        new = LoadedModel(patcher)
        loads.append(next((loaded for loaded in current_loaded_models if loaded == new), new))
    for new in loads:
        for index in reversed(range(len(current_loaded_models))):
            if new.model.is_clone(current_loaded_models[index].model):
                old = current_loaded_models.pop(index)
                old.model.detach(unpatch_all=False)
                old.model_finalizer.detach()
    needed: dict[Any, float] = {}
    for new in loads:
        needed[new.device] = needed.get(new.device, 0) + new.model_memory_required(new.device)
    for device, size in needed.items():
        if device != CPU:
            free_memory(size * 1.1 + memory_required, device)
    for new in loads:
        new.model_load()
        current_loaded_models.insert(0, new)


def unload_all_models() -> None:
    for device in get_all_torch_devices():
        free_memory(1e30, device)


def soft_empty_cache(force: bool = False) -> None:
    torch.cuda.empty_cache()


def get_torch_device() -> torch.device:
    return CPU


def get_all_torch_devices() -> list[torch.device]:
    return [get_torch_device()]


def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
    return (1 << 40, 1 << 40) if torch_free_too else 1 << 40


def get_total_memory(device: Any = None, torch_total_too: bool = False) -> Any:
    return (1 << 40, 1 << 40) if torch_total_too else 1 << 40


def install() -> None:
    """Makes `import comfy.model_management` and its neighbours find this module."""
    me = sys.modules[__name__]
    for package, names in (("comfy", ("model_management", "model_patcher")), ("comfy_execution", ("utils",))):
        parent = types.ModuleType(package)
        parent.__path__ = []
        sys.modules[package] = parent
        for name in names:
            setattr(parent, name, me)
            sys.modules[f"{package}.{name}"] = me


def prepare(kind: str, pack: Path) -> None:
    """Lets `comfy` be the double or the ComfyUI ("comfyui") in the current folder, and `steadyvsr` the pack."""
    if kind == "double":
        install()
    else:
        sys.path.insert(0, os.getcwd())
        sys.argv = ["main.py", "--cpu"]
        importlib.import_module("comfy.options").enable_args_parsing()
    package = types.ModuleType("steadyvsr")
    package.__path__ = [str(pack)]
    sys.modules["steadyvsr"] = package
