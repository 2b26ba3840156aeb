"""Every difference between the versions of ComfyUI that this pack runs in, one function each.

Callers read as if there were one ComfyUI; a new version that differs again is met here and nowhere else. "Since 0.33"
means that 0.3.64 does not have it. Everything is looked up at the call: ComfyUI replaces some of it after start-up, and
tests stand in for some of it. Objects of other packs, such as a VAE that is not ComfyUI's, may lack any of it too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy_execution.utils
import torch

# How nodes are described.


def supported(target: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Those of `keywords` that `target` accepts.

    Keywords such as `search_aliases` of a schema or `advanced` of an input only change how a node is shown. They came
    after 0.3.64, which raises TypeError for them.
    """
    accepted = inspect.signature(target).parameters
    return {name: value for name, value in keywords.items() if name in accepted}


def unique_id(node: Any) -> str | None:
    """The id of a running node in its graph; None where it is called outside ComfyUI's executor."""
    return node.hidden.unique_id if node.hidden is not None else None


def trim_window(video: Any) -> tuple[float, float]:
    """(start, duration) in seconds of a trimmed VIDEO; a duration of 0 means until the end. Trimming is since 0.33.

    A file read by its stream source is read whole: the reader has to apply the trim.
    """
    return video.get_active_trim_window() if hasattr(video, "get_active_trim_window") else (0.0, 0.0)


def executing_context() -> Any | None:
    """What node of what prompt executes in this thread (`node_id`, `prompt_id`); None where nothing tells that."""
    ask = getattr(comfy_execution.utils, "get_executing_context", None)
    return None if ask is None else ask()


# Devices, and running out of memory.


def torch_devices() -> list[torch.device]:
    """Every accelerator that ComfyUI manages, as 0.33 lists them; 0.3.64 knows its current one, and CUDA the others."""
    if hasattr(mm, "get_all_torch_devices"):
        return list(mm.get_all_torch_devices())
    current = mm.get_torch_device()
    if current.type == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [current]


def device_context(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a card the current one for a while, as 0.33 does around a VAE; 0.3.64 computes on its current card only."""
    make = getattr(mm, "cuda_device_context", None)
    return nullcontext() if make is None else make(device)


def memory_errors() -> tuple[type[Exception], ...]:
    """The exceptions that may mean that a device is out of memory; ask `is_out_of_memory` whether one does.

    Since 0.33 ComfyUI counts torch's AcceleratorError among them; older torch versions do not have that class.
    """
    accelerator = getattr(mm, "ACCELERATOR_ERROR", getattr(torch, "AcceleratorError", None))
    return (mm.OOM_EXCEPTION,) if accelerator is None else (mm.OOM_EXCEPTION, accelerator)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether one of `memory_errors` means just that: an accelerator that is out of memory raises other errors as well.

    ComfyUI's own function, since 0.33, also clears an asynchronous CUDA error, so that the next call does not fail too.
    """
    if hasattr(mm, "is_oom"):
        return bool(mm.is_oom(error))
    if isinstance(error, mm.OOM_EXCEPTION):
        return True
    return isinstance(error, memory_errors()) and "out of memory" in str(error).lower()


# ComfyUI's books.


def patcher_class() -> type:
    """The patcher class that ComfyUI gives to its own models; since 0.33 that may be one with dynamic VRAM."""
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def base_uuid(patcher: Any) -> Any | None:
    """What the copies of one model on several devices have in common (since 0.33), or None."""
    return getattr(patcher, "clone_base_uuid", None)


def dynamic_vram(patcher: Any) -> Any | None:
    """Where a patcher with dynamic VRAM (since 0.33) keeps weights outside torch's allocator, or None."""
    return patcher._vbar_get() if hasattr(patcher, "_vbar_get") else None


def is_dynamic(patcher: Any) -> bool:
    """Whether a patcher's weights come and go page by page, as the driver sees fit (dynamic VRAM, since 0.33)."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def dynamic_vram_is_on() -> bool:
    """Whether ComfyUI was started with dynamic VRAM (since 0.33)."""
    return bool(getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False))


def directed(patcher: Any, device: torch.device) -> Any:
    """A patcher that was just made, directed to a device: itself, or a plain clone.

    Since 0.33 a patcher with dynamic VRAM has books for each device, and cannot work on the CPU.
    """
    cpu = torch.device("cpu")
    if device == cpu:
        if is_dynamic(patcher):
            patcher = patcher.clone(disable_dynamic=True)
        patcher.offload_device = cpu
    patcher.load_device = device
    if hasattr(patcher, "register_load_device"):
        patcher.register_load_device(device)
    return patcher


def free_memory(required: float, device: torch.device, spared: Sequence[Any]) -> None:
    """ComfyUI's function of that name, with arguments by name where it has these names, else in the order of today.

    Nothing is freed where nothing can be spared.
    """
    free = getattr(mm, "free_memory", None)
    named = {"memory_required": required, "device": device, "keep_loaded": list(spared)}
    parameters = {} if free is None else inspect.signature(free).parameters
    # Another pack's wrapper of (*arguments, **keywords) passes on whatever it is given.
    places = len(named) if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) else len(parameters)
    if free is not None and named.keys() <= parameters.keys():
        free(**named)
    elif free is not None and (places >= len(named) or not spared):
        free(*list(named.values())[:places])


def empty_caches() -> None:
    """Gives memory of the allocators' pools back to the devices: ComfyUI's `soft_empty_cache`, where it has that."""
    getattr(mm, "soft_empty_cache", lambda: None)()


def stream_buffers() -> Mapping[Any, Any]:
    """Copies of weights that are on their way to the device, by stream (since 0.33)."""
    return getattr(mm, "STREAM_CAST_BUFFERS", {})


def list_lock() -> AbstractContextManager[Any]:
    """What guards the list of loaded models: a lock in some forks, nothing in ComfyUI itself."""
    return getattr(mm, "model_management_lock", None) or nullcontext()


def cached_outputs(executor: Any) -> Iterator[Any]:
    """Values that an executor's caches keep of finished nodes.

    0.3.64 caches a list of slots for each node; 0.33 an entry that has them as `outputs`.
    """
    waiting = list(getattr(getattr(executor, "caches", None), "all", ()))
    while waiting:
        cache = waiting.pop()
        waiting += getattr(cache, "subcaches", {}).values()
        for entry in getattr(cache, "cache", {}).values():
            outputs = getattr(entry, "outputs", entry)
            slots = isinstance(outputs, list | tuple) and all(isinstance(slot, list | tuple) for slot in outputs)
            yield from [value for slot in outputs for value in slot] if slots else [outputs]


# VAEs.


def tiles_itself(vae: Any) -> bool:
    """Whether a VAE's own network computes in tiles; there are such networks since 0.33."""
    return getattr(vae, "handles_tiling", False)


def vae_output_dtype(vae: Any) -> torch.dtype:
    """In which dtype a VAE's results go on: fp32, unless 0.33 was started with another one."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32


def formatted_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Encoded latents as a LATENT carries them: since 0.33 some networks have a format of their own."""
    formatted = getattr(vae, "format_encoded", None)
    return latents if formatted is None else formatted(latents)


def channel_padding(vae: Any) -> str | float | None:
    """What fills channels that an image lacks, a value or a mode of `F.pad` (since 0.33); None refuses such images."""
    return getattr(vae, "pad_channel_value", None)


def several_latents(latents: Any) -> list[torch.Tensor] | None:
    """The tensors of a LATENT that holds several in one (since 0.33), or None for a plain tensor."""
    return latents.unbind() if getattr(latents, "is_nested", False) else None


def frame_padding(layer: Any) -> tuple[int, int]:
    """Rows and columns of zeros that a causal convolution of Wan's VAE puts around a frame.

    0.3.64 keeps them, for `F.pad`, in an attribute of its own: (columns, columns, rows, rows, frames, 0).
    """
    own = getattr(layer, "_padding", None)
    return (own[2], own[0]) if isinstance(own, tuple) else tuple(layer.padding[-2:])
