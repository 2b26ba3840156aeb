"""The streaming engine beside the official code: CPU time, peak of live tensors, and equal frames.

    python -m steadyvsr.benchmarks.side_by_side --reference PATH [--size 512x768] [--repeats 3] [--json FILE]

PATH is a checkout of github.com/OpenImagingLab/FlashVSR (compared with commit ccac0ac). Its tiny pipeline runs with the
same random weights, noise and clip, in fp32 on one CPU thread; both sides run in turn and medians of process CPU time
are compared. What replaces parts of the official code, at run time only:

* `block_sparse_attn` (CUDA only) by this project's exact gather attention, in the layout that package takes;
* its package `__init__` files and model manager, which import dozens of unrelated models, by empty packages on the
  same folders; `torchvision`'s GaussianBlur, imported there and never called, by a name;
* the widths of its LQ projection, constants in the code, by the benchmark's (its own layer classes are used);
* its noise draw, by the noise that both sides get.

Its prompt keys and values are made before the clock starts; on our side they are part of every run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before the reference's modules are swapped in and out: it registers itself only once
from steadyvsr.benchmarks import frame
from steadyvsr.benchmarks.frame import MIB
from steadyvsr.memory.tracker import StorageTracker, tensor_bytes
from steadyvsr.models.flashvsr import (
    BufferLQ4xProjection,
    FlashVSR,
    FlashVSRConfig,
    StreamOptions,
    TCDecoder,
    Transformer,
    upscale_frames,
)
from steadyvsr.models.flashvsr.attention import sparse_attention
from steadyvsr.models.flashvsr.plan import frame_plan
from steadyvsr.models.flashvsr.windows import BLOCK_TOKENS
from torch import Tensor, nn

CONFIG = FlashVSRConfig(
    dim=384, num_heads=3, ffn_dim=2240, num_layers=8, text_dim=512, lq_hidden=(512, 768),
    decoder_channels=(128, 64, 32, 32),
)  # fmt: skip
PROMPT_TOKENS = 512
FRAMES = 37
"""Output frames; the networks see 41, the last one repeated."""
OPTIONS = StreamOptions(scale=1.0, topk_ratio=2.0, kv_ratio=3.0, local_range=11, colour="adain", attention="gather")
STAGES = ("lq_projection", "transformer", "decoder", "rest")


@dataclass
class Side:
    """One implementation, ready to run.

    Attributes:
        clip: the input in the form that this side takes.
        run: clip → what this side returns.
        as_clip: that as frames CTHW in -1..1.
        seconds: CPU seconds by stage of the run in progress.
    """

    clip: Tensor
    run: Callable[[Tensor], Any]
    as_clip: Callable[[Any], Tensor]
    seconds: dict[str, float] = field(default_factory=dict)

    def watch(self, stage: str, owner: Any, name: str) -> None:
        """Replaces a function of `owner` by one whose time counts for the stage."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - start

        setattr(owner, name, timed)

    def stages(self) -> dict[str, float]:
        """Runs once; CPU seconds of each stage, of the rest and in total."""
        self.seconds.clear()
        start = time.process_time()
        self.run(self.clip)
        total = time.process_time() - start
        return {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}

    def frames_and_peak(self) -> tuple[Tensor, int]:
        """Runs once more, counted: frames, and bytes with those of the clip, which lives as long on both sides."""
        with StorageTracker() as tracker:
            result = self.run(self.clip)
        return self.as_clip(result), tracker.peak + tensor_bytes([self.clip])


def random_model(seed: int) -> FlashVSR:
    """Random weights under which every part matters and activations stay of order one."""
    torch.manual_seed(seed)
    transformer = Transformer(CONFIG)
    # The order of the released v1 projection, which is the only one in the official repository.
    projection = BufferLQ4xProjection(CONFIG.lq_hidden, CONFIG.dim, CONFIG.lq_layers, cache_order="as_trained")
    decoder = TCDecoder(CONFIG.decoder_channels)
    for name, parameter in transformer.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.1)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 4:
            # ReLU halves the power of what follows a 3×3; residual branches stay small.
            gain = 0.3 if name.endswith("conv.4.weight") else 1.0 if ".26." in name or parameter.shape[-1] == 1 else 2.0
            nn.init.normal_(parameter, std=math.sqrt(gain / parameter[0].numel()))
    return FlashVSR(transformer, projection, decoder, torch.randn(1, PROMPT_TOKENS, CONFIG.text_dim), "v1", "random")


def our_side(model: FlashVSR, clip: Tensor, noise: Tensor) -> Side:
    def run(frames: Tensor) -> list[Tensor]:
        return list(upscale_frames(model, frames, OPTIONS, noise=noise))

    side = Side(clip, run, lambda frames: torch.stack(frames).permute(3, 0, 1, 2) * 2 - 1)
    for stage in ("lq_projection", "transformer", "decoder"):
        side.watch(stage, getattr(model, stage), "forward")
    return side


def block_sparse_attn_func(
    queries: Tensor, keys: Tensor, values: Tensor, _q_ends, _k_ends, _head_types, _streaming, mask: Tensor, *_, **__
) -> Tensor:
    """What `block_sparse_attn` computes, on our gather backend; tokens × heads × head dim."""
    q, k, v = (x.unflatten(0, (-1, BLOCK_TOKENS)).permute(2, 0, 1, 3) for x in (queries, keys, values))
    return sparse_attention(q, k, v, mask[0], "gather").permute(1, 2, 0, 3).reshape(queries.shape)


@contextlib.contextmanager
def reference_modules(path: Path) -> Iterator[types.SimpleNamespace]:
    """Imports the parts of the checkout that the tiny pipeline needs."""

    def empty(name: str, folder: Path | None = None, **names: Any) -> None:
        module: Any = types.ModuleType(name)
        if folder is not None:
            module.__path__ = [str(folder)]
        vars(module).update(names)
        sys.modules[name] = module

    root = path / "diffsynth"
    examples = path / "examples" / "WanVSR"
    if not (root / "pipelines" / "flashvsr_tiny.py").is_file():
        raise SystemExit(f"--reference: expected a checkout of OpenImagingLab/FlashVSR; got {path}.")
    before = set(sys.modules)
    empty("block_sparse_attn", block_sparse_attn_func=block_sparse_attn_func)
    if importlib.util.find_spec("torchvision") is None:
        empty("torchvision", root)
        empty("torchvision.transforms", GaussianBlur=None)
    empty("diffsynth", root)
    empty("diffsynth.models", root / "models", ModelManager=None)
    empty("diffsynth.schedulers", root / "schedulers")
    empty("diffsynth.pipelines", root / "pipelines")
    empty("flashvsr_examples", examples / "utils")
    try:
        yield types.SimpleNamespace(
            tiny=importlib.import_module("diffsynth.pipelines.flashvsr_tiny"),
            transformer=importlib.import_module("diffsynth.models.wan_video_dit"),
            projection=importlib.import_module("flashvsr_examples.utils"),
            decoder=importlib.import_module("flashvsr_examples.TCDecoder"),
        )
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def reference_side(modules: types.SimpleNamespace, model: FlashVSR, clip: Tensor, noise: Tensor) -> Side:
    height, width = clip.shape[1:3]
    padded = frame_plan(len(clip)).padded_frames
    sizes = ("dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "num_heads", "num_layers")
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = modules.tiny.FlashVSRTinyPipeline(device="cpu", torch_dtype=torch.float32)
        pipeline.dit = modules.transformer.WanModel(
            eps=1e-6, patch_size=(1, 2, 2), **{name: getattr(CONFIG, name) for name in sizes}
        )
        pipeline.dit.load_state_dict(model.transformer.state_dict())
        pipeline.dit.LQ_proj_in = projection = modules.projection.Buffer_LQ4x_Proj(3, CONFIG.dim, CONFIG.lq_layers)
        pipeline.TCDecoder = modules.decoder.build_tcdecoder(
            list(CONFIG.decoder_channels), "cpu", torch.float32, CONFIG.in_dim + 768
        )
        pipeline.TCDecoder.load_state_dict(model.decoder.state_dict())
    first, second = CONFIG.lq_hidden
    kernel = {"kernel_size": (4, 3, 3), "stride": (2, 1, 1), "padding": (1, 1, 1)}
    projection.conv1 = modules.projection.CausalConv3d(768, first, **kernel)
    projection.norm1 = modules.projection.RMS_norm(first, images=False)
    projection.conv2 = modules.projection.CausalConv3d(first, second, **kernel)
    projection.norm2 = modules.projection.RMS_norm(second, images=False)
    projection.linear_layers = nn.ModuleList([nn.Linear(second, CONFIG.dim) for _ in range(CONFIG.lq_layers)])
    projection.load_state_dict(model.lq_projection.state_dict())
    pipeline.generate_noise = lambda *args, **kwargs: noise.clone()
    pipeline.init_cross_kv(model.prompt)
    settings = {"topk_ratio": OPTIONS.topk_ratio, "kv_ratio": OPTIONS.kv_ratio, "local_range": OPTIONS.local_range}
    settings |= {"cfg_scale": 1.0, "num_inference_steps": 1, "num_frames": padded, "height": height, "width": width}

    def run(video: Tensor) -> Tensor:
        return pipeline(LQ_video=video, if_buffer=True, **settings)

    repeated = torch.cat([clip, clip[-1:].expand(padded - len(clip), -1, -1, -1)])
    side = Side((repeated.permute(3, 0, 1, 2)[None] * 2 - 1).contiguous(), run, lambda frames: frames)
    side.watch("lq_projection", projection, "stream_forward")
    side.watch("transformer", modules.tiny, "model_fn_wan_video")
    side.watch("decoder", pipeline.TCDecoder, "decode_video")
    return side


def compare(path: Path, height: int, width: int, repeats: int, seed: int) -> dict[str, Any]:
    """One line of the table, for one frame size."""
    model = random_model(seed)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(FRAMES, 3, height // 8, width // 8, generator=generator)
    clip = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)
    latents = frame_plan(FRAMES).latent_frames
    noise = torch.randn(1, CONFIG.in_dim, latents, height // 8, width // 8, generator=generator)
    with reference_modules(path) as modules, open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        sides = {
            "official": reference_side(modules, model, clip, noise),
            "ours": our_side(model, clip.contiguous(), noise),
        }
        results = {name: side.frames_and_peak() for name, side in sides.items()}
        runs = frame.in_turn({name: side.stages for name, side in sides.items()}, repeats)
    frames = {name: result for name, (result, _) in results.items()}
    peaks = {name: peak for name, (_, peak) in results.items()}
    seconds = {
        name: {stage: statistics.median(run[stage] for run in runs[name]) for stage in (*STAGES, "total")}
        for name in sides
    }
    ratios = {stage: seconds["ours"][stage] / seconds["official"][stage] for stage in (*STAGES, "total")}
    return {
        "height": height,
        "width": width,
        "frames": FRAMES,
        "repeats": repeats,
        "cpu_seconds": seconds,
        "runs": runs,
        "peak_bytes": peaks,
        "time_ratio": ratios.pop("total"),
        "stage_ratios": ratios,
        "peak_ratio": peaks["ours"] / peaks["official"],
        "largest_difference": (frames["official"] - frames["ours"]).abs().max().item(),
        "output_deviation": frames["official"].std().item(),
    }


def report(line: dict[str, Any]) -> None:
    print(f"{line['height']}×{line['width']}, {line['frames']} frames, median of {line['repeats']}, CPU seconds")
    print(f"  {'':14}{'official':>10}{'ours':>10}{'ratio':>8}")
    official, ours = line["cpu_seconds"]["official"], line["cpu_seconds"]["ours"]
    for stage, ratio in {**line["stage_ratios"], "total": line["time_ratio"]}.items():
        print(f"  {stage:14}{official[stage]:10.2f}{ours[stage]:10.2f}{ratio:8.3f}")
    peak = line["peak_bytes"]
    print(
        f"  {'peak MiB':14}{peak['official'] / MIB:10.1f}{peak['ours'] / MIB:10.1f}{line['peak_ratio']:8.3f}\n"
        f"  largest difference of the frames: {line['largest_difference']:.1e}, "
        f"their deviation {line['output_deviation']:.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = frame.parser(__doc__)
    parser.set_defaults(json=frame.RESULTS / "side_by_side.json")
    parser.add_argument("--reference", type=Path, required=True, help="checkout of OpenImagingLab/FlashVSR")
    parser.add_argument("--size", action="append", help="HxW; default: 256x256 and 512x768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = []
    for size in options.size or ["256x256", "512x768"]:
        height, width = (int(side) for side in size.split("x"))
        lines.append(compare(options.reference, height, width, options.repeats, options.seed))
        report(lines[-1])
    return frame.finish(options.json, {"lines": lines})


if __name__ == "__main__":
    sys.exit(main())
