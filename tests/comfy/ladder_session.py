"""Run by a real ComfyUI's Python, in its folder: the upscale node under a card that runs out of memory.

    python ladder_session.py PACK_FOLDER BASE_FOLDER

The card is scripted, be it ComfyUI's CPU or one with memory of its own (STEADYVSR_CARD=simcard): an operator that makes
a new storage fails while a unit of work runs with a plan that is too large for it. Prints one JSON object on the last
line; the assertions are in test_ladder.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import importlib
import json
import logging
import os
import sys
import traceback
from pathlib import Path

PACK, BASE = Path(sys.argv[1]), Path(sys.argv[2])
CARD_BYTES = 8 << 30
"""Ample: on a card of a few GiB ComfyUI's own reserve drives other models out before anything is tried here."""
sys.path.insert(0, os.getcwd())
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

if os.environ.get("STEADYVSR_CARD", "books") != "books":
    importlib.import_module("simcard_card").AllocatorCards(CARD_BYTES).install()
sys.path.append(str(PACK / "tests" / "session"))
import tiny_flashvsr  # noqa: E402

import nodes  # noqa: E402

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH = 25, 64, 96
STREAM = {
    "scale": 4.0, "seed": 3, "sparse_ratio": 2.0, "kv_ratio": 3.0, "local_range": 11,
    "colour": "adain", "decoder": "tc",
}  # fmt: skip
LOAD = {
    "version": "auto", "precision": "auto", "device": "auto", "attention": "auto", "lq_cache_order": "fixed",
    "download": False,
}  # fmt: skip


def pack(module: str):
    return importlib.import_module(str(PACK).replace(".", "_x_") + "." + module)


def call(name: str, **inputs):
    with torch.inference_mode():
        return nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"].PREPARE_CLASS_CLONE({}).execute(**inputs).args


def clip() -> torch.Tensor:
    return torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))


def upscale(**changes):
    image, report = call("Upscale", flashvsr=MODEL, image=clip(), **{**STREAM, **changes})
    return image, json.loads(report)


def digest(frames: torch.Tensor) -> str:
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()


def compared(first: torch.Tensor, second: torch.Tensor) -> dict:
    difference = (first - second).abs()
    error = (first - second).square().mean()
    return {
        "shape": list(first.shape), "finite": bool(first.isfinite().all()), "largest": difference.max().item(),
        "before_failure": difference[:21].max().item(), "psnr": -10 * error.clamp_min(1e-20).log10().item(),
    }  # fmt: skip


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Card(TorchDispatchMode):
    """Fails the third new storage of a unit of work whose plan does not fit."""

    def __init__(self, memory, phase: str, fits) -> None:
        super().__init__()
        self.memory, self.phase, self.fits, self.made = memory, phase, fits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        running, state = self.memory.get("phase"), self.memory.get("memory")
        if running != self.phase or state is None or self.memory["done"] < 21:
            return result
        if any(x.untyped_storage()._cdata not in given for x in made):
            self.made += 1
            if self.made > 2 and not self.fits(state):
                self.made = 0
                raise torch.OutOfMemoryError("scripted")
        return result


@contextlib.contextmanager
def card(phase: str, fits):
    """The upscale node under a card on which `phase` fits only where `fits(RunMemory)`; from frame 21 on."""
    ladder, seen = pack("nodes.flashvsr.memory"), {}
    on_step, on_error = ladder.RunMemory.on_step, ladder.RunMemory.on_memory_error

    def watched(self, phase, done, total):
        on_step(self, phase, done, total)
        seen.update(phase=phase, done=done, memory=self)

    def handled(self, phase, plan, error):
        running, seen["phase"] = seen["phase"], None
        seen.setdefault("plans", []).append(str(plan))
        try:
            return on_error(self, phase, plan, error)
        finally:
            seen["phase"] = running

    ladder.RunMemory.on_step, ladder.RunMemory.on_memory_error = watched, handled
    try:
        with Card(seen, phase, fits):
            yield seen
    finally:
        ladder.RunMemory.on_step, ladder.RunMemory.on_memory_error = on_step, on_error


class Other(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1 << 18), requires_grad=False)


def other_model():
    """Another model that ComfyUI has on the device."""
    patcher = comfy.model_patcher.ModelPatcher(Other(), load_device=mm.get_torch_device(), offload_device=CPU)
    mm.load_models_gpu([patcher])
    return patcher


def listed() -> list[str]:
    return sorted(type(entry.model.model).__name__ for entry in mm.current_loaded_models)


def summary() -> dict:
    """The report of a run that fits, with what the run's ledger phase holds."""
    _, report = upscale()
    phase = pack("memory.ledger").current().phases[-1]
    return {"report": report, "phase": phase.name, "marks": len(pack("memory.ledger").current().marks)}


def rungs() -> dict:
    """For each phase and rung: the attempts, the frames, what is left."""
    whole, _ = upscale()
    seen = {}
    cases = {
        "KV cache in RAM": lambda memory: memory.plan.kv_in_ram,
        "decoder in smaller chunks": lambda memory: memory.plan.decoder_frames == 1,
        "decoder strips": lambda memory: memory.plan.decoder_strip_pixels is not None,
        "spatial tiles": lambda memory: memory.plan.tile is not None,
    }
    for phase in ("project", "transform", "decode"):
        for rung, fits in cases.items():
            if phase not in pack("models.flashvsr.memory_plan").HELPS[rung]:
                continue
            before = live_bytes()
            with card(phase, fits):
                frames, report = upscale()
            seen[f"{phase}: {rung}"] = {
                "attempts": report["memory"]["attempts"], "plan": report["memory"]["plan_at_end"],
                "frames": report["frames"], **compared(frames, whole),
            }  # fmt: skip
            del frames
            seen[f"{phase}: {rung}"] |= {"live_before": before, "live_after": live_bytes()}
    return seen


def unload() -> dict:
    """Another model lies on the device and is in the way: it goes first, and nothing else changes."""
    whole, _ = upscale()
    other = other_model()
    before = listed()
    with card("transform", lambda memory: "Other" not in listed()):
        frames, report = upscale()
    return {
        "before": before, "after": listed(), "attempts": report["memory"]["attempts"],
        "plan": report["memory"]["plan_at_end"], "same": torch.equal(frames, whole), "patcher": other is not None,
    }  # fmt: skip


def bottom() -> dict:
    """Nothing helps: the error, what it holds, and the run after it."""
    whole, _ = upscale()
    wanted = digest(whole)
    del whole
    before, message, kind = live_bytes(), None, None
    with card("transform", lambda memory: False):
        try:
            upscale()
        except mm.OOM_EXCEPTION as error:
            message, kind = str(error), type(error).__name__
    after = live_bytes()
    again, _ = upscale()
    return {"message": message, "kind": kind, "before": before, "after": after, "same": digest(again) == wanted}


def interrupt() -> dict:
    """A cancel while the run goes down the ladder."""
    before, raised = live_bytes(), None

    def fits(memory) -> bool:
        mm.interrupt_current_processing(True)
        return memory.plan.kv_in_ram

    with card("transform", fits) as seen:
        try:
            upscale()
        except BaseException as error:  # noqa: B036  an interrupt is no Exception in newer versions
            raised = type(error).__name__
    plans = seen["plans"]
    seen.clear()
    return {"raised": raised, "plans": plans, "before": before, "after": live_bytes()}


def budgets() -> dict:
    """Plans that are chosen for a budget, before anything fails."""
    whole, report = upscale()
    memory, seen = report["memory"], {}
    need = memory["predicted"]["bytes"]
    for share in (1.05, 0.97, 0.8, 0.55):
        try:
            frames, report = upscale(budget_gb=need * share / 2**30)
        except ValueError as error:
            seen[str(share)] = {"error": str(error)}
            continue
        chosen = report["memory"]
        seen[str(share)] = {
            "plan": chosen["plan_at_start"], "predicted": chosen["predicted"]["bytes"],
            "budget": chosen["budget_bytes"], **compared(frames, whole),
        }  # fmt: skip
    for name, value in (("below_weights", {"budget_gb": 1e-5}), ("tile", {"tile": 128})):
        try:
            upscale(**value)
        except ValueError as error:
            seen[name] = str(error)
    tiled, report = upscale(tile=256)
    return seen | {"tiled": compared(tiled, whole) | {"plan": report["memory"]["plan_at_end"]}}


def cleaning() -> dict:
    """How often the pool is emptied between steps, and which lines are logged, for each choice."""
    lines, seen = [], {}
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("steadyvsr.memory")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    ledger = pack("memory.ledger")
    levels = ledger.current().levels
    try:
        for name, clean, warn, log_steps in (
            ("never", "never", 1e-6, False), ("every step", "every step", 0.8, True),
            ("pressure, full", "pressure", 1e-6, False), ("pressure, empty", "pressure", 1.0, False),
        ):  # fmt: skip
            lines.clear()
            ledger.current().levels = ledger.Levels(warn=warn, critical=1.0)
            calls = []
            empty = mm.soft_empty_cache
            # By its caller: ComfyUI empties the pool, too, where one is large.
            pack("nodes.flashvsr.memory").mm.soft_empty_cache = lambda *_, calls=calls, empty=empty: (
                calls.append(sys._getframe(1).f_globals["__name__"]) or empty()
            )
            try:
                _, report = upscale(clean=clean, log_steps=log_steps)
            finally:
                mm.soft_empty_cache = empty
            seen[name] = {
                "cleanings": report["memory"]["cleanings"],
                "calls": sum("steadyvsr" in caller for caller in calls),
                "lines": [line for line in lines if line.startswith("after FlashVSR step")],
            }  # fmt: skip
    finally:
        ledger.current().levels = levels
        log.removeHandler(handler)
    return seen


def main() -> None:
    global MODEL
    asyncio.run(nodes.load_custom_node(str(PACK)))
    tiny_flashvsr.write_tiny_model(pack, (8, 8), (8, 8, 8, 8), prompt_length=4)
    MODEL = call("LoadFlashVSR", model_set="tiny.safetensors", **LOAD)[0]
    results: dict = {}
    for scenario in (summary, rungs, unload, bottom, interrupt, budgets, cleaning):
        try:
            results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
