"""Run by a real ComfyUI's Python, in its folder: promises on one or two cards that have memory of their own.

    STEADYVSR_CARD=simcard[:2] python simcard_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}; STEADYVSR_SCENARIOS
names some of them. The assertions are in test_simcard.py.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import loaders_session as loaders  # starts ComfyUI; what follows needs that

# isort: split
import comfy.model_patcher
import comfy.utils
import phases_workflow as workflow
import simcard
import small_vaes
from loaders_session import load, patchers_of
from phases_host import CARD, EXECUTOR, FILES, FLASHVSR, Sink, execute_plain, execution, mm, nodes, pack, torch

AMPLE = 1 << 30
CPU = torch.device("cpu")
RUNS = 10
STEPS = 6
HELD: list = []


class Use:
    """An output node that puts a model on its card; with an error, it fails then."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("*",)}, "optional": {"turn": ("INT", {"default": 0})}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "use", "test", True

    def use(self, model, turn=0):
        mm.load_models_gpu(patchers_of([model]))
        return {}


nodes.NODE_CLASS_MAPPINGS["Test_Use"] = Use


def live() -> list[int]:
    """Bytes of tensors on each card, by its allocator."""
    gc.collect()
    return [simcard.statistics(card)["live"] for card in CARD.devices]


def clean() -> None:
    HELD.clear()
    loaders.clean()
    CARD.capacity = AMPLE


def plain_model(device: torch.device, mib: int = 2):
    """A model of another pack, for one of the cards."""
    return comfy.model_patcher.ModelPatcher(torch.nn.Linear(256 * mib, 1024, bias=False), device, CPU)


def press() -> dict:
    """Free model and node cache, as ComfyUI's worker does it: the receipt beside what the allocators lost."""
    before = live()
    EXECUTOR.forget()
    found = pack("patches.presses").last_press()
    told = found.to_json()
    told.pop("snapshots")
    lost = [was - now for was, now in zip(before, live(), strict=True)]
    return {"lost": lost, "line": found.line, "told": told}


def presses() -> dict:
    """A model that is not kept beside a kept one, a foreign one on the second card; weights are held or not."""
    pack("memory.holders").SECONDS = 120.0  # a busy machine is no reason to name nobody
    seen = {}
    for holder in ("nobody", "the largest weight", "all weights"):
        clean()
        model, _ = load("LoadDiffusionModel", keep_loaded="no", offload_after_load=False)
        vae, _ = load("LoadVAE", keep_loaded="keep", offload_after_load=False)
        foreign = [plain_model(card) for card in CARD.devices[1:]]
        mm.load_models_gpu([*patchers_of([model, vae]), *foreign])
        weights = sorted((weight.data for weight in model.model.parameters()), key=lambda weight: -weight.nbytes)
        HELD.extend({"nobody": [], "the largest weight": weights[:1], "all weights": weights}[holder])
        del weights
        seen[holder] = {"before": live(), "held": sum(weight.nbytes for weight in HELD)}
        kept = patchers_of([vae])[0]
        seen[holder] |= press() | {"kept_stays": kept.loaded_size() == kept.model_size()}
        del model, vae, foreign, kept
    clean()
    return seen


def kept() -> dict:
    """Ten runs of a kept model, by the loader's defaults, with both buttons between them: bytes that were copied."""
    seen = {}
    for policy in ("keep", "pin"):
        clean()
        prompt = {
            "load": {
                "class_type": "SteadyVSR_LoadDiffusionModel",
                "inputs": {"unet_name": FILES["diffusion_model"], "weight_dtype": "default", "keep_loaded": policy},
            },
            "use": {"class_type": "Test_Use", "inputs": {"model": ["load", 0]}},
        }
        runs, errors = [], []
        for _ in range(RUNS):
            before = simcard.statistics(CARD.device)
            errors.append(EXECUTOR.run(prompt)["error"])
            EXECUTOR.forget()
            after = simcard.statistics(CARD.device)
            runs.append([after[way] - before[way] for way in ("copied_in", "copied_out")])
        seen[policy] = {"runs": runs, "errors": errors, "live": live(), "reads": len(loaders.READS)}
    clean()
    return seen


def flashvsr_clip() -> torch.Tensor:
    return torch.rand(25, 64, 96, 3, generator=torch.Generator().manual_seed(1))


def upscaled(model, **more) -> tuple[torch.Tensor, dict]:
    stream = {"scale": 4.0, "seed": 3, "sparse_ratio": 2.0, "kv_ratio": 3.0, "local_range": 11, "colour": "adain"}
    with torch.inference_mode():
        node = nodes.NODE_CLASS_MAPPINGS["SteadyVSR_Upscale"].PREPARE_CLASS_CLONE({})
        image, report = node.execute(flashvsr=model, image=flashvsr_clip(), decoder="tc", **stream, **more).args
    return image, json.loads(report)


def swept(run: Callable[[], tuple[torch.Tensor, dict]], wanted: torch.Tensor) -> dict:
    """The same run on ever smaller cards: what each came to, and what it left there."""
    mm.unload_all_models()
    simcard.reset_peak(CARD.device)
    result, report = run()
    peak = simcard.statistics(CARD.device)["peak"]
    seen = {"peak": peak, "difference": apart(result, wanted), "device": report.get("device"), "steps": []}
    del result
    mm.unload_all_models()
    seen["left"] = live()[0]
    for step in range(STEPS):
        mm.soft_empty_cache()
        CARD.capacity = int(1.1 * peak * (STEPS - step) / STEPS)
        found: dict = {"capacity": CARD.capacity}
        try:
            result, report = run()
            attempts = report["memory"]["attempts"] if "attempts" in report.get("memory", {}) else report["attempts"]
            found |= {"difference": apart(result, wanted), "tried": [item["tried"] for item in attempts]}
            del result
        except mm.OOM_EXCEPTION as error:
            found["refused"] = str(error)
        except ValueError as error:  # no plan is predicted to fit
            found["refused"] = str(error)
        mm.unload_all_models()
        seen["steps"].append(found | {"left": live()[0]})
    CARD.capacity = AMPLE
    return seen


def apart(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return (result.cpu() - wanted).abs().max().item() if result.shape == wanted.shape else -1.0


def flashvsr() -> dict:
    """The network of the pack, on the CPU and then on ever smaller cards."""
    clean()
    model = execute_plain("LoadFlashVSR", model_set="nano (embedded)", **FLASHVSR | {"device": "cpu"})
    wanted, _ = upscaled(model)
    model = execute_plain("LoadFlashVSR", model_set="nano (embedded)", **FLASHVSR)
    return swept(lambda: upscaled(model), wanted)


def vae_tiles() -> dict:
    """A video VAE and an image VAE: whole latents on the CPU, then tiles on ever smaller cards."""
    clean()
    seen = {}
    for kind, shape in {"wan": (1, 16, 3, 12, 17), "sd": (2, 4, 24, 20)}.items():
        vae = small_vaes.SMALL_VAES[kind]()
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole = vae.process_output(vae.first_stage_model.decode(latents)).movedim(1, -1)
        whole = whole.reshape(-1, *whole.shape[-3:])

        def run(vae=vae, latents=latents) -> tuple[torch.Tensor, dict]:
            with torch.inference_mode():
                node = nodes.NODE_CLASS_MAPPINGS["SteadyVSR_VAEDecodeTiled"].PREPARE_CLASS_CLONE({})
                tiles = {"tile_size": 128, "overlap": 16, "mode": "auto", "memory_budget_gb": 2.0, "on_oom": "shrink"}
                value, report = node.execute(samples={"samples": latents}, vae=vae, **tiles).args
            return value, json.loads(report)

        seen[kind] = swept(run, whole)
    return seen


def pinned() -> dict:
    """A pinned model on the card while a run beside it really runs out of memory and goes down its ladder."""
    seen = {}
    vae = small_vaes.SMALL_VAES["sd"]()
    latents = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    flashvsr_model = execute_plain("LoadFlashVSR", model_set="nano (embedded)", **FLASHVSR)

    def decode() -> dict:
        with torch.inference_mode():
            node = nodes.NODE_CLASS_MAPPINGS["SteadyVSR_VAEDecodeTiled"].PREPARE_CLASS_CLONE({})
            tiles = {"tile_size": 128, "overlap": 16, "mode": "blend", "memory_budget_gb": 2.0, "on_oom": "shrink"}
            return json.loads(node.execute(samples={"samples": latents}, vae=vae, **tiles).args[1])

    for name, run in {"FlashVSR": lambda: upscaled(flashvsr_model)[1]["memory"], "VAE": decode}.items():
        for policy in ("keep", "pin"):
            clean()
            model, _ = load("LoadDiffusionModel", keep_loaded=policy, offload_after_load=False)
            mm.load_models_gpu([model])
            simcard.reset_peak(CARD.device)
            run()
            beside = model.loaded_size()
            mm.load_models_gpu([model])
            CARD.capacity = int(0.97 * simcard.statistics(CARD.device)["peak"])
            mm.soft_empty_cache()
            attempts = run()["attempts"]
            weights = [*model.model.parameters(), *model.model.buffers()]
            seen[f"{name} {policy}"] = {
                "size": model.model_size(), "beside": beside, "after": model.loaded_size(),
                "on_card": sum(weight.nbytes for weight in weights if weight.device == CARD.device),
                "tried": [item["tried"] for item in attempts],
            }  # fmt: skip
            del model, weights
    clean()
    return seen


def sampled(seed: int = 1) -> dict:
    """A prompt that samples and decodes a clip."""
    phases = workflow.seven_phases(FILES, seed)
    prompt = {name: phases[name] for name in ("unet", "clip", "vae", "patch", "image", "encode", "sample", "decode")}
    prompt["patch"]["inputs"]["model"] = ["unet", 0]
    prompt["positive"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a red cat"}}
    prompt["encode"]["inputs"]["pixels"] = ["image", 0]
    prompt["sample"]["inputs"] |= {
        "positive": ["positive", 0], "negative": ["positive", 0], "latent_image": ["encode", 0], "seed": seed
    }  # fmt: skip
    prompt["decode"]["inputs"]["samples"] = ["sample", 0]
    prompt["sink"] = {"class_type": "Test_Sink", "inputs": {"image": ["decode", 0]}}
    return prompt


def decoded(seed: int = 1) -> dict:
    """A prompt of the VAE alone, through our nodes."""
    prompt = {name: node for name, node in sampled(seed).items() if name in ("vae", "image", "encode", "sink")}
    prompt["image"]["inputs"]["color"] = seed
    tiles = {"vae": ["vae", 0], "tile_size": 64, "overlap": 16}
    prompt["decode"] = {"class_type": "SteadyVSR_VAEDecodeTiled", "inputs": {"samples": ["encode", 0], **tiles}}
    return prompt


def output(prompt: dict) -> torch.Tensor:
    Sink.seen.clear()
    outcome = EXECUTOR.run(prompt)
    if outcome["error"]:
        raise RuntimeError(outcome["error"])
    (image,) = Sink.seen
    Sink.seen.clear()
    return image


@contextmanager
def setting(name: str) -> Iterator[None]:
    """ComfyUI as if it had been started with this option."""
    kinds = execution.CacheType
    caches = {
        "--cache-none": (getattr(kinds, "NONE", None) or getattr(kinds, "DEPENDENCY_AWARE", None), 0),
        "--cache-lru": (kinds.LRU, 1),
    }
    executor, whole = EXECUTOR.executor, (mm.DISABLE_SMART_MEMORY, mm.vram_state)
    before = vars(executor).copy()
    if name in caches:
        kind, size = caches[name]
        arguments = {"cache_type": kind}
        if "cache_args" in before:
            arguments["cache_args"] = {**before["cache_args"], "lru": size}
        else:
            arguments["cache_size"] = size
        EXECUTOR.executor = execution.PromptExecutor(executor.server, **arguments)
    mm.DISABLE_SMART_MEMORY = name == "--disable-smart-memory"
    if name == "--highvram":
        mm.vram_state = mm.VRAMState.HIGH_VRAM
    try:
        yield
    finally:
        EXECUTOR.executor = executor
        mm.DISABLE_SMART_MEMORY, mm.vram_state = whole


def reruns() -> dict:
    """One prompt twice under each setting: the numbers of the default."""
    clean()
    wanted = output(sampled())
    seen = {}
    for name in ("default", "--cache-none", "--cache-lru", "--disable-smart-memory", "--highvram"):
        clean()
        with setting(name):
            same, left = [], []
            for other in (2, 3):
                same.append(bool(torch.equal(output(sampled()), wanted)))
                output(decoded(other))
                EXECUTOR.forget()
                left.append(live()[0])
        seen[name] = {"same": same, "left": left}
    return seen


def flat() -> dict:
    """Alternating, cancelled and failing prompts: live bytes on the card after each, the same models loaded."""
    clean()
    seen: dict = {}
    alternating = []
    for turn in range(30):
        output(sampled(turn) if turn % 2 else decoded(turn))
        alternating.append(live()[0])
    seen["alternating"] = alternating

    def cancel(*_, **__) -> None:
        """In the middle of sampling, where ComfyUI's server asks, too."""
        steps.append(1)
        mm.interrupt_current_processing(True)
        mm.throw_exception_if_processing_interrupted()

    steps: list[int] = []
    cancelled = []
    comfy.utils.set_progress_bar_global_hook(cancel)
    for turn in range(RUNS):
        steps.clear()
        Sink.seen.clear()
        EXECUTOR.run(sampled(100 + turn))
        cancelled.append([len(steps), len(Sink.seen), live()[0]])
    comfy.utils.set_progress_bar_global_hook(None)
    seen["cancelled"] = cancelled

    failing = []
    capacity, CARD.capacity = CARD.capacity, live()[0] + (4 << 20)
    for turn in range(RUNS):
        failing.append([EXECUTOR.run(sampled(200 + turn))["error"], live()[0]])
    CARD.capacity = capacity
    seen["failing"] = failing
    seen["works"] = bool(output(sampled(1)).isfinite().all())
    clean()
    gc.collect()
    return seen | {"left": live()[0]}


SCENARIOS = {
    1: (presses, kept, flashvsr, vae_tiles, pinned, reruns, flat),
    2: (presses,),
}


def main() -> None:
    CARD.capacity = AMPLE
    loaders.count_reads()
    wanted = [word for word in os.environ.get("STEADYVSR_SCENARIOS", "").split(",") if word]
    results = {}
    for scenario in SCENARIOS[len(CARD.devices)]:
        if wanted and scenario.__name__ not in wanted:
            continue
        if scenario is not presses:  # which searches for holders
            gc.freeze()  # ComfyUI's own objects need not be looked through at every collection
        started = time.process_time()
        try:
            results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
        sys.stderr.write(f"{scenario.__name__}: {time.process_time() - started:.1f} s of CPU time\n")
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
