"""The FlashVSR nodes worked through the states that matter."""

from __future__ import annotations

import gc
import inspect
import io as bytes_io
import json
import weakref
from fractions import Fraction
from pathlib import Path

import av
import comfy.utils
import folder_paths
import host  # starts ComfyUI; what follows needs that
import small_vaes
import tiny_flashvsr
import torch
from comfy.latent_formats import Wan21
from comfy_api.v0_0_2 import InputImpl, Types
from host import BASE, CPU, NODES, call, digest, error_of, executed, listed, live_bytes, mm, node, pack
from steadyvsr.tests.comfy.server import write_clip

STREAM = {
    "scale": 4.0, "seed": 3, "sparse_ratio": 2.0, "kv_ratio": 3.0, "local_range": 11,
    "colour": "adain", "decoder": "tc",
}  # fmt: skip
LOAD = {
    "version": "auto", "precision": "auto", "device": "auto", "attention": "auto", "lq_cache_order": "fixed",
    "download": False,
}  # fmt: skip


def upscale(model, frames, **changes):
    image, report = call("Upscale", flashvsr=model, image=frames, **{**STREAM, **changes})
    return image, json.loads(report)


def clip(count: int = 10, height: int = 32, width: int = 48, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(count))


def tiny_model(**changes):
    return call("LoadFlashVSR", model_set="tiny.safetensors", **{**LOAD, **changes})[0]


def required(node) -> list[str]:
    """Inputs that a prompt has to have, as ComfyUI tells its pages; the double has its schema alone."""
    if host.ON_DOUBLE:
        return [item.id for item in node.define_schema().inputs if not item.optional]
    return list(node.GET_NODE_INFO_V1()["input"]["required"])


def schema() -> dict:
    seen = {}
    for name in ("LoadFlashVSR", "Upscale", "UpscaleVideo"):
        declared = node(name).define_schema()
        parameters = list(inspect.signature(node(name).execute).parameters)
        seen[name] = {
            "inputs": [item.id for item in declared.inputs],
            "parameters": parameters,
            "without_tooltip": [item.id for item in [*declared.inputs, *declared.outputs] if not item.tooltip],
            "category": declared.category,
            "info": required(node(name)),
        }
    return seen


def model_folder() -> dict:
    register = pack("nodes.flashvsr.model_sets").register_model_folder
    before = folder_paths.get_folder_paths("flashvsr")
    register()
    return {
        "before": before,
        "after": folder_paths.get_folder_paths("flashvsr"),
        "choices": pack("nodes.flashvsr.model_sets").choices(),
    }


def residency() -> dict:
    """Nothing → a run → free_memory → the same run, with the books of ComfyUI read in between and during."""
    mm.unload_all_models()
    model, frames = tiny_model(), clip()
    during = []
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: during.append(listed()))
    try:
        seen = {"before": listed(), "loaded_sizes_before": [p.loaded_size() for p in model.patchers()]}
        first, report = upscale(model, frames)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    seen |= {
        "during": during,
        "after": listed(),
        "report": report,
        "model_sizes": [p.model_size() for p in model.patchers()],
    }
    mm.free_memory(1e30, CPU)
    seen |= {"freed": listed(), "loaded_sizes_freed": [p.loaded_size() for p in model.patchers()]}
    second, _ = upscale(model, frames)
    return seen | {"again": listed(), "first": digest(first), "second": digest(second), "shape": list(first.shape)}


def kept() -> dict:
    """Load and keep → all users gone → load again → load without keeping → all users gone → load again."""
    loaded_module, owners = pack("nodes.flashvsr.model"), pack("patches.kept")
    read, reads = loaded_module.load_flashvsr, []

    def counted(*arguments, **keywords):
        reads.append(1)
        return read(*arguments, **keywords)

    loaded_module.load_flashvsr = counted
    try:
        model = tiny_model(keep_loaded="keep")
        first, _ = upscale(model, clip())
        module, counts = weakref.ref(model.transformer.model), {"first": len(reads)}
        del model
        mm.unload_all_models()
        gc.collect()
        alive = {"kept": module() is not None}
        policies = [owners.registry().entries()[-1].policy]
        model = tiny_model(keep_loaded="keep")
        counts["again"] = len(reads)
        again, _ = upscale(model, clip())
        model = tiny_model(keep_loaded="no")
        counts["after_no"] = len(reads)
        policies.append(owners.registry().entries()[-1].policy)
        del model
        mm.unload_all_models()
        gc.collect()
        alive["after_no"] = module() is not None
        tiny_model()
        counts["anew"] = len(reads)
    finally:
        loaded_module.load_flashvsr = read
    return {"reads": counts, "alive": alive, "policies": policies, "same_frames": digest(first) == digest(again)}


def partial_load() -> dict:
    """The engine on networks of which ComfyUI has loaded no layer, against the same fully loaded."""
    if host.ON_DOUBLE:
        return {"state": None}  # it loads networks whole
    model, frames = tiny_model(), clip()
    full, _ = upscale(model, frames)
    mm.free_memory(1e30, CPU)
    for patcher in model.patchers():
        patcher.load(CPU, lowvram_model_memory=64)
    state = [
        {"lowvram": p.model.model_lowvram, "loaded": p.loaded_size(), "size": p.model_size()} for p in model.patchers()
    ]
    options = pack("models.flashvsr").StreamOptions(seed=STREAM["seed"])
    with torch.inference_mode():
        stream = pack("models.flashvsr").upscale_frames(
            model.networks(), list(frames), options, device=CPU, dtype=model.dtype
        )
        partial = torch.stack(list(stream))
    for patcher in model.patchers():
        patcher.detach()
    return {"state": state, "full": digest(full), "partial": digest(partial)}


def interrupted() -> dict:
    """A run that the user cancels, what it leaves, and the run after it."""
    model, frames = tiny_model(), clip(30)
    whole, _ = upscale(model, frames)
    wanted = digest(whole)
    del whole
    before = live_bytes()
    calls, during = [], []

    def hook(value, total, preview, **_):
        calls.append((value, total, preview and [preview[0], list(preview[1].size), preview[2]]))
        if value >= 13 and not during:
            during.append(live_bytes())
            mm.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    raised = None
    try:
        upscale(model, frames)
    except BaseException as error:  # noqa: B036  an interrupt is no Exception in newer versions
        raised = type(error).__name__
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    after = live_bytes()
    again, _ = upscale(model, frames)
    return {
        "raised": raised, "calls": calls, "before": before, "during": during, "after": after, "wanted": wanted,
        "again": digest(again),
    }  # fmt: skip


def short_at_the_start() -> dict:
    """The device is out of memory while ComfyUI loads the weights: once, and every time."""
    model, frames = tiny_model(), clip()
    undisturbed, _ = upscale(model, frames)
    load, calls, fails = mm.load_models_gpu, [], 1

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) <= fails:
            raise mm.OOM_EXCEPTION("planted: out of memory")
        return load(*arguments, **keywords)

    mm.load_models_gpu = failing
    try:
        recovered, report = upscale(model, frames)
        fails = 1000
        error = error_of(upscale, model, frames)
    finally:
        mm.load_models_gpu = load
    memory = report["memory"]
    return {"same": torch.equal(recovered, undisturbed), "attempts": memory["attempts"], "error": error}


def images() -> dict:
    """What else an IMAGE can be."""
    model, frames = tiny_model(), clip(3)
    plain, _ = upscale(model, frames)
    with_alpha, alpha_report = upscale(model, torch.cat([frames, torch.zeros_like(frames[..., :1])], -1))
    grey, grey_report = upscale(model, frames[..., :1])
    as_rgb, _ = upscale(model, frames[..., :1].repeat(1, 1, 1, 3))
    spoiled = frames.clone()
    spoiled[1, 4, 5, 0] = float("nan")
    return {
        "plain": digest(plain), "alpha": digest(with_alpha), "alpha_notes": alpha_report["notes"], "grey": digest(grey),
        "grey_as_rgb": digest(as_rgb), "grey_notes": grey_report["notes"],
        "odd": list(upscale(model, frames, scale=1.3)[0].shape),
        "nan": error_of(upscale, model, spoiled), "empty": error_of(upscale, model, frames[:0]),
        "five_channels": error_of(upscale, model, torch.rand(1, 32, 48, 5)),
        "small": error_of(upscale, model, torch.rand(1, 8, 48, 3)),
    }  # fmt: skip


def growth() -> dict:
    """Peak of live tensors made in a run of the IMAGE node, at two lengths; the input is there before."""
    model, peaks = tiny_model(), {}
    upscale(model, clip(1))
    weights = [p for network in model.patchers() for p in network.model.parameters()]
    for count in (37, 101):
        frames = clip(count)
        with pack("memory.tracker").StorageTracker(exclude=[*weights, model.prompt, frames]) as tracker:
            result, report = upscale(model, frames)
        peaks[str(count)] = {
            "peak": tracker.peak,
            "output": result.numel() * result.element_size(),
            "estimate": report["memory"]["predicted"]["activations_bytes"],
        }
    return peaks


def loader_errors() -> dict:
    load = lambda name: call("LoadFlashVSR", model_set=name, **LOAD)  # noqa: E731
    return {
        "unknown": error_of(load, "../../secret"),
        "official": error_of(load, "FlashVSR-v1.1"),
        "broken": error_of(load, "broken"),
    }


def vae_decoder() -> dict:
    vae, model = small_vaes.wan_vae(), tiny_model()
    streaming = pack("nodes.flashvsr.wan_decoder").StreamingWanVAE(vae, "test")
    latents = torch.randn(1, 16, 10, 4, 6, generator=torch.Generator().manual_seed(1))
    streamed = {}
    with torch.inference_mode():
        mm.load_models_gpu([vae.patcher])
        whole = vae.first_stage_model.decode(Wan21().process_out(latents))
        for split in ((6, 2, 2), (1,) * 10, (10,)):
            cache = streaming.new_cache()
            parts = [streaming.decode_stream(part, cache) for part in latents.split(split, 2)]
            streamed[str(split)] = (torch.cat(parts, 2) - whole).abs().max().item()
        wide = torch.randn(1, 16, 2, 2, 70, generator=torch.Generator().manual_seed(2))
        cache = streaming.new_cache(CPU)
        parts = torch.cat([streaming.decode_stream(part, cache) for part in wide.split(1, 2)], 2)
        native = vae.first_stage_model.decode(Wan21().process_out(wide))
        streamed[f"{len(cache.tiles)} tiles"] = (parts - native).abs().max().item()
    mm.free_memory(1e30, CPU)
    frames, report = upscale(model, clip(), decoder="vae", vae=vae)
    after = listed()
    return {
        "streamed": streamed, "size": whole.abs().mean().item(), "listed": after, "shape": list(frames.shape),
        "decoder": report["decoder"], "differs": digest(frames) != digest(upscale(model, clip())[0]),
        "none": error_of(upscale, model, clip(), decoder="vae"),
        "other": error_of(upscale, model, clip(), decoder="vae", vae=small_vaes.sd_vae()),
    }  # fmt: skip


def described(path: str) -> dict:
    """What a video file holds, read with PyAV alone."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
        seen = {"size": [stream.width, stream.height], "frames": len(times), "times": times, "pixels": stream.pix_fmt}
    with av.open(path) as container:
        samples = (
            sum(frame.samples for frame in container.decode(container.streams.audio[0]))
            if container.streams.audio
            else 0
        )
    return seen | {"samples": samples}


def spoiled_clip(path: Path) -> str:
    """Twelve frames; the data of frame 9 are zeros. The file is whole, so that only decoding finds the damage."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"g": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in clip(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray((frame * 255).byte().numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][9])
    path.write_bytes(path.read_bytes().replace(packet, bytes(len(packet))))
    return str(path)


def videos() -> dict:
    """A VIDEO as a path, in memory, trimmed, and as tensors with sound."""
    model, path = tiny_model(), str(BASE / "input" / "clip.mp4")
    temp = Path(folder_paths.get_temp_directory())

    def through(video, **changes):
        result, report = call("UpscaleVideo", flashvsr=model, video=video, **{**STREAM, **changes})
        source = result.get_stream_source()
        return described(source) | {"folder": str(Path(source).parent), "notes": json.loads(report)["notes"]}

    rate = 16_000
    wave = torch.sin(torch.arange(rate * 3) * 0.1)[None, None].repeat(1, 2, 1)
    components = Types.VideoComponents(
        images=clip(10), audio={"waveform": wave, "sample_rate": rate}, frame_rate=Fraction(10)
    )
    seen = {
        "temp": str(temp),
        "source": described(path),
        "path": through(InputImpl.VideoFromFile(path)),
        "memory": through(InputImpl.VideoFromFile(bytes_io.BytesIO(Path(path).read_bytes()))),
        "components": through(InputImpl.VideoFromComponents(components)),
        "odd": through(InputImpl.VideoFromFile(path), scale=1.4),
    }
    seen["results of finished runs"] = left = len(list(temp.glob("steadyvsr_*")))
    (result, _), cut = call("UpscaleVideo", flashvsr=model, video=InputImpl.VideoFromFile(path), **STREAM), []
    for held in ("the VIDEO", "what was cut from it", "nothing"):
        if held == "what was cut from it":
            # A node behind it makes a VIDEO of the same file, and ComfyUI drops the first one.
            cut, result = [InputImpl.VideoFromFile(result.get_stream_source())], None
        elif held == "nothing":
            cut.clear()
        gc.collect()
        seen[f"held: {held}"] = len(list(temp.glob("steadyvsr_*"))) - left
    damaged = {"cut.mp4": Path(path).read_bytes()[:-2000], "empty.mp4": b"", "text.mp4": b"no video at all\n"}
    for name, content in damaged.items():
        (BASE / name).write_bytes(content)
        seen[name] = error_of(through, InputImpl.VideoFromFile(str(BASE / name)))
    trims, command_line = [], pack("app.clip")
    command_line.trim, trim = (lambda: trims.append(1)), command_line.trim
    through(InputImpl.VideoFromFile(path))
    command_line.trim = trim
    seen["trims"] = len(trims)
    seen["spoiled.mkv"] = error_of(through, InputImpl.VideoFromFile(spoiled_clip(BASE / "spoiled.mkv")))
    seen["rescued"] = {entry.name: described(str(entry)) for entry in temp.glob("*.partial.mp4")}
    if hasattr(InputImpl.VideoFromFile, "as_trimmed"):
        seen["trimmed"] = through(InputImpl.VideoFromFile(path).as_trimmed(0.25, 0.25))
    before = sorted(entry.name for entry in temp.iterdir())
    during = []

    def hook(*_, **__):
        during.append(sorted({entry.name for entry in temp.iterdir()} - set(before)))
        if len(during) == 3:
            mm.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    raised = None
    try:
        through(InputImpl.VideoFromFile(path))
    except BaseException as error:  # noqa: B036
        raised = type(error).__name__
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    after = sorted(entry.name for entry in temp.iterdir())
    return seen | {"interrupt": {"raised": raised, "during": during[-1], "left": sorted(set(after) - set(before))}}


def told() -> dict:
    """What a page is sent while node 7 runs, and what the node shows."""
    model, outputs = tiny_model(), []
    pack("nodes.flashvsr.progress").STATUS_SECONDS = 0.0  # however fast the machine is, every phase is told
    sent = host.events_of(
        lambda: outputs.append(executed("Upscale", flashvsr=model, image=clip(), **STREAM)), "steadyvsr.node"
    )
    shown = outputs[0].ui.as_dict()["text"][0]
    return {
        "nodes": sorted({data["node"] for data in sent}),
        "phases": list(dict.fromkeys(data["progress"]["phase"] for data in sent if "progress" in data)),
        "last": next(data["progress"] for data in reversed(sent) if "progress" in data),
        "memory": sorted(next(data["memory"] for data in sent if "memory" in data)),
        "shows its report": shown == outputs[0].args[1],
    }


def same_as_the_engine() -> dict:
    """The node beside `upscale_frames` on the same weights."""
    model, frames = tiny_model(), clip()
    image, _ = upscale(model, frames)
    options = pack("models.flashvsr").StreamOptions(seed=STREAM["seed"])
    with torch.inference_mode():
        stream = pack("models.flashvsr").upscale_frames(model.networks(), list(frames), options)
        return {"equal": torch.equal(torch.stack(list(stream)), image)}


def weights_changed_on_use() -> dict:
    """A weight that ComfyUI doubles on use beside one that is doubled, in layers that are computed without a call.

    The weights are loaded before: ComfyUI forgets such functions when it loads.
    """
    model, frames, seen = tiny_model(), clip(), {}
    transformer, projection, decoder = (patcher.model for patcher in model.patchers())
    layers = {"patch embedding": transformer.patch_embedding, "LQ convolution": projection.conv1}
    grow, conv = pack("models.flashvsr.tc_decoder")._TRANSITIONS[0]
    layers |= {"decoder's time growth": decoder.decoder[grow].conv, "decoder's convolution": decoder.decoder[conv]}
    plain = digest(upscale(model, frames)[0])
    for name, layer in layers.items():
        layer.weight_function = [lambda weight: weight * 2]
        on_use = digest(upscale(model, frames)[0])
        layer.weight_function = []
        with torch.inference_mode():
            layer.weight.mul_(2)
        doubled = digest(upscale(model, frames)[0])
        with torch.inference_mode():
            layer.weight.div_(2)
        seen[name] = {"seen": doubled != plain, "equal": on_use == doubled}
    return seen


write_clip(BASE / "input" / "clip.mp4")
models_folder = tiny_flashvsr.write_tiny_model(pack, (16, 32), (16, 16, 8, 8), prompt_length=16)
(models_folder / "broken").mkdir()
(models_folder / "broken" / "model.safetensors").write_bytes(b"")
SCENARIOS = {
    "nodes": lambda: sorted(NODES), "schema": schema, "model folder": model_folder, "residency": residency,
    "kept": kept, "partial load": partial_load, "interrupted": interrupted, "images": images,
    "short at the start": short_at_the_start, "growth": growth,
    "loader errors": loader_errors, "vae decoder": vae_decoder, "videos": videos, "told": told,
    "same as the engine": same_as_the_engine, "weights changed on use": weights_changed_on_use,
}  # fmt: skip
