"""A ComfyUI in which something has another name or other arguments, as a later version might have."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

WARNINGS: list[str] = []


class Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        WARNINGS.append(record.getMessage())


class Renamed(types.ModuleType):
    """A module without some of its names, which it goes on using itself."""

    def __init__(self, module: types.ModuleType, *hidden: str) -> None:
        super().__init__(module.__name__)
        vars(self).update(__file__=module.__file__, _module=module, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self)["_hidden"]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(vars(self)["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_module"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_module"], name)


def hide(module: str, *names: str) -> None:
    package, _, last = module.rpartition(".")
    replaced = Renamed(importlib.import_module(module), *names)
    sys.modules[module] = replaced
    setattr(importlib.import_module(package), last, replaced)


def free_memory(variant: Callable[[Any], Callable[..., Any]]) -> None:
    mm: Any = importlib.import_module("comfy.model_management")
    mm.free_memory = variant(mm.free_memory)


def keep_renamed(original: Any) -> Any:
    def free_memory(memory_required: Any, device: Any, spare: Any = ()) -> Any:
        return original(memory_required, device, list(spare))

    return free_memory


def swapped(original: Any) -> Any:
    def free_memory(device: Any, memory_required: Any, keep_loaded: Any = ()) -> Any:
        if isinstance(device, int | float):  # ComfyUI's own calls, which this does not change
            device, memory_required = memory_required, device
        return original(memory_required, device, list(keep_loaded))

    return free_memory


def off() -> None:
    os.environ["STEADYVSR_PATCHES"] = "off"


def names_renamed() -> None:
    hide("comfy.model_management", "unload_all_models", "soft_empty_cache")
    hide("comfy_execution.utils", "get_executing_context")


CASES: dict[str, Callable[[], None]] = {
    "names renamed": names_renamed,
    "keep_loaded renamed": lambda: free_memory(keep_renamed),
    "arguments swapped": lambda: free_memory(swapped),
    "setting off": off,
}


def change(case: str) -> None:
    """Changes ComfyUI before the pack is imported."""
    logging.getLogger("steadyvsr").addHandler(Warnings(logging.WARNING))
    if "comfy_api.v0_0_2" not in sys.modules:
        importlib.import_module("comfy_api.v0_0_2")  # takes names of ComfyUI's as they are
    CASES[case]()
