"""What the card computes: its ceilings, whether each attention backend is right, and how fast the engine is."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...memory import probe
from ...memory.budget import Need, fit, gib
from ...memory.reading import GIB, size_text
from ...models.flashvsr import FlashVSR, StreamOptions, upscale_frames
from ...models.flashvsr.attention import BACKENDS, choose_backend, self_check
from ...models.flashvsr.footprint import activation_bytes
from ...models.flashvsr.memory_plan import MemoryPlan, plans
from ...models.wan_vae import TiledDecode, TiledEncode, WanVAE, peak_bytes
from ..doctor import peak_of
from . import golden
from .random_model import parameters, released_model, tiny_model
from .record import Found, NotHere, Setting
from .room import CARDS_GB, room

SIZES = ((640, 384), (1408, 768), (1920, 1080), (2560, 1536))
"""Width and height of the output, scale 4."""
MAIN_SIZE, TINY_SIZE = SIZES[1], (128, 128)
STEADY_FRAMES = 45
"""Output frames after which all caches are full and everything is compiled."""
TIMED_FRAMES = 64
SCALE, KV_RATIO = 4.0, 3.0
WITHIN = 0.10
RUNS, RUN_FRAMES, TINY_FRAMES = 3, 200, 25
WAN_SIZE, WAN_TILE, WAN_FRAMES = (480, 832), 256, 17
TINY_WAN = (32, 48), 32, 5
WAN_BUDGET_GB = 2.0
"""What the tiled VAE nodes allow weights and tiles together unless told otherwise."""
CONVOLUTION_BYTES = 256 << 20
"""Work space of a convolution that no shape reveals; the VAE nodes leave as much free."""


def model_of(setting: Setting, version: str = "v1.1") -> FlashVSR:
    if setting.reduced:
        made = tiny_model(version, dtype=setting.dtype)
        for network in (made.transformer, made.lq_projection, made.decoder):
            network.to(setting.device)
        return made
    return released_model(version, setting.dtype, setting.device)


def frames_of(size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """`count` random frames HWC whose output has this width and height; eight different ones in turn."""
    generator = torch.Generator().manual_seed(0)
    width, height = (round(side / SCALE) for side in size)
    return itertools.islice(itertools.cycle(torch.rand(8, height, width, 3, generator=generator)), count)


def ceilings(setting: Setting) -> Found:
    """The most that any program gets out of this device: a large matrix product, and a copy."""
    setting.needs_card("its ceilings are not those of a CPU")
    side, numbers = (256, 1 << 20) if setting.reduced else (8192, 1 << 30)
    a = torch.randn(side, side, device=setting.device, dtype=setting.dtype)
    x = torch.ones(numbers, device=setting.device, dtype=setting.dtype)
    y = torch.empty_like(x)
    product = seconds_of(setting, lambda: a @ a)
    copy = seconds_of(setting, lambda: y.copy_(x))
    figures = {"matmul_tflops": 2 * side**3 / product / 1e12, "copy_gb_per_s": 2 * x.nbytes / copy / 1e9}
    lines = [f"matrix product {figures['matmul_tflops']:.1f} TFLOP/s · copy {figures['copy_gb_per_s']:.0f} GB/s"]
    return Found(figures, lines)


def seconds_of(setting: Setting, run: Callable[[], Any], repeats: int = 10) -> float:
    """The median of `repeats` calls, each waited for, after three others."""
    found = []
    for _ in range(repeats + 3):
        setting.probe.synchronise(setting.device)
        started = time.perf_counter()
        run()
        setting.probe.synchronise(setting.device)
        found.append(time.perf_counter() - started)
    return sorted(found[3:])[repeats // 2]


def attention(setting: Setting) -> Found:
    """Each backend against float64, in each dtype that the device computes in."""
    found = Found({"backends": {}})
    dtypes = (torch.float32,) if setting.on_cpu else (torch.float32, torch.float16, torch.bfloat16)
    for name, backend in BACKENDS.items():
        if not backend.available(setting.device):
            found.figures["backends"][name] = "not for this device"
            found.lines.append(f"{name}: not for this device")
            continue
        problems = {str(dtype)[6:]: self_check(name, setting.device, dtype) for dtype in dtypes}
        found.figures["backends"][name] = problems
        wrong = [f"{dtype}: {problem}" for dtype, problem in problems.items() if problem]
        found.lines.append(f"{name}: {'; '.join(wrong) or 'exact in ' + ', '.join(problems)}")
        found.missed += [f"{name}, {problem}" for problem in wrong if "differ" in problem or "relative" in problem]
    chosen = choose_backend("auto", setting.device, setting.dtype)
    found.figures["auto"] = chosen
    found.lines.append(f"auto takes {chosen}")
    return found


def golden_vectors(setting: Setting) -> Found:
    """The networks and the engine on this device against numbers of the released code, in fp32."""
    if setting.golden is None or not (setting.golden / "index.json").is_file():
        raise NotHere("The golden vectors are in the repository (tests/data), not in an installed package.")
    folder = golden.Folder(setting.golden, setting.device)
    names = list(folder.entries)[:2] if setting.reduced else list(folder.entries)
    with _full_precision():
        checks = [check for name in names for check in golden.check_entry(folder, name)]
    missed = [f"{check.entry} {check.name}: {check.difference:.1e}" for check in checks if not check.passed]
    worst = max(check.difference for check in checks if "mask" not in check.name)
    figures = {"comparisons": len(checks), "entries": len(names), "largest_difference": worst}
    return Found(figures, [f"{len(checks)} comparisons, {len(missed)} missed, largest difference {worst:.1e}"], missed)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which rounds the products of fp32 numbers to ten bits on newer cards."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def speed(setting: Setting, sizes: Sequence[tuple[int, int]] = (MAIN_SIZE,), every_backend: bool = False) -> Found:
    """Frames per second from tensor to tensor, seconds of each part, and the predicted against the measured peak."""
    setting.needs_card("a frame of the released model takes minutes on a CPU")
    model, found = model_of(setting), Found({"runs": []})
    chosen = [choose_backend("auto", setting.device, setting.dtype)]
    if every_backend:
        chosen = [name for name, backend in BACKENDS.items() if backend.available(setting.device)
                  and not self_check(name, setting.device, setting.dtype)]  # fmt: skip
    for size, backend in itertools.product((TINY_SIZE,) if setting.reduced else sizes, chosen):
        row = {"width": size[0], "height": size[1], "attention": backend}
        found.figures["runs"].append(row)
        try:
            row |= timed_run(setting, model, size, backend)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
            found.lines.append(f"{size[0]}×{size[1]} {backend}: out of memory")
            continue
        parts = ", ".join(f"{part} {1000 * seconds:.1f}" for part, seconds in row["part_seconds_of_8_frames"].items())
        found.lines.append(
            f"{size[0]}×{size[1]} {backend}: {row['frames_per_second']:.2f} frames per second; ms of 8 frames: {parts}"
        )
        if (measured := row["measured_peak_bytes"]) is None:
            found.lines.append("  peak: nothing counts it here")
            continue
        error = row["predicted_peak_bytes"] / measured - 1
        found.lines.append(
            f"  peak {size_text(measured)} beside the weights, predicted {size_text(row['predicted_peak_bytes'])} "
            f"({100 * error:+.1f} %), reserved {size_text(row['reserved_bytes'])}"
        )
        if abs(error) > WITHIN and not setting.reduced:
            found.missed.append(f"prediction within 10 % at {size[0]}×{size[1]}, {backend}: {100 * error:+.1f} %")
    return found


def timed_run(setting: Setting, model: FlashVSR, size: tuple[int, int], backend: str) -> dict[str, Any]:
    """One row of `speed`: a run whose first frames are not timed."""
    reader, device = setting.probe, setting.device
    warm, timed = (21, 8) if setting.reduced else (STEADY_FRAMES, TIMED_FRAMES)
    options = StreamOptions(scale=SCALE, attention=backend, kv_ratio=KV_RATIO)
    held = probe.attempt(reader, device).allocated.bytes
    reader.reset_peak(device)
    with PartTimes(model, device) as parts:
        started = 0.0
        for done, _ in enumerate(
            upscale_frames(model, frames_of(size, warm + timed), options, device=device, dtype=setting.dtype), 1
        ):
            if done == warm:
                parts.spans.clear()
                reader.synchronise(device)
                started = time.perf_counter()
        reader.synchronise(device)
        seconds = time.perf_counter() - started
        by_part = {part: spent / timed * 8 for part, spent in parts.seconds().items()}
    after = probe.attempt(reader, device)
    known = held is not None and after.peak.bytes is not None
    by_part["the rest"] = seconds / timed * 8 - sum(by_part.values())
    return {
        "frames_per_second": timed / seconds,
        "part_seconds_of_8_frames": by_part,
        "measured_peak_bytes": after.peak.bytes - held if known else None,  # type: ignore[operator]
        "reserved_bytes": after.reserved.bytes,
        "predicted_peak_bytes": predicted(setting, model, size, MemoryPlan()),
    }


def predicted(setting: Setting, model: FlashVSR, size: tuple[int, int], plan: MemoryPlan) -> int:
    config, tokens = model.transformer.config, model.prompt.shape[1]
    return activation_bytes(
        config, size, KV_RATIO, setting.dtype.itemsize, tokens, on_cpu=setting.on_cpu, plan=plan
    )  # fmt: skip


class PartTimes:
    """Seconds that each network of a model takes, by events of the card where it has them; within a `with` block.

    Attributes:
        spans: network → pairs of marks.
    """

    def __init__(self, model: FlashVSR, device: torch.device) -> None:
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self._device, self._open, self._handles = device, {}, []
        self._networks: dict[str, nn.Module] = {
            "LQ projection": model.lq_projection, "transformer": model.transformer, "decoder": model.decoder,
        }  # fmt: skip

    def __enter__(self) -> PartTimes:
        for name, network in self._networks.items():
            self._handles += [
                network.register_forward_pre_hook(lambda *_, name=name: self._open.update({name: self._mark()})),
                network.register_forward_hook(lambda *_, name=name: self._close(name)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """By network; everything must have been waited for."""
        return {name: sum(self._between(*span) for span in spans) for name, spans in self.spans.items()}

    def _close(self, name: str) -> None:
        self.spans.setdefault(name, []).append((self._open.pop(name), self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return last - first if isinstance(first, float) else first.elapsed_time(last) / 1000


def repeats(setting: Setting) -> Found:
    """200 frames three times with each version: the same frames, and the same bytes of tensors afterwards."""
    setting.needs_card("1,200 frames of the released model take days on a CPU")
    size, count = (TINY_SIZE, TINY_FRAMES) if setting.reduced else (MAIN_SIZE, RUN_FRAMES)
    found = Found()
    for version in ("v1", "v1.1"):
        model, rows = model_of(setting, version), []
        for _ in range(RUNS):
            digest, frames, started = hashlib.blake2b(), 0, time.perf_counter()
            options = StreamOptions(scale=SCALE)
            given = frames_of(size, count)
            for picture in upscale_frames(model, given, options, device=setting.device, dtype=setting.dtype):
                digest.update((picture * 255).round().byte().numpy().tobytes())
                frames += 1
            left = probe.attempt(setting.probe, setting.device, settled=True).allocated.bytes
            rows.append({"frames": frames, "digest": digest.hexdigest()[:16], "allocated_after_bytes": left})
            rows[-1]["seconds"] = time.perf_counter() - started
        equal = len({row["digest"] for row in rows}) == 1
        level = len({row["allocated_after_bytes"] for row in rows}) == 1
        whole = all(row["frames"] == count for row in rows)
        found.figures[version] = rows
        rates = ", ".join(f"{count / row['seconds']:.2f}" for row in rows)
        found.lines.append(
            f"{version}: {RUNS} × {count} frames, {'the same' if equal else 'DIFFERENT'} in 8 bits, "
            f"{size_text(rows[-1]['allocated_after_bytes'])} of tensors after the last, "
            f"{rates} frames per second"
        )
        promises = {"the same frames": equal, "every frame": whole, "no bytes left over": level}
        found.missed += [f"{version}: {promise}" for promise, kept in promises.items() if not kept]
        del model
    return found


def wan_tiles(setting: Setting) -> Found:
    """A Wan 2.1 VAE in exact tiles at 832×480: time, peak against prediction, and the nodes' own budget of 2 GiB."""
    setting.needs_card("a Wan VAE of full size takes many minutes on a CPU")
    size, tile, count = TINY_WAN if setting.reduced else (WAN_SIZE, WAN_TILE, WAN_FRAMES)
    with torch.device(setting.device):
        vae = WanVAE(dim=8 if setting.reduced else 96).to(setting.dtype)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    latents, found = (count + 3) // 4, Found({"weights_bytes": weights})
    clips = {
        "encode": torch.rand(1, 3, count, *size) * 2 - 1,
        "decode": torch.randn(1, vae.z_dim, latents, size[0] // 8, size[1] // 8),
    }
    for kind, clip in clips.items():
        job_of = TiledEncode if kind == "encode" else TiledDecode

        def work(clip: Tensor = clip, job_of: Any = job_of) -> None:
            job = job_of(vae, clip, tile, device=setting.device, dtype=setting.dtype)
            while job.done < job.total:
                job.advance(lambda: None)

        work()
        started = time.perf_counter()
        peak = peak_of(work, setting.device, setting.probe).bytes
        seconds = time.perf_counter() - started
        needs = peak_bytes(
            vae, encodes=kind == "encode", latents=latents, size=size, tile=tile, itemsize=setting.dtype.itemsize
        )
        found.figures[kind] = {"seconds": seconds, "measured_peak_bytes": peak, "predicted_peak_bytes": needs}
        found.lines.append(
            f"{kind} {count} frames of {size[1]}×{size[0]}, tiles to {tile}: {seconds:.2f} s, peak {size_text(peak)} "
            f"beside weights of {size_text(weights)}, predicted {size_text(needs)}"
        )
        if peak is not None and weights + peak > gib(WAN_BUDGET_GB):
            found.missed.append(f"{kind} in the nodes' budget of {WAN_BUDGET_GB:g} GiB")
        if peak is not None and not setting.on_cpu and peak > (1 + WITHIN) * needs + CONVOLUTION_BYTES:
            found.missed.append(f"{kind}: at most 10 % and {size_text(CONVOLUTION_BYTES)} above the prediction")
    return found


def budgets(setting: Setting) -> Found:
    """For cards of 6 to 24 GB: the first plan predicted to fit at 1920×1080, run, and its peak within that card."""
    setting.needs_card("no plan of the released model can be run")
    size, found = (TINY_SIZE if setting.reduced else SIZES[2]), Found({"cards": []})
    model = model_of(setting)
    weights = sum(tensor.nbytes for tensor in parameters(model))
    total = probe.attempt(setting.probe, setting.device).total.bytes
    for card_gb in CARDS_GB[:1] if setting.reduced else CARDS_GB:
        allowed = room(card_gb)
        if total is not None and allowed > total:
            found.lines.append(f"{card_gb} GB: this card is smaller")
            continue
        chosen = fit(
            allowed, plans(MemoryPlan(), size), lambda each: Need(weights, predicted(setting, model, size, each[1]))
        ).setting
        if chosen is None:
            found.lines.append(f"{card_gb} GB: no plan is predicted to fit")
            continue
        plan = chosen[1]

        def work(plan: MemoryPlan = plan) -> None:
            given, options = frames_of(size, 29), StreamOptions(scale=SCALE, kv_ratio=KV_RATIO)
            for _ in upscale_frames(model, given, options, device=setting.device, dtype=setting.dtype, plan=plan):
                pass

        peak = peak_of(work, setting.device, setting.probe).bytes
        row = {"card_gb": card_gb, "plan": str(plan), "room_bytes": allowed, "measured_bytes": peak and peak + weights}
        found.figures["cards"].append(row)
        taken = "unknown" if peak is None else f"{(peak + weights) / GIB:.2f} GiB"
        found.lines.append(f"{card_gb} GB, room for {allowed / GIB:.2f} GiB: {plan}: {taken}, weights included")
        if peak is not None and peak + weights > allowed:
            found.missed.append(f"a run within a card of {card_gb} GB")
    return found
