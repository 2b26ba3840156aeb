"""Weights of a network, patches for them, and where they are."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import torch


class ModelPatcher:
    """Weights of one network, patches for them, and on which device they are; clones share all but the patches."""

    def __init__(self, model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.parent: ModelPatcher | None = None
        self.patches: dict[str, list[tuple[float, torch.Tensor]]] = {}
        self.patches_uuid = self.clone_base_uuid = uuid.uuid4()
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.backup: dict[str, torch.Tensor] = {}
        self.hook_backup: dict[str, torch.Tensor] = {}
        self.cached_hook_patches: dict[Any, Any] = {}
        self.is_clip = False
        defaults = {"device": offload_device, "model_loaded_weight_memory": 0, "current_weight_patches_uuid": None}
        for name, value in defaults.items():
            if getattr(model, name, None) is None:
                setattr(model, name, value)

    def clone(self) -> ModelPatcher:
        made = type(self)(self.model, self.load_device, self.offload_device)
        made.parent, made.backup, made.clone_base_uuid = self, self.backup, self.clone_base_uuid
        made.patches = {name: list(patches) for name, patches in self.patches.items()}
        made.patches_uuid, made.model_options = self.patches_uuid, copy.copy(self.model_options)
        made.is_clip = self.is_clip
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
