"""Run by a real ComfyUI's Python, in its folder: its Wan 2.1 VAE in tiles, against its own encode and decode.

    python wan_session.py PACK_FOLDER [CLIPS]

Random clips of random sizes and tiles, in fp64 and fp32. Prints one JSON object on the last line: scenario → what was
observed, or {"error": traceback}. The assertions are in test_wan.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import sys
import traceback

sys.path.insert(0, os.getcwd())
sys.argv, (PACK_FOLDER, *GIVEN) = ["main.py", "--cpu"], sys.argv[1:]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # as in main.py: `nodes` puts a folder with another `utils` first
import comfy.ldm.wan.vae as wan  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

PACK = "steadyvsr"
CLIPS = int(GIVEN[1]) if len(GIVEN) > 1 else 26
DIM, LATENT_CHANNELS = 4, 16
CPU = torch.device("cpu")


def load_pack() -> None:
    spec = importlib.util.spec_from_file_location(PACK, f"{PACK_FOLDER}/__init__.py")
    assert spec and spec.loader
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


load_pack()
from steadyvsr.models.wan_vae import TiledDecode, TiledEncode  # noqa: E402
from steadyvsr.nodes.vae import wan as wan_network  # noqa: E402
from steadyvsr.nodes.vae.trial import tolerance  # noqa: E402
from steadyvsr.nodes.vae.wan import adopted  # noqa: E402


def network(dtype: torch.dtype = torch.float32, **changes) -> wan.WanVAE:
    torch.manual_seed(0)
    config = {"dim": DIM, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
              "temperal_downsample": [False, True, True], "dropout": 0.0, **changes}  # fmt: skip
    made = wan.WanVAE(**config)
    for parameter in made.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.data = (
            torch.randn(parameter.shape) / fan_in**0.5 if parameter.ndim > 1 else torch.zeros(parameter.shape)
        )
    for module in made.modules():
        if isinstance(module, wan.RMS_norm):
            module.gamma.data = 1 + 0.1 * torch.randn(module.gamma.shape)
    return made.to(dtype).requires_grad_(False)


def run(job) -> tuple[torch.Tensor, int]:
    units = 0
    while job.done < job.total:
        job.advance(lambda: None)
        units += 1
    return job.result, units


def error(result: torch.Tensor, native: torch.Tensor) -> float:
    assert result.shape == native.shape and native.std() > 1e-3
    return float((result - native).norm() / native.norm())


def clips() -> dict:
    """Relative errors of random clips, one for each number of latents first; how many units each took."""
    seen = {}
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        theirs = network(dtype)
        found = adopted(theirs, CPU, dtype)
        assert found.vae is not None, found.why_not
        rows, chance = [], random.Random(name)
        for i in range(CLIPS):
            latents = i % 13 + 1
            height, width = (8 * chance.randint(1, 6 if latents > 5 else 14) for _ in range(2))
            tile = 8 * chance.randint(1, 2 if i % 2 else 8)  # every second clip in many tiles
            z = torch.randn(1, LATENT_CHANNELS, latents, height // 8, width // 8, dtype=dtype)
            frames = torch.rand(1, 3, 4 * latents - 3, height, width, dtype=dtype) * 2 - 1
            decode = TiledDecode(found.vae, z, tile, device=CPU, dtype=dtype, finish=lambda x: x)
            encode = TiledEncode(found.vae, frames, tile, device=CPU, dtype=dtype)
            (decoded, tiles), (encoded, _) = run(decode), run(encode)
            row = {"latents": latents, "size": [height, width], "tile": tile, "units": tiles}
            row |= {"decode": error(decoded, theirs.decode(z)), "encode": error(encoded, theirs.encode(frames))}
            rows.append(row)
        seen[name] = rows
    return seen


def others() -> dict:
    """Networks that are not Wan 2.1, or not all of it: why each is refused."""
    seen = {}
    altered = network()
    altered.decoder.upsamples[0].residual[2].stride = (1, 2, 2)
    seen["stride"] = adopted(altered, CPU, torch.float32)
    altered = network()
    altered.encoder.middle[0].residual[0].bias = torch.zeros(1)
    seen["norm"] = adopted(altered, CPU, torch.float32)
    seen["levels"] = adopted(network(temperal_downsample=[True, True, False]), CPU, torch.float32)
    seen["class"] = adopted(torch.nn.Linear(2, 2), CPU, torch.float32)
    altered = network()
    original = altered.decoder.forward

    def brighter(*given, **named):
        made = original(*given, **named)
        return [x * 1.01 for x in made] if isinstance(made, list) else made * 1.01

    altered.decoder.forward = brighter
    seen["numbers"] = adopted(altered, CPU, torch.float32)
    return {name: {"taken": found.vae is not None, "why": found.why_not} for name, found in seen.items()}


def once() -> dict:
    """The trial is made once for a network; its weights are shared, and layers that hold them replaced are seen."""
    theirs = network()
    calls = []
    original = wan_network._trial
    wan_network._trial = lambda *given: calls.append(1) or original(*given)
    try:
        first, second = (adopted(theirs, CPU, torch.float32).vae for _ in range(2))
    finally:
        wan_network._trial = original
    z = torch.randn(1, LATENT_CHANNELS, 2, 4, 4)
    before, _ = run(TiledDecode(first, z, 16, device=CPU, dtype=torch.float32))
    for layer in theirs.decoder.modules():
        if isinstance(layer, wan.RMS_norm):
            layer.gamma = torch.nn.Parameter(layer.gamma * 2, requires_grad=False)
    after, _ = run(TiledDecode(first, z, 16, device=CPU, dtype=torch.float32, finish=lambda x: x))
    return {
        "trials": len(calls),
        "changed": bool((before - after).abs().max() > 1e-3),
        "same": error(after, theirs.decode(z)),
        "second": second is not None,
    }


def half() -> dict:
    """bf16, as cards compute it: taken, and as near to fp64 as ComfyUI's own bf16 is."""
    exact, rounded = network(torch.float64), network(torch.bfloat16)
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        one.data = other.data.double()
    found = adopted(rounded, CPU, torch.bfloat16)
    z = torch.randn(1, LATENT_CHANNELS, 3, 8, 8, dtype=torch.bfloat16)
    truth = exact.decode(z.double())
    ours, _ = run(TiledDecode(found.vae, z, 32, device=CPU, dtype=torch.bfloat16, finish=lambda x: x))
    return {"ours": error(ours.double(), truth), "theirs": error(rounded.decode(z).double(), truth)}


class TF32(TorchDispatchMode):
    """Convolutions in fp32 as newer cards compute them: of inputs and weights 10 bits remain."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.__name__:
            args = (*(short(x) for x in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def short(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32() -> dict:
    """How far the two orders of computing are apart in fp32 and in TF32, and what is allowed."""
    theirs, seen = network(dim=32), {}
    ours = adopted(theirs, CPU, torch.float32).vae
    z = torch.randn(1, LATENT_CHANNELS, 2, 2, 3)
    for name, mode in (("fp32", contextlib.nullcontext()), ("tf32", TF32())):
        with mode:
            result, _ = run(TiledDecode(ours, z, 16, device=CPU, dtype=torch.float32, finish=lambda x: x))
            seen[name] = error(result, theirs.decode(z))
    return seen | {name: tolerance(torch.device(name), torch.float32) for name in ("cpu", "cuda")}


def main() -> None:
    results = {}
    for scenario in (clips, others, once, half, tf32):
        try:
            with torch.inference_mode():
                results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = {"error": traceback.format_exc()}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
