"""Checks every golden vector of a folder against the networks and the engine, in fp32 on one device.

Sizes, cases and tolerances come from the folder's index.json. Two approximate tilings of the official code are left
out (wan_vae out/tiled_*, e2e out/full/frames_tiled_*).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...models import flashvsr
from ...models.flashvsr import FlashVSRConfig, StreamOptions, TCDecoder, Transformer, colour, transformer
from ...models.flashvsr.plan import step_latents
from ...models.wan_vae import StreamingDecoder, WanVAE

MARGIN_OF_A_CERTAIN_MASK = 1e-5
"""Below this relative gap at the threshold one block may flip between correct implementations."""


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, and how far it lies beyond rtol · |expected| + atol (≤ 0 passes)."""

    entry: str
    name: str
    difference: float
    excess: float

    @property
    def passed(self) -> bool:
        return self.excess <= 0


class Folder:
    """A folder of vectors; tensors come back in fp32 on `device`."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = path, torch.device(device)
        self.entries: dict[str, dict[str, Any]] = json.loads((path / "index.json").read_text())["entries"]

    def tensors(self, file: str) -> dict[str, Tensor]:
        found = load_file(self.path / file)
        return {k: (v.float() if v.is_floating_point() else v).to(self.device) for k, v in found.items()}

    def step(self, file: str, default: int) -> int:
        """The sub-sampling step that a file's metadata gives as ::N."""
        with safe_open(str(self.path / file), "pt") as opened:
            found = re.search(r"::(\d+)", " ".join((opened.metadata() or {}).values()))
        return int(found[1]) if found else default


def compare(entry: str, name: str, got: Tensor, expected: Tensor, tolerance: dict[str, float]) -> Check:
    got, expected = got.cpu(), expected.cpu()
    difference = (got - expected).abs()
    allowed = tolerance["atol"] + tolerance["rtol"] * expected.abs()
    return Check(entry, name, difference.max().item(), (difference - allowed).max().item())


def projections(hidden: tuple[int, int], dim: int, layers: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    made = {
        "buffer_upstream": flashvsr.BufferLQ4xProjection(hidden, dim, layers, cache_order="as_trained"),
        "buffer_fixed": flashvsr.BufferLQ4xProjection(hidden, dim, layers),
        "causal": flashvsr.CausalLQ4xProjection(hidden, dim, layers),
    }
    for projection in made.values():
        projection.load_state_dict(weights)
    return made


def check_projection(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    c = entry["config"]
    io = folder.tensors("lq_proj/io.safetensors")
    weights = folder.tensors("lq_proj/weights.safetensors")
    for order, projection in projections((c["h1"], c["h2"]), c["out"], c["layers"], weights).items():
        whole, _ = projection(io["in/video"])
        clips, cache = [], None
        for start, stop in [(0, 1), *((i, i + 4) for i in range(1, c["T"], 4))]:
            tokens, cache = projection(io["in/video"][:, :, start:stop], cache)
            clips += [] if tokens is None else [tokens]
        for layer in range(c["layers"]):
            expected = io[f"out/{order}/layer{layer}"]
            yield compare(name, f"{order}/layer{layer}", whole[layer], expected, entry["tolerance"])
            streamed = torch.cat([clip[layer] for clip in clips], 1)
            yield compare(name, f"{order}/layer{layer} streamed", streamed, expected, entry["tolerance"])


def check_colour(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    io = folder.tensors("color/io.safetensors")
    for key in sorted(io):
        if match := re.fullmatch(r"out/(adain|wavelet)(\d+)", key):
            method, case = match.groups()
            got = colour.METHODS[method](io[f"in/hq{case}"], io[f"in/lq{case}"])
            yield compare(name, f"{method}{case}", got, io[key], entry["tolerance"])


def check_decoder(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    io = folder.tensors("tcdecoder/io.safetensors")
    decoder = TCDecoder(tuple(entry["config"]["ch"]))
    decoder.load_state_dict(folder.tensors("tcdecoder/weights.safetensors"))
    latents, condition = io["in/latents_ntchw"], io["in/cond"].transpose(1, 2)
    expected = io["out/frames_ntchw"]
    yield compare(name, "one shot", decoder(latents, condition)[0], expected, entry["tolerance"])
    first, memory = decoder(latents[:, :6], condition[:, :21])
    parts = [first]
    for i in range(6, latents.shape[1], 2):
        parts.append(decoder(latents[:, i : i + 2], condition[:, 4 * i - 3 : 4 * i + 5], memory)[0])
    yield compare(name, "in chunks", torch.cat(parts, 1), expected, entry["tolerance"])


def check_vae(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    io = folder.tensors("wan_vae/io.safetensors")
    vae = WanVAE.from_state_dict(folder.tensors("wan_vae/weights.safetensors"))
    step = folder.step("wan_vae/io.safetensors", 3)
    tolerance = entry["tolerance"]
    latents = vae.encode(io["in/video"])
    yield compare(name, "encode17", latents, io["out/encode17"], tolerance)
    yield compare(name, "raw mean", vae.denormalise(latents), io["ref/encode17_raw_mu"], tolerance)
    raw, _ = vae.decode_with_cache(io["in/latents"])
    sampled = raw[..., ::step, ::step]
    yield compare(name, "decode5 unclamped", sampled, io["out/decode5_unclamped_sub"], tolerance)
    decoded = vae.decode(io["in/latents"])
    yield compare(name, "decode5", decoded[..., ::step, ::step], io["out/decode5_sub"], tolerance)
    yield compare(name, "decode5 first frames", decoded[:, :, :5], io["out/decode5_first5_frames"], tolerance)


def chronological(state: flashvsr.TransformerState, parts: list[Tensor]) -> Tensor:
    """Ring slots in order of time; each part is one slot."""
    first = state.pairs - state.cached_pairs
    return torch.cat([parts[pair % state.slots] for pair in range(first, state.pairs)], 0)


def check_transformer(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    c, case, tolerance = entry["config"], entry["case"], entry["tolerance"]
    group = case["id"][0]
    inputs = folder.tensors(f"dit/{group}_inputs.safetensors")
    io = folder.tensors(f"dit/{case['id']}.safetensors")
    sizes = ("dim", "num_heads", "ffn_dim", "num_layers", "freq_dim", "text_dim", "in_dim", "out_dim")
    network = Transformer(FlashVSRConfig(**{size: c[size] for size in sizes}))
    network.load_state_dict(folder.tensors(f"dit/{group}_weights.safetensors"))
    latents = inputs["in/latents"]
    if case.get("transpose"):
        latents = latents.transpose(3, 4).contiguous()
    # Below 2 the released code behaves as with 2; here that is refused at the border.
    options = StreamOptions(
        topk_ratio=entry["topk_ratio"], kv_ratio=max(2.0, case["kv_ratio"]), local_range=case["local_range"]
    )
    constants = network.prepare(inputs["in/context"])
    first_block: Any = network.blocks[0]
    keys, values = first_block.prompt_keys_values(constants.text)
    for what, got in (
        ("t", constants.time), ("t_mod", constants.modulation), ("block0_cross_k", keys), ("block0_cross_v", values),
    ):  # fmt: skip
        yield compare(name, what, got, inputs[f"ref/{what}"], tolerance)
    tokens = latents.shape[3] // 2 * (latents.shape[4] // 2)
    certain = entry["mask_stats"]["min_relative_margin"] > MARGIN_OF_A_CERTAIN_MASK
    state, step_size = flashvsr.TransformerState(), entry.get("sub_sampling_step", 3)
    masks: list[Tensor] = []
    select = transformer.select_blocks
    with mock.patch.object(transformer, "select_blocks", lambda *args: masks.append(select(*args)) or masks[-1]):
        for step in range(entry["steps"]):
            first, last = step_latents(step)
            lq = None
            if "in/lq" in inputs:
                lq = [inputs["in/lq"][:, first * tokens : last * tokens]]
                lq += [-lq[0]] if case.get("lq_layers", 1) == 2 else []
            before, cached = state.pairs, state.cached_pairs
            masks.clear()
            velocity = network(latents[:, :, first:last], lq, step, state, options, constants)
            if f"out/step{step}" in io:
                yield compare(name, f"step {step}", velocity, io[f"out/step{step}"], tolerance)
            sampled = velocity[..., ::step_size, ::step_size]
            yield compare(name, f"step {step} sampled", sampled, io[f"out_sub/step{step}"], tolerance)
            shape = entry["mask_shape"][step]
            bits = np.unpackbits(io[f"mask0/step{step}"].cpu().numpy())[: int(np.prod(shape))]
            expected = torch.from_numpy(bits.astype(bool)).view(shape)
            new = (last - first) // 2
            slots = masks[0].unflatten(2, (cached + new, -1))
            order = [pair % state.slots for pair in range(before - cached, before)] + list(range(cached, cached + new))
            flips = (slots[:, :, order].flatten(2).cpu() != expected).sum().item()
            # A kept and a dropped block change places: two bits for each head and query group.
            allowed = 0 if certain else 2 * shape[0] * new
            yield Check(name, f"mask of step {step}", flips, flips - allowed)
    blocks = state.layers[0].keys.shape[1] // state.slots
    for kind, ring in (("k", state.layers[0].keys), ("v", state.layers[0].values)):
        parts = [part.permute(1, 2, 0, 3).flatten(2) for part in ring.split(blocks, 1)]
        expected = io.get(f"cache_sub/block0_{kind}")
        if expected is not None:
            whole = chronological(state, parts)
            steps = (whole.shape[0] // expected.shape[0], whole.shape[1] // expected.shape[1])
            yield compare(name, f"cache {kind}", whole[:: steps[0], :: steps[1]], expected, tolerance)


class Recorder:
    """Wraps a decoder and records what passes through it."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.latents, self.frames = decoder, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def __call__(self, latents: Tensor, condition: Tensor, memory: Any, strip_pixels: int | None = None) -> Any:
        frames, memory = self.decoder(latents, condition, memory, strip_pixels)
        self.latents.append(latents.transpose(1, 2).clone())
        self.frames.append(frames.transpose(1, 2) * 2 - 1)
        return frames, memory

    def decode_stream(self, latents: Tensor, cache: Any) -> Tensor:
        frames = self.decoder.decode_stream(latents, cache)
        self.latents.append(latents.clone())
        self.frames.append(frames.clamp(-1, 1))
        return frames


def check_pipeline(folder: Folder, name: str, entry: dict[str, Any]) -> Iterator[Check]:
    c, tolerance = entry["config"], entry["tolerance"]
    io, step = folder.tensors("e2e/io.safetensors"), folder.step("e2e/io.safetensors", 5)
    weights = folder.tensors("e2e/dit_weights.safetensors")
    lq_weights = {
        key: value for key, value in folder.tensors("lq_proj/weights.safetensors").items()
        if not key.startswith("linear_layers.") or key.startswith("linear_layers.0.")
    }  # fmt: skip
    decoder_weights = folder.tensors("tcdecoder/weights.safetensors")
    config = FlashVSRConfig.from_tensors(weights, lq_weights, decoder_weights, num_heads=c["cfg"]["num_heads"])
    network, decoder = Transformer(config), TCDecoder(config.decoder_channels)
    network.load_state_dict(weights)
    decoder.load_state_dict(decoder_weights)
    made = projections(config.lq_hidden, config.dim, 1, lq_weights)
    frames = io["in/lq_u8"][0].permute(1, 2, 3, 0).float() / 255
    options = StreamOptions(
        scale=1.0, sparse_ratio=c["sparse_ratio"], topk_ratio=c["topk_ratio"], kv_ratio=c["kv_ratio"],
        local_range=c["local_range"],
    )  # fmt: skip
    for case, order in (("buffer", "buffer_upstream"), ("causal", "causal"), ("full", "buffer_upstream")):
        if f"out/{case}/frames_post_sub" not in io:
            continue
        count = io[f"out/{case}/frames_post_sub"].shape[1]
        vae: Any = None
        recorder: Any = Recorder(decoder)
        if case == "full":
            vae = recorder = Recorder(StreamingDecoder(WanVAE.from_state_dict(folder.tensors(entry["vae_weights"]))))
        model = flashvsr.FlashVSR(network, made[order], recorder, io["in/context"], "v1", "golden")
        given = frames[: count + 4]
        result = list(flashvsr.upscale_frames(model, given, options, noise=io["in/noise"], vae=vae))[:count]
        after = torch.stack(result).permute(3, 0, 1, 2) * 2 - 1
        before = torch.cat(recorder.frames, 2)[0, :, :count]
        post, pre = io[f"out/{case}/frames_post_sub"], io.get(f"out/{case}/frames_pre_sub")
        yield compare(name, f"{case} frames", after[..., ::step, ::step], post, tolerance)
        if pre is not None:
            yield compare(name, f"{case} frames before colour", before[..., ::step, ::step], pre, tolerance)
        if (expected := io.get(f"out/{case}/latents")) is not None:
            got = torch.cat(recorder.latents, 2)[:, :, : expected.shape[2]]
            yield compare(name, f"{case} latents", got, expected[:, :, : got.shape[2]], tolerance)


CHECKS = {
    "lq_proj": check_projection,
    "color": check_colour,
    "tcdecoder": check_decoder,
    "wan_vae": check_vae,
    "e2e": check_pipeline,
}


def check_entry(folder: Folder, name: str) -> list[Check]:
    """Every comparison of one entry of the index."""
    check = CHECKS.get(name, check_transformer)
    with torch.no_grad(), folder.device:
        return list(check(folder, name, folder.entries[name]))
