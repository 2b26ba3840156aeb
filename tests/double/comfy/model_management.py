"""ComfyUI's books of loaded models, and the questions that the pack asks of its devices.

What the books reproduce: ComfyUI's list owns nothing; a load takes clones out of the list and puts itself in; a dead
clone's place goes to its parent if that lives; entries go with their networks; `is_dead` fails on an entry without a
network. test_free_worlds.py runs the same scenarios on them and on real checkouts, which is how they are known to be
faithful.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from .model_patcher import ModelPatcher

CPU = torch.device("cpu")
OOM_EXCEPTION = torch.OutOfMemoryError
DISABLE_SMART_MEMORY = False
current_loaded_models: list[LoadedModel] = []
_interrupted = False


class InterruptProcessingException(BaseException):
    pass


def interrupt_current_processing(value: bool = True) -> None:
    global _interrupted
    _interrupted = value


def throw_exception_if_processing_interrupted() -> None:
    if _interrupted:
        interrupt_current_processing(False)
        raise InterruptProcessingException


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


def load_models_gpu(models: list[ModelPatcher], memory_required: float = 0, force_full_load: bool = False) -> None:
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


def unet_offload_device() -> torch.device:
    return CPU


def intermediate_device() -> torch.device:
    return CPU


def vae_device() -> torch.device:
    return get_torch_device()


def should_use_bf16(device: torch.device | None = None) -> bool:
    return False


def should_use_fp16(device: torch.device | None = None) -> bool:
    return False


def unet_dtype(model_params: int = 0, weight_dtype: torch.dtype | None = None) -> torch.dtype:
    return torch.float32


def vae_dtype(device: torch.device | None = None, allowed_dtypes: Iterable[torch.dtype] = ()) -> torch.dtype:
    return torch.float32
