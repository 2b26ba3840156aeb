"""Run by a real ComfyUI's Python, in its folder: the tiled VAE nodes on small random VAEs.

    python comfyui_vae_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line; the assertions are in test_comfy_vae.py. What is compared with is ComfyUI's own
`first_stage_model` on whole frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import random
import sys
import traceback
import types
from pathlib import Path

PACK, BASE = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, os.getcwd())
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
import comfy.model_management as mm  # noqa: E402
import execution  # noqa: E402
import small_vaes  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

import nodes  # noqa: E402

CPU = torch.device("cpu")
CASES, REAL_CASES = 2000, 20
DEFAULTS = {"tile_size": 64, "overlap": 16, "mode": "auto", "memory_budget_gb": 2.0, "on_oom": "shrink"}
KINDS = ("wan", "sd", "flux")


def pack(module: str):
    return importlib.import_module(str(PACK).replace(".", "_x_") + "." + module)


def call(name: str, **inputs):
    """A node's value and report."""
    with torch.inference_mode():
        node = nodes.NODE_CLASS_MAPPINGS[f"SteadyVSR_VAE{name}Tiled"].PREPARE_CLASS_CLONE({})
        value, report = node.execute(**{**DEFAULTS, **inputs}).args
    return value["samples"] if name == "Encode" else value, json.loads(report)


def encode(vae, pixels, **inputs):
    return call("Encode", pixels=pixels, vae=vae, **inputs)


def decode(vae, latents, **inputs):
    return call("Decode", samples={"samples": latents}, vae=vae, **inputs)


def image(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """BHWC with coarse and fine parts, another one in each frame."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(count, 3, max(2, height // k), max(2, width // k), generator=generator) for k in (64, 8, 2)]
    shown = sum(F.interpolate(part, size=(height, width), mode="bilinear") for part in parts) / 3
    return shown.clamp(0, 1).movedim(1, -1)


def latents_of(kind: str, frames: int = 3, height: int = 12, width: int = 17, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = {"wan": (batch, 16, frames), "sd": (batch, 4), "flux": (batch, 16)}[kind]
    return torch.randn(*shape, height, width, generator=generator)


def native(vae, method: str, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return getattr(vae.first_stage_model, method)(x.to(vae.vae_dtype)).float()


def shown(vae, pixels: torch.Tensor) -> torch.Tensor:
    """What ComfyUI makes of a network's pixels."""
    with torch.inference_mode():
        pixels = vae.process_output(pixels.clone()).movedim(1, -1)
    return pixels.reshape(-1, *pixels.shape[-3:])


def apart(result: torch.Tensor, wanted: torch.Tensor) -> float:
    if result.shape != wanted.shape:
        return float("inf")
    return float((result - wanted).norm() / wanted.norm())


def psnr(result: torch.Tensor, wanted: torch.Tensor) -> float:
    spread = wanted.max() - wanted.min()
    return float(-10 * ((result - wanted).square().mean() / spread**2).clamp_min(1e-20).log10())


def error_of(function, *arguments, **keywords) -> str:
    try:
        function(*arguments, **keywords)
    except Exception as error:  # noqa: BLE001  whatever it is, the test compares its words
        return f"{type(error).__name__}: {error}"
    return "no error"


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


VAES: dict = {}


def vae_of(kind: str):
    if kind not in VAES:
        VAES[kind] = small_vaes.SMALL_VAES[kind]()
    return VAES[kind]


class Local(torch.nn.Module):
    """A network that treats every 8×8 block alone, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.largest = 0
        self.calls = 0

    def _look(self, x: torch.Tensor, unit: int) -> None:
        self.calls += 1
        self.largest = max(self.largest, unit * max(x.shape[-2:]))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self._look(x, 1)
        z = F.avg_pool3d(x[:, :, ::4], (1, 8, 8)) if x.ndim == 5 else F.avg_pool2d(x, 8)
        return torch.cat([z] * 6, 1)[:, :16] if x.ndim == 5 else torch.cat([z, z], 1)[:, :4]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        self._look(z, 8)
        x = z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return x.repeat_interleave(4, 2)[:, :, 3:] if z.ndim == 5 else x


def local_vae(kind: str):
    vae = small_vaes.SMALL_VAES[kind]()
    vae.first_stage_model = Local()
    vae.patcher = type(vae.patcher)(vae.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    return vae


def whole_frame(kind: str) -> dict:
    """Encode and decode beside the network's own result on whole frames, and beside ComfyUI's own tiled nodes."""
    vae, found = vae_of(kind), {}
    pixels = image(9 if kind == "wan" else 2, 100, 137)
    cropped = pixels[:, 2:98, :136].movedim(-1, 1)
    cropped = cropped.movedim(1, 0).unsqueeze(0) if kind == "wan" else cropped
    whole = native(vae, "encode", cropped * 2 - 1)
    latents = latents_of(kind, batch=1 if kind == "wan" else 2)
    frames = shown(vae, native(vae, "decode", latents))
    with torch.inference_mode():
        stock = {
            "encode": nodes.VAEEncodeTiled().encode(vae, pixels, 64, 16)[0]["samples"],
            "decode": nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 64, 16)[0],
        }
    for method, run, source, wanted in (("encode", encode, pixels, whole), ("decode", decode, latents, frames)):
        for mode in ("auto", "blend"):
            result, report = run(vae, source, mode=mode)
            found[f"{method} {mode}"] = {
                "error": apart(result, wanted), "psnr": psnr(result, wanted), "stock_psnr": psnr(stock[method], wanted),
                "shape": list(result.shape), "stock_shape": list(stock[method].shape),
                "dtype": str(result.dtype) == str(stock[method].dtype),
                "report": report,
            }  # fmt: skip
    return found


def random_cases() -> dict:
    """Random sizes, tiles and overlaps through both nodes, with a spy in the place of the network."""
    drawn, vaes = random.Random(11), {kind: local_vae(kind) for kind in ("wan", "sd")}
    # Reading the memory of a process takes longer than these networks.
    pack("memory.probe").current()
    state = vars(sys.modules["steadyvsr_state"])
    reader, state["probe"] = state["probe"], pack("memory.probe").ScriptedProbe(pack("memory.reading").Reading)
    try:
        return random_cases_on(drawn, vaes)
    finally:
        state["probe"] = reader


def random_cases_on(drawn: random.Random, vaes: dict) -> dict:
    found = {"cases": 0, "refused": {}, "wrong": [], "seen_too_much": [], "calls": 0, "tiled": 0, "clamped": 0}
    for _ in range(CASES):
        kind = drawn.choice(["wan", "sd"])
        vae, network = vaes[kind], vaes[kind].first_stage_model
        batch, frames = drawn.choice([1, 1, 2]), drawn.choice([1, 1, 2, 4, 5, 9, 10, 13])
        height, width = drawn.randint(1, 130), drawn.randint(1, 130)
        tile = drawn.choice([0, 32, 64, 64, 96, 128, 512, 1024])
        overlap = drawn.choice([-8, 0, 8, 16, 40, 64, 256, 4096])
        encodes, mode = drawn.random() < 0.5, drawn.choice(["auto", "blend"])
        options = {"tile_size": tile, "overlap": overlap, "mode": mode}
        network.largest, network.calls = 0, 0
        found["cases"] += 1
        rows, columns = height // 8, width // 8
        kept = 4 * ((frames + 3) // 4) - 3
        try:
            if encodes:
                count = frames if kind == "wan" else batch
                result, report = encode(vae, torch.rand(count, height, width, 3), **options)
                time = [(frames + 3) // 4] if kind == "wan" else []
                wanted = [1 if kind == "wan" else batch, 16 if kind == "wan" else 4, *time, rows, columns]
            else:
                rows, columns = max(1, rows), max(1, columns)
                shape = (batch, 16, (frames + 3) // 4) if kind == "wan" else (batch, 4)
                result, report = decode(vae, torch.randn(*shape, rows, columns), **options)
                wanted = [batch * (kept if kind == "wan" else 1), 8 * rows, 8 * columns, 3]
        except ValueError as error:
            key = str(error).partition("expected ")[2].partition(";")[0].split(" to")[0][:40]
            found["refused"][key] = found["refused"].get(key, 0) + 1
            allowed = overlap < 0 or tile == 32 or (encodes and min(height, width) < 8)
            if not allowed or "; got " not in str(error):
                found["wrong"].append([kind, encodes, height, width, tile, overlap, str(error)])
            continue
        if list(result.shape) != wanted or not result.isfinite().all():
            found["wrong"].append([kind, encodes, height, width, tile, overlap, list(result.shape), wanted])
        if network.largest > min(tile or 512, 512):
            found["seen_too_much"].append([kind, encodes, height, width, tile, overlap, network.largest])
        found["calls"] += network.calls
        found["tiled"] += report["units"] > 1
        found["clamped"] += any("overlap" in note for note in report["notes"])
    return found


def random_real_cases(kind: str) -> dict:
    """Random sizes and tiles through the exact path, beside the network on the whole frame."""
    drawn, vae, worst, cases = random.Random(3), vae_of(kind), 0.0, 0
    for _ in range(REAL_CASES):
        frames = drawn.choice([1, 2, 3, 5, 6]) if kind == "wan" else 1
        rows, columns = drawn.randint(1, 9), drawn.randint(1, 9)
        tile = drawn.choice([64, 96, 0])
        if drawn.random() < 0.5:
            pixels = image(frames, 8 * rows, 8 * columns, seed=cases)
            x = pixels[: 4 * ((frames + 3) // 4) - 3].movedim(-1, 1)
            x = x.movedim(1, 0).unsqueeze(0) if kind == "wan" else x
            result, report = encode(vae, pixels, tile_size=tile)
            wanted = native(vae, "encode", x * 2 - 1)
        else:
            latents = latents_of(kind, (frames + 3) // 4, rows, columns, seed=cases)
            result, report = decode(vae, latents, tile_size=tile)
            wanted = shown(vae, native(vae, "decode", latents))
        if report["mode"] != "exact":
            raise AssertionError(report["mode_reason"])
        worst, cases = max(worst, apart(result, wanted)), cases + 1
    return {"cases": cases, "worst": worst}


class Card(TorchDispatchMode):
    """Fails the third new storage of a tile that does not fit."""

    def __init__(self, fits) -> None:
        super().__init__()
        self.fits, self.made = fits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage()._cdata not in given for x in made):
            self.made += 1
            if self.made > 2 and not self.fits():
                self.made = 0
                raise mm.OOM_EXCEPTION("scripted")
        return result


@contextlib.contextmanager
def card(fits):
    """Both nodes under a card on which a tile fits only where `fits(job)`."""
    run = pack("nodes.vae_run")
    make, jobs = run.TiledRun._ladder, []

    def ladder(self, job, *arguments):
        made = make(self, job, *arguments)
        around = made.around

        def tried(compute):
            jobs.append((job.done, job.tile, str(job.dtype)))

            def checked():
                with Card(lambda: fits(job)):
                    compute()

            around(checked)

        made.around = tried
        return made

    run.TiledRun._ladder = ladder
    try:
        yield jobs
    finally:
        run.TiledRun._ladder = make


def scripted_oom(kind: str) -> dict:
    """One failure at each of several tiles; then cards on which only small tiles, small numbers, or nothing fits."""
    vae, found = vae_of(kind), {"at": []}
    latents = latents_of(kind, 2, 12, 14)
    for mode in ("auto", "blend"):
        wanted, calm = decode(vae, latents, mode=mode)
        units = calm["units"]
        for at in sorted({0, 1, units // 2, units - 1} if kind != "flux" else {2}):
            failed = []

            def fits(job, at=at, failed=failed):
                if job.done == at and not failed:
                    failed.append(at)
                    return False
                return True

            mm.load_models_gpu([vae_of("taesd").patcher])
            with card(fits) as jobs:
                result, report = decode(vae, latents, mode=mode)
            found["at"].append(
                {"mode": mode, "at": at, "failed": len(failed), "tries": len(jobs), "units": units,
                 "error": apart(result, wanted), "attempts": report["attempts"]}
            )  # fmt: skip
        before = live_bytes()
        for name, rule in {
            "tile": lambda job: job.tile <= 64,
            "dtype": lambda job: job.dtype == torch.bfloat16,
            "nothing": lambda job: False,
        }.items():
            mm.load_models_gpu([vae_of("taesd").patcher])
            with card(rule):
                if name == "nothing":
                    found[f"{mode} {name}"] = {"error": error_of(decode, vae, latents, tile_size=128, mode=mode)}
                    continue
                result, report = decode(vae, latents, tile_size=128, overlap=32, mode=mode)
            calm, _ = decode(vae, latents, tile_size=64, overlap=32, mode=mode)
            found[f"{mode} {name}"] = {
                "rungs": [item["tried"] for item in report["attempts"]], "error": apart(result, calm),
                "tile": report["tile_size"], "dtype": report["dtype"], "attempts": report["attempts"],
            }  # fmt: skip
        del result
        found[f"{mode} held"] = live_bytes() - before
    return found


def ladder_alone() -> dict:
    """Every rung in order, on a job of which nothing fits, and what is said of a device that is no CPU."""
    ladders = pack("nodes.tile_ladder")

    class Job:
        device, dtype, tile, done, total = torch.device("meta"), torch.float32, 256, 0, 1

        def advance(self, on_step):
            raise mm.OOM_EXCEPTION("scripted")

        def cut(self, tile):
            self.tile = tile

    def ladder(shrink=True, allow_cpu=True, raises=None):
        others, prepared = [True], []
        job = Job()
        if raises is not None:
            job.advance = lambda on_step: (_ for _ in ()).throw(raises)
        made = ladders.TileLadder(
            "Node", job, lambda compute: compute(), ladders.smaller_tiles(256, 480, 64), torch.bfloat16, allow_cpu,
            shrink, lambda: bool(others) and others.pop(), lambda *place: prepared.append([str(p) for p in place]),
            lambda: 1 << 20,
        )  # fmt: skip
        return made, prepared

    made, prepared = ladder()
    words = error_of(made.advance, lambda: None)
    no_cpu, _ = ladder(allow_cpu=False)
    stopped, _ = ladder(shrink=False)
    other, _ = ladder(raises=RuntimeError("shape"))
    return {
        "rungs": [item.tried for item in made.attempts], "prepared": prepared, "words": words,
        "no_cpu": [item.tried for item in no_cpu.attempts] if error_of(no_cpu.advance, lambda: None) else [],
        "no_cpu_words": error_of(ladder(allow_cpu=False)[0].advance, lambda: None),
        "stopped": error_of(stopped.advance, lambda: None), "stopped_rungs": [i.tried for i in stopped.attempts],
        "other": error_of(other.advance, lambda: None), "other_rungs": [i.tried for i in other.attempts],
        "sides": {str(t): ladders.smaller_tiles(t, 2000, 64) for t in (64, 96, 256, 512)},
        "small_image": ladders.smaller_tiles(512, 100, 64),
    }  # fmt: skip


def not_a_number(kind: str) -> dict:
    """A VAE in bf16 whose network gives NaN in bf16 at one call; then in every number format."""
    vae, latents = small_vaes.SMALL_VAES[kind](), latents_of(kind, 1, 12, 14)
    vae.first_stage_model.to(torch.bfloat16)
    vae.vae_dtype = torch.bfloat16
    calm, _ = decode(vae, latents, mode="blend")
    calls, state = [], {"always": False}

    def spoil(module, args, output):
        calls.append(args[0].dtype)
        bad = (len(calls) == 2 and args[0].dtype == torch.bfloat16) or state["always"]
        return output * float("nan") if bad else output

    handle = vae.first_stage_model.decoder.register_forward_hook(spoil)
    if kind == "wan":
        handle.remove()
        whole = vae.first_stage_model.decode

        def decode_all(z):
            return spoil(None, (z,), whole(z))

        vae.first_stage_model.decode = decode_all
    result, report = decode(vae, latents, mode="blend")
    weights = {str(parameter.dtype) for parameter in vae.first_stage_model.parameters()}
    state["always"] = True
    words = error_of(decode, vae, latents, mode="blend")
    return {
        "dtypes": [str(dtype) for dtype in calls[:4]], "notes": report["notes"],
        "finite": bool(result.isfinite().all()),
        "error": apart(result, calm), "weights_after": sorted(weights), "words": words,
    }  # fmt: skip


def bad_input() -> dict:
    sd, wan = vae_of("sd"), vae_of("wan")
    latents, pixels = latents_of("sd"), image(1, 64, 64)
    audio = small_vaes.SMALL_VAES["sd"]()
    audio.latent_dim = 1
    cracked = small_vaes.SMALL_VAES["sd"]()
    cracked.extra_1d_channel = 16
    empty = small_vaes.SMALL_VAES["sd"]()
    empty.first_stage_model = None
    foreign = types.SimpleNamespace(encode=lambda pixels: pixels.movedim(-1, 1), decode=lambda z: z.movedim(1, -1))
    owned, asked = small_vaes.SMALL_VAES["sd"](), []
    owned.handles_tiling = True

    def tiled(samples, **arguments):
        asked.append(arguments)
        return samples.movedim(1, -1)

    owned.decode_tiled = tiled
    foreign_image, foreign_report = decode(foreign, torch.rand(1, 3, 8, 8))
    _, owned_report = decode(owned, latents, overlap=400)
    _, clamped = decode(sd, latents, overlap=60, mode="blend")
    _, large = decode(sd, latents, tile_size=1024)
    nested = types.SimpleNamespace(is_nested=True, unbind=lambda: [latents])
    _, of_nested = decode(sd, nested)
    still, of_still = decode(wan, latents_of("wan")[:, :, 0])
    flat, of_flat = decode(sd, latents.unsqueeze(2))
    return {
        "channels": error_of(decode, sd, torch.rand(1, 16, 8, 8)),
        "channels wan": error_of(decode, wan, torch.rand(1, 4, 1, 8, 8)),
        "audio": error_of(decode, audio, latents), "audio_2": error_of(encode, cracked, pixels),
        "no weights": error_of(encode, empty, pixels),
        "empty batch": error_of(encode, sd, torch.zeros(0, 64, 64, 3)),
        "empty latents": error_of(decode, sd, torch.zeros(0, 4, 8, 8)),
        "empty foreign": error_of(decode, foreign, torch.zeros(0, 4, 8, 8)),
        "grey": error_of(encode, sd, torch.rand(1, 64, 64, 1)),
        "too small": error_of(encode, sd, torch.rand(1, 7, 64, 3)),
        "video in image VAE": error_of(encode, sd, torch.rand(1, 5, 64, 64, 3)),
        "negative overlap": error_of(decode, sd, latents, overlap=-8),
        "negative budget": error_of(decode, sd, latents, memory_budget_gb=-1.0),
        "small tile": error_of(decode, sd, latents, tile_size=32),
        "mode": error_of(decode, sd, latents, mode="fast"),
        "exact": error_of(decode, vae_of("taesd"), latents, mode="exact"),
        "exact owned": error_of(decode, owned, latents, mode="exact"),
        "nan pixels": error_of(encode, sd, pixels * float("nan"), mode="blend"),
        "foreign": [list(foreign_image.shape), foreign_report], "owned": [asked[-1], owned_report],
        "clamped": [clamped["overlap"], clamped["notes"]], "large tile": [large["tile_size"], large["notes"]],
        "nested": of_nested["notes"],
        "still": [list(still.shape), of_still["notes"]], "flat": [list(flat.shape), of_flat["notes"]],
    }  # fmt: skip


def frames_and_sizes() -> dict:
    """What is trimmed, cropped, padded, filled or dropped, and said."""
    wan, sd, found = vae_of("wan"), vae_of("sd"), {}
    for frames in (1, 2, 4, 5, 7, 10):
        result, report = encode(wan, image(frames, 32, 32))
        found[f"frames {frames}"] = [list(result.shape), report["frames"], report["notes"]]
    clips, report = encode(wan, image(10, 32, 32).reshape(2, 5, 32, 32, 3))
    found["clips"] = [list(clips.shape), report["notes"]]
    padded, report = encode(sd, image(1, 60, 70), odd_size="pad")
    found["pad"] = [list(padded.shape), report["notes"]]
    alpha, report = encode(sd, torch.cat([image(1, 64, 64), torch.ones(1, 64, 64, 1)], -1))
    plain, _ = encode(sd, image(1, 64, 64))
    found["alpha"] = [apart(alpha, plain), report["notes"]]
    wide = small_vaes.SMALL_VAES["sd"]()
    wide.first_stage_model.encoder.conv_in = torch.nn.Conv2d(4, 32, 3, padding=1)
    wide.output_channels, wide.pad_channel_value = 4, 1.0
    filled, report = encode(wide, image(1, 64, 64), mode="blend")
    found["filled"] = [list(filled.shape), report["notes"]]
    formatted = small_vaes.SMALL_VAES["sd"]()
    formatted.format_encoded = lambda latents: latents.unsqueeze(2)
    result, _ = encode(formatted, image(1, 64, 64))
    found["formatted"] = list(result.shape)
    single = small_vaes.wan_vae()
    single.not_video = True
    result, report = encode(single, image(3, 32, 32))
    found["single images"] = [list(result.shape), report["samples"]]
    return found


def memory() -> dict:
    """The books and the report: what is asked of ComfyUI, what is measured, and when it counts as verified."""
    probe, tracker = pack("memory.probe"), pack("memory.tracker").StorageTracker
    vae, latents, found, asked = vae_of("sd"), latents_of("sd", height=24, width=32), {}, []
    load = mm.load_models_gpu

    def loads(models, memory_required=0, **more):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    mm.load_models_gpu = loads
    try:
        for mode in ("auto", "blend"):
            asked.clear()
            with probe.tracking(tracker()) as counted:
                result, report = decode(vae, latents, mode=mode)
                found[mode] = {"report": report, "own_peak": counted.peak, "asked": list(asked)}
            found[mode]["whole"] = vae.memory_used_decode(latents.shape, vae.vae_dtype)
            found[mode]["tile"] = vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype)
        with probe.tracking(tracker()):
            _, found["tight"] = decode(vae, latents, memory_budget_gb=0.017)
        _, found["unmeasured"] = decode(vae, latents)
        with probe.tracking(tracker()):
            _, found["auto tile"] = decode(vae, latents, tile_size=0, memory_budget_gb=0.06, mode="blend")
            _, found["shrunk"] = decode(vae, latents, tile_size=192, memory_budget_gb=0.025, mode="blend")
            _, found["roomy"] = decode(vae, latents, tile_size=0, mode="blend")
        kept, original = [], vae.process_output

        def leaks(image):
            kept.append(torch.ones(8 << 20))
            return original(image)

        vae.process_output = leaks
        with probe.tracking(tracker()):
            _, found["leak"] = decode(vae, latents, mode="blend")
        vae.process_output = original
    finally:
        mm.load_models_gpu = load
    del result
    return found


class SmallVAE:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": ("STRING", {})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "get", "test"

    def get(self, kind):
        return (vae_of(kind),)


class Sink:
    seen: list = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "image": ("IMAGE",)}}

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

    def take(self, latent, image):
        Sink.seen.append([list(latent["samples"].shape), list(image.shape), str(image.dtype), image.device.type])
        return {}


def workflows() -> dict:
    """A workflow of the stock tiled nodes, and the same with nothing but the types of the two replaced."""
    nodes.NODE_CLASS_MAPPINGS.update({"Test_SmallVAE": SmallVAE, "Test_Sink": Sink})
    server = types.SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    arguments = {"cache_type": execution.CacheType.CLASSIC}
    if hasattr(execution.CacheType, "RAM_PRESSURE"):  # 0.33
        arguments["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    executor, found = execution.PromptExecutor(server, **arguments), {}
    sizes = {"tile_size": 1024, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    for kind in ("wan", "sd"):
        for own in ("", "SteadyVSR_"):
            prompt = {
                "1": {"class_type": "Test_SmallVAE", "inputs": {"kind": kind}},
                "2": {"class_type": "EmptyImage",
                      "inputs": {"width": 136, "height": 100, "batch_size": 6, "color": 0x406080}},
                "3": {"class_type": f"{own}VAEEncodeTiled", "inputs": {"pixels": ["2", 0], "vae": ["1", 0], **sizes}},
                "4": {"class_type": f"{own}VAEDecodeTiled", "inputs": {"samples": ["3", 0], "vae": ["1", 0], **sizes}},
                "5": {"class_type": "Test_Sink", "inputs": {"latent": ["3", 0], "image": ["4", 0]}},
            }  # fmt: skip
            Sink.seen.clear()
            valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
            if not valid:
                raise AssertionError(f"{error} {node_errors}")
            executor.execute(prompt, "test", {}, outputs)
            failed = dict(executor.status_messages).get("execution_error")
            found[f"{kind} {own}"] = list(Sink.seen) if failed is None else failed["exception_message"]
    return found


def other_ways() -> dict:
    """A VAE with four positions in one latent; too little RAM for the exact path; a network that does not pass."""
    found, exact, image_network = {}, pack("nodes.vae_exact"), pack("nodes.image_network")
    vae = small_vaes.flux2_vae()
    if vae is not None:
        pixels = image(1, 128, 160)
        whole = native(vae, "encode", pixels.movedim(-1, 1) * 2 - 1)
        latents, of_latents = encode(vae, pixels)
        frames, of_frames = decode(vae, whole)
        found["flux2"] = [
            [apart(latents, whole), of_latents["mode"], list(latents.shape)],
            [apart(frames, shown(vae, native(vae, "decode", whole))), of_frames["mode"], list(frames.shape)],
        ]
    latents, share, exact.RAM_SHARE = latents_of("sd"), exact.RAM_SHARE, 1e-9
    try:
        _, found["little RAM"] = decode(vae_of("sd"), latents)
    finally:
        exact.RAM_SHARE = share
    known, fresh = dict(image_network.TOLERANCE), small_vaes.sd_vae()
    image_network.TOLERANCE.clear()
    try:
        _, found["trial"] = decode(fresh, latents)
    finally:
        image_network.TOLERANCE.update(known)
    strange = small_vaes.sd_vae()
    strange.first_stage_model.decoder.conv_out.padding_mode = "replicate"
    _, found["strange"] = decode(strange, latents)
    return found


def interrupts() -> dict:
    """An interrupt in the middle, and an error that has nothing to do with memory: both pass, and nothing stays."""
    found = {}
    for kind in KINDS:
        vae, latents = vae_of(kind), latents_of(kind, 2)
        for mode in ("auto", "blend"):
            decode(vae, latents, mode=mode)
            before, count = live_bytes(), [0]
            ask = mm.throw_exception_if_processing_interrupted

            def stop(count=count):
                count[0] += 1
                if count[0] == 3:
                    raise mm.InterruptProcessingException()

            mm.throw_exception_if_processing_interrupted = stop
            name = "none"
            try:
                decode(vae, latents, mode=mode)
            except BaseException as error:  # noqa: BLE001  in 0.33 an interrupt is a BaseException
                name = type(error).__name__
            finally:
                mm.throw_exception_if_processing_interrupted = ask
            hooks = [m for m in vae.first_stage_model.modules() if m._forward_hooks or m._forward_pre_hooks]
            found[f"{kind} {mode}"] = {"error": name, "held": live_bytes() - before, "hooks": len(hooks)}
    return found


def main() -> dict:
    if not asyncio.run(nodes.load_custom_node(str(PACK))):
        raise SystemExit("the pack did not load")
    scenarios = {
        **{f"whole {kind}": (lambda kind=kind: whole_frame(kind)) for kind in KINDS},
        "random": random_cases,
        **{f"random {kind}": (lambda kind=kind: random_real_cases(kind)) for kind in KINDS},
        **{f"oom {kind}": (lambda kind=kind: scripted_oom(kind)) for kind in KINDS},
        "ladder": ladder_alone,
        **{f"nan {kind}": (lambda kind=kind: not_a_number(kind)) for kind in ("wan", "sd")},
        "bad": bad_input, "sizes": frames_and_sizes, "memory": memory, "others": other_ways, "workflows": workflows,
        "interrupts": interrupts,
    }  # fmt: skip
    found = {}
    for name, scenario in scenarios.items():
        if not ONLY or any(word in name for word in ONLY):
            try:
                found[name] = scenario()
            except BaseException:  # noqa: BLE001  told by the test that needs it
                found[name] = {"error": traceback.format_exc()[-3000:]}
    return found


ONLY = [word for word in os.environ.get("STEADYVSR_SCENARIOS", "").split(",") if word]
sys.stdout.write("\n" + json.dumps(main()) + "\n")
