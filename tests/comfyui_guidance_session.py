"""Run by a real ComfyUI's Python, in its folder: guidance and cleaning while a tiny Wan model is sampled.

    python comfyui_guidance_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}. The assertions are in
test_comfy_guidance.py.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback

import comfyui_phases_host as host  # starts ComfyUI; what follows needs that
from comfyui_phases_host import BASE, CARD, FILES, error_of, mm, nodes, pack, torch

assert host.FILES

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402

STEPS = 2


def node(name: str):
    return nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"]


def model():
    return comfy.sd.load_diffusion_model(str(BASE / "models" / "diffusion_models" / FILES["diffusion_model"]))


def patch(name: str, **inputs):
    return node(name).PREPARE_CLASS_CLONE({}).execute(**inputs).args[0]


def sample(patcher, size: tuple = (2, 8, 8), cfg: float = 3.0, callback=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, *size, generator=generator)
    positive, negative = ([[torch.randn(1, 7, 4096, generator=generator), {}]] for _ in range(2))
    return comfy.sample.sample(
        patcher, noise, STEPS, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise), denoise=1.0, seed=1,
        disable_pbar=True, callback=callback,
    )  # fmt: skip


def counted(patcher) -> list[int]:
    """Batch size of every call of the diffusion model; a function of our own around it, as other packs set them."""
    batches: list[int] = []

    def around(apply_model, arguments):
        batches.append(arguments["input"].shape[0])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.set_model_unet_function_wrapper(around)
    return batches


def calls() -> dict:
    """Calls and batches of each mode, and the results against the stock one; with a foreign wrapper before or after."""
    base, seen = model(), {}
    stock = sample(base)
    positive_only = sample(base, cfg=1.0)
    for mode in ("off", "sequential", "batched"):
        first = base.clone()
        batches_before = counted(first)  # the foreign function is there already
        result = sample(patch("GuidanceMemory", model=first, mode=mode))
        second = patch("GuidanceMemory", model=base, mode=mode)
        batches_after = counted(second)  # it comes later
        again = sample(second)
        seen[mode] = {
            "batches": batches_before, "batches_foreign_later": batches_after,
            "same_as_stock": float((result - stock).abs().max()), "again": float((again - result).abs().max()),
            "same_as_positive": float((result - positive_only).abs().max()),
        }  # fmt: skip
    twice = patch("GuidanceMemory", model=patch("GuidanceMemory", model=base, mode="off"), mode="batched")
    batches = counted(twice)
    sample(twice)
    return seen | {
        "cfg_matters": float((stock - positive_only).abs().max()), "replaced": batches,
        "untouched": [len(base.wrappers.get("calc_cond_batch", {}))],
        "unknown": error_of(patch, "GuidanceMemory", model=base, mode="half"),
    }  # fmt: skip


def foreign_batch_function() -> dict:
    """Another pack's sampler_calc_cond_batch_function, which ends in ComfyUI's own evaluation, keeps its effect."""
    base = model()

    def scaled(arguments):
        out = comfy.samplers.calc_cond_batch(
            arguments["model"], arguments["conds"], arguments["input"], arguments["sigma"], arguments["model_options"]
        )
        return [value * 0.5 for value in out]

    plain = base.clone()
    plain.set_model_sampler_calc_cond_batch_function(scaled)
    wanted, seen = sample(plain), {}
    for mode in ("sequential", "off"):
        patched = patch("GuidanceMemory", model=plain, mode=mode)
        batches = counted(patched)
        seen[mode] = {"difference": float((sample(patched) - wanted).abs().max()), "batches": batches}
    return seen | {"effect": float((wanted - sample(base)).abs().max())}


def peaks() -> dict:
    """Most bytes of live tensors made while sampling at 1×16×5×32×32, weights left out."""
    tracker_class, seen = pack("memory.tracker").StorageTracker, {}
    for mode in ("batched", "sequential", "off"):
        base = model()
        patched = patch("GuidanceMemory", model=base, mode=mode)
        mm.load_models_gpu([patched])
        with tracker_class(exclude=list(base.model.parameters())) as tracker:
            sample(patched, (5, 32, 32))
        seen[mode] = tracker.peak
    return seen


def cleanings() -> dict:
    base, seen = model(), {}
    original, calls = mm.soft_empty_cache, []
    mm.soft_empty_cache = lambda *a, **k: calls.append(1) or original(*a, **k)
    loaded = base.model_size()
    try:
        for clean, capacity in (("never", loaded), ("every step", 10 * loaded), ("pressure", 10 * loaded),
                                ("pressure full", loaded + 1000)):  # fmt: skip
            CARD.capacity = 100 * loaded
            patched = patch("LeanSampling", model=base, clean=clean.removesuffix(" full"))
            mm.load_models_gpu([patched])
            CARD.capacity = capacity
            steps: list[int] = []

            def on_step(step, *_, steps=steps):
                steps.append(len(calls))

            calls.clear()
            sample(patched, callback=on_step)
            receipt = pack("nodes.receipts").newest()
            seen[clean] = {
                "during": len(calls), "steps": len(steps),
                "receipt": receipt[0]["line"] if receipt else None,
            }  # fmt: skip
    finally:
        mm.soft_empty_cache = original
        CARD.capacity = 64_000_000
    return seen


def schema() -> dict:
    seen = {}
    for name in ("GuidanceMemory", "LeanSampling"):
        declared = node(name).define_schema()
        seen[name] = {
            "inputs": [item.id for item in declared.inputs],
            "parameters": list(inspect.signature(node(name).execute).parameters),
            "without_tooltip": [item.id for item in [*declared.inputs, *declared.outputs] if not item.tooltip],
        }
    return seen


def main() -> None:
    CARD.capacity = 64_000_000
    results = {}
    for scenario in (schema, calls, foreign_batch_function, peaks, cleanings):
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
