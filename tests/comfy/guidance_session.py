"""Run by a real ComfyUI's Python, in its folder: guidance and cleaning while a tiny Wan model is sampled.

    python guidance_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}. The assertions are in
test_guidance.py.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import traceback

import phases_host as host  # starts ComfyUI; what follows needs that
from phases_host import BASE, CARD, FILES, WITNESS, error_of, mm, nodes, pack, torch

assert host.FILES

import comfy.hooks  # noqa: E402
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


def sample(patcher, size: tuple = (2, 8, 8), cfg: float = 3.0, callback=None, extra=()) -> torch.Tensor:
    """Two steps of euler.

    Args:
        extra: options of further positive conditions, such as {"area": …}.
    """
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, *size, generator=generator)
    positive, negative = ([[torch.randn(1, 7, 4096, generator=generator), {}]] for _ in range(2))
    positive += [[torch.randn(1, 7, 4096, generator=generator), dict(options)] for options in extra]
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


def stronger(arguments):
    """Another pack's guidance, half as strong."""
    return arguments["uncond"] + (arguments["cond"] - arguments["uncond"]) * arguments["cond_scale"] * 0.5


def hook_of_lora():
    """A LoRA that is on while one condition is computed, and off for the others."""
    lora = comfy.utils.load_torch_file(str(BASE / "models" / "loras" / FILES["lora"]), safe_load=True)
    return comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)


def composition() -> dict:
    """What other nodes set before this one, on the model and in the conditions: the same result, and it matters."""
    half_mask = torch.zeros(1, 2, 8, 8)
    half_mask[..., 4:] = 1.0
    cases = {
        "sampler_cfg_function": (lambda m: m.set_model_sampler_cfg_function(stronger), ()),
        "sampler_pre_cfg_function": (
            lambda m: m.set_model_sampler_pre_cfg_function(lambda a: [a["conds_out"][0] * 0.5, a["conds_out"][1]]), (),
        ),
        "sampler_post_cfg_function": (
            lambda m: m.set_model_sampler_post_cfg_function(lambda a: a["denoised"] * 0.5), (),
        ),
        "area": (lambda m: None, ({"area": (2, 8, 4, 0, 0, 4), "strength": 1.0},)),
        "mask": (lambda m: None, ({"mask": half_mask, "mask_strength": 1.0},)),
        "hooks": (lambda m: None, ({"hooks": hook_of_lora()},)),
    }  # fmt: skip
    seen = {}
    for name, (set_patch, extra) in cases.items():
        base = model()
        without = sample(base)
        other = base.clone()
        set_patch(other)
        wanted = sample(other, extra=extra)
        sequential = patch("GuidanceMemory", model=other, mode="sequential")
        off = patch("GuidanceMemory", model=other, mode="off")
        positive_twice = other.clone()
        positive_twice.set_model_sampler_calc_cond_batch_function(
            lambda a: comfy.samplers.calc_cond_batch(
                a["model"], [a["conds"][0]] * 2, a["input"], a["sigma"], a["model_options"]
            )
        )
        batches = counted(sequential)
        seen[name] = {
            "effect": float((wanted - without).abs().max()),
            "sequential": float((sample(sequential, extra=extra) - wanted).abs().max()),
            "largest_batch": max(batches), "calls": len(batches),
            "off": float((sample(off, extra=extra) - sample(positive_twice, extra=extra)).abs().max()),
        }  # fmt: skip
    return seen


def warnings_of(function) -> list[str]:
    log, lines = logging.getLogger("steadyvsr.nodes"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    try:
        function()
    finally:
        log.removeHandler(handler)
    return lines


def evaluated_apart() -> dict:
    """Nodes such as ComfyUI's Skip Layer Guidance evaluate the negative on its own: [None, negative]."""
    base, seen = model(), {}

    def apart(arguments):
        model_, conds, *rest = (arguments[key] for key in ("model", "conds", "input", "sigma", "model_options"))
        positive, _ = comfy.samplers.calc_cond_batch(model_, [conds[0], None], *rest)
        _, negative = comfy.samplers.calc_cond_batch(model_, [None, conds[1]], *rest)
        return [positive, negative]

    stock = sample(base)
    for mode in ("sequential", "off"):
        other = base.clone()
        other.set_model_sampler_calc_cond_batch_function(apart)
        patched = patch("GuidanceMemory", model=other, mode=mode)
        batches, results = counted(patched), []
        said = warnings_of(lambda patched=patched, results=results: results.append(sample(patched)))
        seen[mode] = {"difference": float((results[0] - stock).abs().max()), "batches": batches, "said": said}
    return seen


def three_conditions() -> dict:
    """A guider that computes three conditions at once, in an order of its own."""
    base, seen = model(), {}

    def three(arguments):
        model_, conds, *rest = (arguments[key] for key in ("model", "conds", "input", "sigma", "model_options"))
        negative, middle, positive = comfy.samplers.calc_cond_batch(model_, [conds[1], conds[0], conds[0]], *rest)
        return [positive * 0.5 + middle * 0.5, negative]

    plain = base.clone()
    plain.set_model_sampler_calc_cond_batch_function(three)
    wanted = sample(plain)
    for mode in ("sequential", "off"):
        patched = patch("GuidanceMemory", model=plain, mode=mode)
        batches, results = counted(patched), []
        said = warnings_of(lambda patched=patched, results=results: results.append(sample(patched)))
        seen[mode] = {"difference": float((results[0] - wanted).abs().max()), "batches": batches, "said": said}
    return seen


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
            marks = pack("memory.ledger").current().marks
            marks.clear()
            steps: list[int] = []

            def on_step(step, *_, steps=steps):
                steps.append(len(calls))

            calls.clear()
            sample(patched, callback=on_step)
            receipt = pack("nodes.receipts").newest()
            seen[clean] = {
                "during": len(calls), "steps": len(steps),
                "receipt": receipt[0]["line"] if receipt else None, "marks": [mark.stage for mark in marks],
            }  # fmt: skip
        report = nodes.NODE_CLASS_MAPPINGS["SteadyVSR_MemoryReport"].PREPARE_CLASS_CLONE({})
        text = json.loads(report.execute(value=[None], label=["after sampling"]).args[1])["text"]
        seen["memory report"] = [line for line in text if "Lean Sampling" in line]
        patched = patch("LeanSampling", model=base, clean="pressure")
        mm.load_models_gpu([patched])
        WITNESS.dies_after = 0
        sample(patched)
        seen["unreadable"] = pack("nodes.receipts").newest()[0]["line"]
    finally:
        WITNESS.dies_after = None
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
    for scenario in (
        schema, calls, foreign_batch_function, composition, evaluated_apart, three_conditions, peaks, cleanings,
    ):  # fmt: skip
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
