"""Run by a real ComfyUI's Python, in its folder: what the loader nodes predict, ask ComfyUI for, and survive.

    python loading_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}. The assertions are in
test_loading.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback

import loaders_session as loaders  # starts ComfyUI; what follows needs that
from loaders_session import LOADERS, clean, load, registry, run, sample, straight_to_card
from phases_host import BASE, CARD, EXECUTOR, FILES, WITNESS, error_of, nodes, pack, resident, torch

assert loaders.READS == []

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def use(name: str, values: list) -> torch.Tensor:
    """What the loaded things compute, in one row."""
    made = []
    for value in values:
        if hasattr(value, "encode_from_tokens_scheduled"):
            made.append(value.encode_from_tokens_scheduled(value.tokenize("a red cat"))[0][0])
        elif hasattr(value, "decode"):
            picture = torch.linspace(0, 1, 5 * 64 * 48 * 3).reshape(5, 64, 48, 3)
            made.append(value.decode(value.encode(picture)))
        elif value is not None:
            made.append(sample(value))
    return torch.cat([item.flatten().float() for item in made])


def used_again() -> dict:
    """Each loader: computed with, offloaded and kept, computed with again."""
    seen = {}
    for name in LOADERS:
        clean()
        *values, _ = load(name, keep_loaded="keep", offload_after_load=False)
        first = use(name, values)
        del values
        clean()
        with straight_to_card() as there:
            *again, report = load(name, keep_loaded="keep", offload_after_load=True)
        before = there[0]
        after = resident()
        second = use(name, again)
        receipts = report["offload"]
        seen[name] = {
            "before": sum(before.values()), "after": sum(after.values()),
            "asked": sum(receipt["asked"] for receipt in receipts),
            "verdicts": sorted({receipt["verdict"] for receipt in receipts}), "networks": len(before),
            "numbers": first.numel(), "finite": bool(first.isfinite().all()), "same": bool(torch.equal(first, second)),
        }  # fmt: skip
        del again
    clean()
    return seen


def predicted() -> dict:
    """Bytes that were predicted from the header beside those that were then loaded."""
    clean()
    seen = {}
    for name in LOADERS:
        report = load(name)[-1]
        seen[name] = [report["predicted_bytes"], report["weights_bytes"]]
        EXECUTOR.forget()
    for dtype in ("fp8_e4m3fn", "fp8_e5m2"):
        report = run("LoadDiffusionModel", unet_name=FILES["diffusion_model"], weight_dtype=dtype)[-1]
        seen[dtype] = [report["predicted_bytes"], report["weights_bytes"]]
        EXECUTOR.forget()
    weights = pack("nodes.loaders.weight_bytes")
    folder = BASE / "models" / "diffusion_models"
    tensors = load_file(folder / FILES["diffusion_model"])
    quantised = {name: x.to(torch.float8_e4m3fn) for name, x in tensors.items()} | {"scaled_fp8": torch.zeros(2)}
    save_file(quantised, BASE / "quantised.safetensors")
    seen["quantised"] = [
        weights.total([BASE / "quantised.safetensors"], weights.diffusion_model),
        sum(x.nbytes for x in quantised.values()),
    ]  # fmt: skip
    torch.save({"weight": torch.zeros(1000)}, BASE / "plain.pt")
    (BASE / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for name in ("plain.pt", "damaged.safetensors"):
        seen[name] = [weights.total([BASE / name], weights.vae), os.path.getsize(BASE / name)]
    return seen


def clip_files() -> dict:
    """What ComfyUI's own loaders of one to four files ask of `comfy.sd.load_clip`, and what ours asks."""
    folder = BASE / "models" / "text_encoders"
    names = [f"part{number}.safetensors" for number in (1, 2, 3, 4)]
    for name in names:
        save_file({"x": torch.zeros(1)}, folder / name)
    folder_paths.filename_list_cache.clear()
    for extra in ("nodes_sd3", "nodes_hidream"):
        asyncio.run(nodes.load_custom_node(os.path.join("comfy_extras", f"{extra}.py"), module_parent="comfy_extras"))
    asked: list[dict] = []

    def spy(ckpt_paths, embedding_directory=None, clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION, model_options=None):
        asked.append({
            "files": [os.path.basename(path) for path in ckpt_paths], "embeddings": list(embedding_directory),
            "type": clip_type.name, "options": {key: str(value) for key, value in (model_options or {}).items()},
        })  # fmt: skip
        raise ValueError("seen")

    stock = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
    kinds = {1: "wan", 2: "flux", 3: "sd3", 4: "hidream"}
    original, comfy.sd.load_clip = comfy.sd.load_clip, spy
    seen = {}
    try:
        for count, kind in stock.items():
            files = {f"clip_name{number}": name for number, name in enumerate(names[:count], 1)}
            found = nodes.NODE_CLASS_MAPPINGS[kind]
            if count == 1:
                error_of(found().load_clip, names[0], kinds[count])
            elif count == 2:
                error_of(found().load_clip, *files.values(), kinds[count])
            else:
                error_of(found.execute, **files)
            error_of(run, "LoadCLIP", **files, type=kinds[count])
            seen[str(count)] = {"stock": asked[-2], "ours": asked[-1]}
        error_of(nodes.NODE_CLASS_MAPPINGS["CLIPLoader"]().load_clip, names[0], "wan", "cpu")
        error_of(run, "LoadCLIP", clip_name1=names[0], type="wan", device="cpu")
        seen["cpu"] = {"stock": asked[-2], "ours": asked[-1]}
    finally:
        comfy.sd.load_clip = original
    return seen


def counters_die() -> dict:
    """The device's counters raise from the first question on: every loader still loads and says what it cannot know."""
    clean()
    seen = {}
    WITNESS.dies_after = 0
    try:
        for name in LOADERS:
            with straight_to_card() as there:
                *values, report = load(name)
            seen[name] = {
                "before": len(there[0]), "after": resident(),
                "verdicts": sorted({receipt["verdict"] for receipt in report["offload"]}),
            }  # fmt: skip
            del values
            EXECUTOR.forget()
        seen["auto"] = error_of(load, "LoadDiffusionModel", device="auto")
        seen["admission"] = load("LoadVAE")[-1]["admission"]
    finally:
        WITNESS.dies_after = None
    _, report = load("LoadDiffusionModel", device="auto")
    seen["recovered"] = report["device"]
    return seen


def small_budgets() -> dict:
    """Kept models may not fill the RAM; a card that is smaller than what `auto` would put there is not chosen."""
    clean()
    seen = {}
    book = registry()
    book.ram_budget_bytes = 1_000_000
    try:
        model, report = load("LoadDiffusionModel", keep_loaded="keep")
        seen["keep"] = {"policy": report["keep_loaded"], "reason": report["keep_loaded_reason"]}
        seen["works"] = bool(sample(model).isfinite().all())
        _, report = load("LoadVAE", keep_loaded="pin")
        seen["pin"] = {"policy": report["keep_loaded"], "reason": report["keep_loaded_reason"]}
        book.ram_budget_bytes = 6_000_000
        clean()
        names = {}
        for name in ("LoadVAE", "LoadCLIP", "LoadDiffusionModel"):
            load(name, keep_loaded="keep")
            names[name] = [entry.key.kind for entry in book.owned()]
        seen["least recently used goes first"] = names
    finally:
        book.ram_budget_bytes = None
    clean()
    capacity = CARD.capacity
    size = os.path.getsize(BASE / "models" / "diffusion_models" / FILES["diffusion_model"])
    CARD.capacity = size + 100_000  # the file fits, its weights in the format of this device do not
    try:
        seen["between file and weights"] = error_of(load, "LoadDiffusionModel", device="auto")
    finally:
        CARD.capacity = capacity
    return seen


def main() -> None:
    CARD.capacity = 64_000_000
    loaders.write_more_files()
    folder_paths.filename_list_cache.clear()
    results = {}
    for scenario in (used_again, predicted, clip_files, counters_die, small_budgets):
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
