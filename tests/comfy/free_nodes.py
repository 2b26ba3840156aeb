"""A custom node for a real ComfyUI: tiny networks that are kept or not, a LoRA in a reference cycle, a dead entry.

Test_Load asks the pack's registry, as its loaders do; with keep "stock" it reads like any other pack's. The route
/test/state tells what ComfyUI lists, what is alive, how often a file was read, whether the worker lives, and with
?uss the bytes of this process.
"""

import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import comfy.model_management as mm
import psutil
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from server import PromptServer

FILES = Path(tempfile.mkdtemp())
READS, MODULES, HELD = {}, [], []
ANY_NAME = ("STRING", {"default": "A"})


def of_the_pack(name):
    return next(module for found, module in list(sys.modules.items()) if found.endswith(f"steadyvsr.{name}"))


def read(name, mib):
    READS[name] = READS.get(name, 0) + 1
    module = type(name, (torch.nn.Module,), {})()
    module.linear = torch.nn.Linear(256 * mib, 1024, bias=False)
    MODULES.append(weakref.ref(module))
    return ModelPatcher(module, mm.get_torch_device(), torch.device("cpu"))


class Load:
    @classmethod
    def INPUT_TYPES(cls):
        keep = ("STRING", {"default": "no"})
        return {"required": {"name": ANY_NAME, "keep": keep, "mib": ("INT", {"default": 1})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"

    def load(self, name, keep, mib):
        if keep == "stock":
            return (read(name, mib),)
        path = FILES / name
        if not path.exists():
            path.touch()
        kept, hooks = of_the_pack("patches.kept"), of_the_pack("patches.hooks")
        hooks.install()
        key = kept.Key.of("test", [path])
        found = kept.registry().obtain(key, keep, lambda: read(name, mib), lambda patcher: [patcher], name)
        return (found.clone(),)


class LoRA:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "apply", "test"

    def apply(self, model):
        clone = model.clone()
        clone.add_patches({"linear.weight": (torch.ones(1024, clone.model.linear.in_features),)}, 1.0)
        clone.model_options["wrapper"] = lambda: clone
        return (clone,)


class Use:
    @classmethod
    def INPUT_TYPES(cls):
        required = {"turn": ("INT", {"default": 0}), "seconds": ("FLOAT", {"default": 0.0})}
        models = {f"model_{number}": ("MODEL",) for number in range(4)}
        return {"required": {**required, "error": ("STRING", {"default": ""})}, "optional": models}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "use", "test", True

    def use(self, turn, seconds, error, **models):
        for model in models.values():
            mm.load_models_gpu([model])
        time.sleep(seconds)
        if error:
            raise mm.OOM_EXCEPTION(error)
        return {}


class Zombie:
    """A network that somebody holds while its patcher dies: its entry in ComfyUI's list is dead."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"turn": ("INT", {"default": 0})}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "make", "test", True

    def make(self, turn):
        patcher = read("Z", 1)
        mm.load_models_gpu([patcher])
        HELD.append(patcher.model)
        return {}


def names(modules):
    return "".join(sorted(type(module).__name__ for module in modules))


@PromptServer.instance.routes.get("/test/state")
async def state(request):
    listed = [loaded.model for loaded in list(mm.current_loaded_models)]
    queue = PromptServer.instance.prompt_queue
    bytes_too = "uss" in request.query and of_the_pack("memory.host").trim()
    return web.json_response(
        {
            "listed": names(patcher.model for patcher in listed if patcher is not None),
            "dead": listed.count(None),
            "alive": names(module for module in (ref() for ref in MODULES) if module is not None),
            "reads": READS,
            "worker": any("prompt_worker" in thread.name for thread in threading.enumerate()),
            "busy": bool(queue.flags or queue.currently_running or queue.queue),
            "uss": psutil.Process().memory_full_info().uss if bytes_too else None,
        }
    )


NODE_CLASS_MAPPINGS = {"Test_Load": Load, "Test_LoRA": LoRA, "Test_Use": Use, "Test_Zombie": Zombie}
