"""Run by a real ComfyUI's Python, in its folder: the loader nodes on a simulated card that holds all small models.

    python loaders_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}. The assertions are in
test_loaders.py.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager

import phases_host as host  # starts ComfyUI; what follows needs that
from phases_host import BASE, CARD, EXECUTOR, FILES, error_of, live_bytes, mm, nodes, pack, resident, torch

assert host.FILES

import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import server  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

READS: list[str] = []
LOADERS = {
    "LoadDiffusionModel": {"unet_name": FILES["diffusion_model"], "weight_dtype": "default"},
    "LoadCLIP": {"clip_name1": FILES["clip"], "type": "wan"},
    "LoadVAE": {"vae_name": FILES["vae"]},
    "LoadCheckpoint": {"ckpt_name": "tiny.safetensors"},
}
RUNS = int(os.environ.get("STEADYVSR_RUNS", "6"))
"""Of each loader; benchmarks/loader_runs.py asks for 50, which takes minutes."""


def count_reads() -> None:
    original = comfy.utils.load_torch_file

    def counted(path, *arguments, **keywords):
        READS.append(os.path.basename(str(path)))
        return original(path, *arguments, **keywords)

    comfy.utils.load_torch_file = counted


def write_more_files() -> None:
    """A checkpoint of model and VAE, and a LoRA for another architecture."""
    model = load_file(BASE / "models" / "diffusion_models" / FILES["diffusion_model"])
    vae = load_file(BASE / "models" / "vae" / FILES["vae"])
    parts = {f"model.diffusion_model.{name}": x for name, x in model.items()} | {f"vae.{n}": x for n, x in vae.items()}
    (BASE / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(parts, BASE / "models" / "checkpoints" / "tiny.safetensors")
    foreign = {f"lora_unet_down_blocks_0.lora_{s}.weight": torch.zeros(4, 4) for s in ("up", "down")}
    save_file(foreign, BASE / "models" / "loras" / "foreign.safetensors")


def node(name: str):
    return nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_{name}"]


def run(name: str, **inputs) -> tuple:
    """A node's outputs, the report as values."""
    *values, report = node(name).PREPARE_CLASS_CLONE({}).execute(**inputs).args
    return *values, json.loads(report)


def load(name: str, **changes) -> tuple:
    return run(name, **LOADERS[name], **changes)


def registry():
    return pack("patches.kept").registry()


def clean() -> None:
    registry().release()
    EXECUTOR.forget()
    READS.clear()


def patchers_of(values) -> list:
    residency = pack("patches.residency")
    return [patcher for value in values if value is not None for patcher in residency.patchers_of(value)]


def schema() -> dict:
    seen = {}
    for name in (*LOADERS, "ApplyLoRA"):
        declared = node(name).define_schema()
        seen[name] = {
            "inputs": [item.id for item in declared.inputs],
            "parameters": list(inspect.signature(node(name).execute).parameters),
            "without_tooltip": [item.id for item in [*declared.inputs, *declared.outputs] if not item.tooltip],
            "category": declared.category,
        }
    stock = nodes.UNETLoader.INPUT_TYPES()["required"]
    own = {item.id: item.options for item in node("LoadDiffusionModel").define_schema().inputs[:2]}
    seen["stock widgets"] = [list(stock[name][0]) == list(own[name]) for name in ("unet_name", "weight_dtype")]
    return seen


def reads() -> dict:
    """Each loader: not kept, kept, kept again after everybody let go, not kept any more."""
    seen = {}
    for name in LOADERS:
        clean()
        counts, sources, hits = {}, {}, {}
        for step, keep in (("kept", "keep"), ("again", "keep"), ("given up", "no"), ("anew", "no")):
            *values, report = load(name, keep_loaded=keep)
            counts[step], sources[step] = len(READS), report["source"]
            hits[step] = report["registry"]["hits"]
            del values
            EXECUTOR.forget()
        seen[name] = {"counts": counts, "sources": sources, "hits": hits}
    return seen


def clones() -> dict:
    """What is handed out is not the owner's object, where its type can be cloned."""
    seen = {}
    for name, keep in [(name, keep) for name in LOADERS for keep in ("keep", "no")]:
        clean()
        (*first, _), (*second, _) = load(name, keep_loaded=keep), load(name, keep_loaded=keep)
        owners = [entry.value for entry in registry().entries()]
        flat = [part for value in owners for part in (value if isinstance(value, tuple) else (value,))]
        pairs = zip(patchers_of(first), patchers_of(second), strict=True)
        seen[f"{name} {keep}"] = {
            "owner": any(mine is not None and mine is value for mine in first for value in flat),
            "same_weights": [a.model is b.model for a, b in pairs],
            # 0.33 needs this to make copies; 0.3.64 does not have it.
            "reloadable": all(getattr(p, "cached_patcher_init", "unknown") is not None for p in patchers_of(first[:1])),
        }
        del first, second, owners, flat, pairs
    clean()
    return seen


def file_changed() -> dict:
    """Another file under the same name: the node runs again, and the kept predecessor is dropped first."""
    clean()
    path = BASE / "models" / "diffusion_models" / FILES["diffusion_model"]
    original = path.read_bytes()
    fingerprint = node("LoadDiffusionModel").fingerprint_inputs
    before = fingerprint(unet_name=FILES["diffusion_model"])
    model, _ = load("LoadDiffusionModel", keep_loaded="keep")
    old = id(model.model)
    alive_at_read = []
    read = comfy.utils.load_torch_file

    def watching(*arguments, **keywords):
        alive_at_read.append(len(registry().owned()))
        return read(*arguments, **keywords)

    try:
        state = load_file(path)
        state["head.head.bias"] += 1
        save_file(state, path)
        os.utime(path, ns=(1, 1))
        after = fingerprint(unet_name=FILES["diffusion_model"])
        comfy.utils.load_torch_file = watching
        changed, report = load("LoadDiffusionModel", keep_loaded="keep")
    finally:
        comfy.utils.load_torch_file = read
        path.write_bytes(original)
    return {
        "fingerprint_changed": before != after, "source": report["source"], "new_module": id(changed.model) != old,
        "owned_while_reading": alive_at_read, "entries": len(registry().owned()),
    }  # fmt: skip


def prompt(**keeps: str) -> dict:
    """Two loaders of one file and a gate that uses both."""
    workflow = {
        name: {"class_type": "SteadyVSR_LoadDiffusionModel",
               "inputs": {**LOADERS["LoadDiffusionModel"], "keep_loaded": keep, "offload_after_load": True}}
        for name, keep in keeps.items()
    }  # fmt: skip
    first, *rest = keeps
    wired = {f"model_{index}": [name, 0] for index, name in enumerate(rest, 1)}
    workflow["gate"] = {
        "class_type": "SteadyVSR_PhaseGate",
        "inputs": {"value": [first, 0], "phase": "load", "budget_gb": -1.0, "needs_gb": 0.0, "on_violation": "error",
                   **wired},
    }  # fmt: skip
    return workflow


@contextmanager
def queued(workflow: dict) -> Iterator[None]:
    """ComfyUI's queue as its worker leaves it while the executor's next prompt runs: that tells which nodes it has."""
    item = (0, f"prompt-{EXECUTOR.count + 1}", workflow)
    queue = types.SimpleNamespace(currently_running={0: item})
    server.PromptServer.instance = types.SimpleNamespace(prompt_queue=queue, client_id=None, send_sync=lambda *_: None)
    try:
        yield
    finally:
        del server.PromptServer.instance


def policy_after(*workflows: dict) -> dict:
    """Who holds the diffusion model after these prompts, one after the other."""
    for workflow in workflows:
        with queued(workflow):
            outcome = EXECUTOR.run(workflow)
    entries = [entry for entry in registry().entries() if entry.key.kind == "diffusion model"]
    return {"policies": [entry.policy for entry in entries], "cached": outcome["cached"], "error": outcome["error"]}


def wishes() -> dict:
    """Prompts one after the other, with the queue in sight: which earlier wishes still hold."""
    seen = {}
    pinned, two = prompt(a="pin"), prompt(a="pin", b="no")
    changed = prompt(a="keep", b="no")
    foreign = prompt(b="no")
    foreign["a"] = {"class_type": "SteadyVSR_LoadVAE", "inputs": LOADERS["LoadVAE"]}
    foreign["gate"]["inputs"]["model_1"] = ["a", 0]
    for name, workflows in {
        "cached": (pinned, two), "changed": (pinned, changed), "id of another": (pinned, foreign),
    }.items():  # fmt: skip
        clean()
        seen[name] = policy_after(*workflows)
    return seen


def strongest() -> dict:
    """Two loaders of one file in a prompt, with different wishes, in both orders; then one of them alone."""
    seen = {}
    for order in (("no", "pin"), ("pin", "no"), ("keep", "pin"), ("no", "keep")):
        clean()
        outcome = EXECUTOR.run(prompt(a=order[0], b=order[1]))
        (entry,) = registry().entries()
        seen["+".join(order)] = {"error": outcome["error"], "policy": entry.policy, "reads": len(READS)}
    clean()
    first, second = load("LoadCLIP", keep_loaded="no"), load("LoadCLIP", keep_loaded="pin")
    del first
    third = load("LoadCLIP", keep_loaded="pin")
    seen["clip"] = {"reads": len(READS), "policy": third[-1]["keep_loaded"], "source": second[-1]["source"]}
    del second, third
    clean()
    EXECUTOR.run(prompt(a="no", b="pin"))
    EXECUTOR.forget()  # a loader that ComfyUI has cached is not asked again
    outcome = EXECUTOR.run(prompt(a="no"))
    (entry,) = registry().entries()
    seen["the strong one removed"] = {"policy": entry.policy, "error": outcome["error"]}
    return seen


@contextmanager
def straight_to_card() -> Iterator[list[dict[str, int]]]:
    """Stock loaders put what they read on the card, as ComfyUI does where it thinks that there is room.

    Yields:
        What was on the card after each of these loads.
    """
    places = [(nodes.UNETLoader, "load_unet"), (nodes.VAELoader, "load_vae"), (comfy.sd, "load_clip"),
              (nodes.CheckpointLoaderSimple, "load_checkpoint")]  # fmt: skip
    stock = [(owner, name, getattr(owner, name)) for owner, name in places]
    there: list[dict[str, int]] = []

    def put(original):
        def loading(*arguments, **keywords):
            made = original(*arguments, **keywords)
            mm.load_models_gpu(patchers_of(made if isinstance(made, tuple) else [made]))
            there.append(resident())
            return made

        return loading

    for owner, name, original in stock:
        setattr(owner, name, put(original))
    try:
        yield there
    finally:
        for owner, name, original in stock:
            setattr(owner, name, original)


def offloaded() -> dict:
    """What a loader put on the card itself is off it and kept afterwards, and works; what was there before stays."""
    seen = {}
    for keep in ("keep", "pin"):
        clean()
        with straight_to_card() as there:
            model, report = load("LoadDiffusionModel", keep_loaded=keep, offload_after_load=True)
        after = resident()
        first = sample(model)
        again, second = load("LoadDiffusionModel", keep_loaded=keep, offload_after_load=True)
        seen[keep] = {
            "before": there[0], "after": after, "receipts": report["offload"], "policy": report["keep_loaded"],
            "source": report["source"], "after_again": resident(), "receipts_again": second["offload"],
            "stays": second["stays_bytes"],
            "same_output": bool(torch.equal(first, sample(again))), "resident_when_used": resident(),
        }  # fmt: skip
        del model, again
    clean()
    return seen


def sample(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = [[torch.randn(1, 7, 4096, generator=generator), {}]]
    return comfy.sample.sample(
        model, noise, 2, 3.0, "euler", "simple", text, text, torch.zeros(1, 16, 2, 8, 8), denoise=1.0, seed=1,
        disable_pbar=True,
    )  # fmt: skip


def lora() -> dict:
    clean()
    model, _ = load("LoadDiffusionModel", keep_loaded="keep")
    plain = sample(model)
    READS.clear()
    widgets = {"model": model, "lora_name": FILES["lora"], "strength_model": 1.0}
    patched, _, report = run("ApplyLoRA", **widgets)
    _, _, second = run("ApplyLoRA", **widgets)
    with_lora = sample(patched)
    mm.load_models_gpu([patched])
    before = resident()
    run("ApplyLoRA", **widgets, offload_after_load=True)
    kept = resident()
    registry().release()
    again, _, third = run("ApplyLoRA", **widgets, offload_after_load=True)
    seen = {
        "patches": report["patches"], "reads": len(READS), "sources": [report["source"], second["source"]],
        "changes": float((with_lora - plain).abs().max()), "on_card_before": before, "on_card_kept": kept,
        "on_card_after": resident(),
        "verdict": third["offload"][0]["verdict"], "asked": third["offload"][0]["asked"],
        "foreign": error_of(run, "ApplyLoRA", **{**widgets, "lora_name": "foreign.safetensors"}),
        "missing": error_of(run, "ApplyLoRA", **{**widgets, "lora_name": "gone.safetensors"}),
    }  # fmt: skip
    del patched, again
    fresh, _ = load("LoadDiffusionModel", keep_loaded="keep")
    return seen | {"residue": float((sample(fresh) - plain).abs().max())}


def refusals() -> dict:
    clean()
    seen = {
        "device": error_of(load, "LoadDiffusionModel", device="cuda:7"),
        "missing": error_of(run, "LoadDiffusionModel", unet_name="gone.safetensors", weight_dtype="default"),
        "outside": error_of(run, "LoadVAE", vae_name="../../secret.safetensors"),
        "policy": error_of(load, "LoadVAE", keep_loaded="forever"),
        "auto": error_of(load, "LoadDiffusionModel", device="auto"),
    }
    capacity, CARD.capacity = CARD.capacity, 1000
    try:
        seen["auto without room"] = error_of(load, "LoadDiffusionModel", device="auto")
        _, report = load("LoadDiffusionModel", device="auto", allow_cpu=True)
        seen["cpu"] = {"device": report["device"], "reason": report["device_reason"]}
    finally:
        CARD.capacity = capacity
    clean()
    broken = BASE / "models" / "vae" / "broken.safetensors"
    broken.write_bytes(b"not a model")
    folder_paths.filename_list_cache.clear()
    error = "no error"
    try:
        run("LoadVAE", vae_name="broken.safetensors")
    except Exception as raised:  # whatever safetensors makes of it
        error = f"{type(raised).__name__}: {raised}"
    return seen | {"broken": error, "entries": [entry.name for entry in registry().entries()]}


def repeated() -> dict:
    """Live tensor bytes after each of many runs of each node."""
    seen = {}
    for name in (*LOADERS, "ApplyLoRA"):
        clean()
        base = load("LoadDiffusionModel", keep_loaded="keep")[0] if name == "ApplyLoRA" else None
        series = []
        for _ in range(RUNS):
            if base is None:
                result = load(name, keep_loaded="no")
            else:
                result = run(name, model=base, lora_name=FILES["lora"], strength_model=1.0)
            mm.load_models_gpu(patchers_of(result[:-1]))
            loaded = sum(resident().values())
            del result
            mm.unload_all_models()
            series.append(live_bytes())
        seen[name] = {"bytes": series, "loaded": loaded}
        del base
    clean()
    return seen


def main() -> None:
    CARD.capacity = 64_000_000
    count_reads()
    write_more_files()
    folder_paths.filename_list_cache.clear()
    results = {}
    for scenario in (schema, reads, clones, file_changed, strongest, wishes, offloaded, lora, refusals, repeated):
        started = time.monotonic()
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
        sys.stderr.write(f"{scenario.__name__}: {time.monotonic() - started:.1f} s\n")
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
