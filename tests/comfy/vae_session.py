"""Run by a real ComfyUI's Python, in its folder: what the tiled VAE nodes give, on small random VAEs.

    python vae_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line; the assertions are in test_vae.py. What is compared with is ComfyUI's own
`first_stage_model` on whole frames.
"""

from __future__ import annotations

import asyncio
import random
import sys
import types

import vae_host as host  # starts ComfyUI; what follows needs that

# isort: split
import execution
import small_vaes
import torch
from vae_host import (
    KINDS,
    apart,
    decode,
    encode,
    error_of,
    image,
    latents_of,
    native,
    nodes,
    pack,
    psnr,
    shown,
    vae_of,
)  # fmt: skip

CASES, REAL_CASES = 2000, 20


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
    drawn, vaes = random.Random(11), {kind: small_vaes.local_vae(kind) for kind in ("wan", "sd")}
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
    filled, report = encode(wide, image(1, 64, 64))
    found["filled"] = [list(filled.shape), report["notes"], report["mode"]]
    formatted = small_vaes.SMALL_VAES["sd"]()
    formatted.format_encoded = lambda latents: latents.unsqueeze(2)
    result, _ = encode(formatted, image(1, 64, 64))
    found["formatted"] = list(result.shape)
    single = small_vaes.wan_vae()
    single.not_video = True
    result, report = encode(single, image(3, 32, 32))
    found["single images"] = [list(result.shape), report["samples"]]
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
    found, exact, tolerance = {}, pack("nodes.vae.exact"), pack("nodes.vae.trial").TOLERANCE
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
    known, fresh = dict(tolerance), small_vaes.sd_vae()
    tolerance.clear()
    try:
        _, found["trial"] = decode(fresh, latents)
    finally:
        tolerance.update(known)
    strange = small_vaes.sd_vae()
    strange.first_stage_model.decoder.conv_out.padding_mode = "replicate"
    _, found["strange"] = decode(strange, latents)
    narrow = small_vaes.sd_vae()
    narrow.latent_channels = 8
    _, found["channels"] = decode(narrow, latents)
    half = small_vaes.wan_vae()
    for parameter in half.first_stage_model.encoder.parameters():
        parameter.data.fill_(float("nan"))
    _, found["no encoder"] = decode(half, latents_of("wan"))
    return found | {f"overflow {kind}": overflow(kind) for kind in ("sd", "wan")} | trial_without_memory()


def overflow(kind: str) -> dict:
    """A VAE in fp16 whose first layers give more than fp16 holds, as SDXL's do."""
    vae, latents = small_vaes.SMALL_VAES[kind](), latents_of(kind, 2, 9, 10)
    network = vae.first_stage_model.half()
    vae.vae_dtype = torch.float16
    first = network.decoder.conv_in if kind == "sd" else network.decoder.conv1
    first.weight.data = (first.weight.float() * 1e6).clamp(-6e4, 6e4).half()
    result, report = decode(vae, latents)
    weights = sorted({str(parameter.dtype) for parameter in network.parameters()})
    whole = native(types.SimpleNamespace(first_stage_model=network.float(), vae_dtype=torch.float32), "decode", latents)
    return {"report": report, "error": apart(result, shown(vae, whole)), "weights": weights}


def trial_without_memory() -> dict:
    """Memory runs out in the trial: always; once, with another model to unload; with on_oom error."""
    residency, latents, found = pack("patches.residency"), latents_of("wan"), {"unloaded": 0}
    unload = residency.unload_others

    def short_of(times: int):
        vae, left = small_vaes.wan_vae(), [times]
        whole = vae.first_stage_model.decode

        def short(z):
            if z.shape[-1] == 3 and left[0]:  # of the trial
                left[0] -= 1
                raise host.mm.OOM_EXCEPTION("scripted")
            return whole(z)

        vae.first_stage_model.decode = short
        return vae

    def unloaded(device, patchers) -> bool:
        found["unloaded"] += 1
        return True

    _, found["no memory"] = decode(short_of(9), latents)
    found["stopped"] = error_of(decode, short_of(1), latents, on_oom="error")
    residency.unload_others = unloaded
    try:
        found["room"] = decode(short_of(1), latents)[1]["mode"]
    finally:
        residency.unload_others = unload
    return found


host.tell(
    {
        **{f"whole {kind}": (lambda kind=kind: whole_frame(kind)) for kind in KINDS},
        "random": random_cases,
        **{f"random {kind}": (lambda kind=kind: random_real_cases(kind)) for kind in KINDS},
        "bad": bad_input, "sizes": frames_and_sizes, "others": other_ways, "workflows": workflows,
    }
)  # fmt: skip
