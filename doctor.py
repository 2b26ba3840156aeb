"""What can be measured on this machine, and whether memory comes back on it: tried with the embedded network."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .memory import holders, leak, offload, probe
from .memory.reading import Reading, size_text
from .memory.tracker import StorageTracker
from .models.flashvsr import FlashVSR, StreamOptions, upscale_frames

RUNS = leak.MINIMUM_RUNS
"""With fewer runs, noise alone looks like growth: below this number the leak line says nothing."""
FRAMES, SIDE = 9, 32
"""A clip of 32 × 32: 128 × 128 when upscaled, the smallest size that the engine computes."""
LATENTS, LATENT_SIDE = 2, 32
"""Of the clip that is decoded once and twice at a time."""

Offload = Callable[[FlashVSR, torch.device, probe.Probe], offload.Receipt]


@dataclass(frozen=True)
class Doubled:
    """Peak bytes of tensors of one computation on a batch of one, and on a batch of two as guidance makes it."""

    single: int
    double: int
    source: str


@dataclass(frozen=True)
class Findings:
    """What the doctor saw.

    Attributes:
        devices: one reading of each device.
        device: the one that was tried.
        receipt: of the offload of the embedded network.
        dropped: bytes of its weights that were alive before the last reference was dropped, and after.
        growth: over the runs.
        after_runs: bytes after each run.
        doubled: guidance off against batched.
        problems: what is not as it should be; empty is healthy.
    """

    devices: tuple[Reading, ...]
    device: str
    receipt: offload.Receipt
    dropped: tuple[int, int]
    growth: leak.Growth | None
    after_runs: tuple[int, ...]
    doubled: Doubled | None
    seconds: float
    problems: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "devices": [reading.to_json() for reading in self.devices],
            "device": self.device,
            "offload": self.receipt.to_json(),
            "dropped": {"before": self.dropped[0], "after": self.dropped[1]},
            "growth": None if self.growth is None else {**vars(self.growth), "leaking": self.growth.leaking},
            "after_runs": list(self.after_runs),
            "guidance": None if self.doubled is None else vars(self.doubled),
            "seconds": self.seconds,
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The same for a person, one finding a line."""
        text = []
        for reading in self.devices:
            text.append(f"{reading.device}: {size_text(reading.used.bytes)} of {size_text(reading.total.bytes)} in use")
            for name in ("allocated", "reserved", "dynamic", "process", "used"):
                figure = getattr(reading, name)
                known = f"{size_text(figure.bytes)} ({figure.source}, {figure.confidence})"
                if figure.bytes is not None or figure.note:
                    text.append(f"  {name}: {known if figure.bytes is not None else f'unknown: {figure.note}'}")
            text += [
                f"  another process: {other.name} ({other.pid}) {size_text(other.bytes)}" for other in reading.others
            ]
            text += [f"  note: {note}" for note in reading.notes]
        text.append(f"offload on {self.device}: {self.receipt.verdict.value} · {self.receipt}")
        before, after = self.dropped
        text.append(f"dropped: {size_text(before)} of weights, {size_text(after)} alive afterwards")
        text.append(f"{len(self.after_runs)} runs: {self.growth if self.growth else 'nothing to count them with'}")
        if self.doubled is not None:
            single, double = self.doubled.single, self.doubled.double
            text.append(
                f"guidance off {size_text(single)} · batched {size_text(double)} at the peak, "
                f"{double / max(single, 1):.2f} times ({self.doubled.source})"
            )
        text += [f"PROBLEM: {problem}" for problem in self.problems] or ["nothing is held, nothing grows"]
        return text


def examine(
    load: Callable[[], FlashVSR],
    device: torch.device,
    *,
    reader: probe.Probe | None = None,
    move: Offload | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Findings:
    """Loads the network, runs it, offloads it, drops it, and measures all along.

    Args:
        load: gives the network, on the CPU.
        reader: what to read with; None is the probe of the process.
        move: loads the network onto the device and offloads it, verified; None moves it with `torch.nn.Module.to`.
        on_step: called with what is about to be done; what it raises leaves through here.
    """
    started = time.perf_counter()
    reader = reader or probe.current()
    on_step("devices")
    devices = tuple(probe.attempt(reader, each, settled=True) for each in probe.devices())
    model = load()
    on_step("offload")
    receipt = (move or _moved_by_torch)(model, device, reader)
    on_step("runs")
    after_runs, growth = _runs(model, device, reader, on_step)
    on_step("guidance")
    doubled = _doubled(model, device)
    on_step("drop")
    watched = holders.watch((name, x) for part in _parts(model) for name, x in part.state_dict().items())
    before = sum(item.bytes for item in watched if item.alive)
    del model
    gc.collect()
    after = sum(item.bytes for item in watched if item.alive)
    problems = []
    if receipt.verdict is offload.Verdict.STILL_HELD:
        problems.append(f"memory is held after an offload: {receipt}")
    if receipt.error:
        problems.append(f"the offload failed: {receipt.error}")
    if growth is not None and growth.leaking:
        problems.append(f"memory grows from run to run: {growth}")
    if after:
        problems.append(f"{size_text(after)} of weights stay alive although nobody uses them")
    seconds = time.perf_counter() - started
    return Findings(
        devices, str(device), receipt, (before, after), growth, after_runs, doubled, seconds, tuple(problems)
    )


def _parts(model: FlashVSR) -> list[torch.nn.Module]:
    return [model.transformer, model.lq_projection, model.decoder]


def _moved_by_torch(model: FlashVSR, device: torch.device, reader: probe.Probe) -> offload.Receipt:
    """Outside ComfyUI this process owns the network, and moves it itself."""
    rest = torch.device("cpu")
    parts = torch.nn.ModuleList(_parts(model)).to(device)

    def move() -> None:
        parts.to(rest)

    subject = offload.Subject(
        name="the embedded network",
        load_device=device,
        offload_device=rest,
        loaded_bytes=lambda: sum(x.nbytes for x in parts.parameters() if holders.same_device(x.device, device)),
        move=move,
        tensors=lambda: [*parts.named_parameters(), *parts.named_buffers()],
    )
    return offload.offload(subject, lambda: _empty(device), reader=reader)


def _empty(device: torch.device) -> None:
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()


def _runs(
    model: FlashVSR, device: torch.device, reader: probe.Probe, on_step: Callable[[str], None]
) -> tuple[tuple[int, ...], leak.Growth | None]:
    """Bytes of tensors after each of a dozen equal runs. On the CPU a tracker counts them."""
    frames = list(torch.rand(FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0)))
    after: list[int] = []
    tracker = StorageTracker(exclude=[*frames, model.prompt, *(x for part in _parts(model) for x in part.parameters())])
    for _ in range(RUNS):
        if device.type == "cpu":
            with tracker:
                _run(model, frames, device, on_step)
            gc.collect()
            after.append(tracker.now)
            continue
        _run(model, frames, device, on_step)
        gc.collect()
        figure = probe.attempt(reader, device, settled=True).tensors
        if figure.bytes is None:
            return (), None
        after.append(figure.bytes)
    return tuple(after), leak.fit(after)


def _run(
    model: FlashVSR, frames: list[torch.Tensor], device: torch.device, on_step: Callable[[str], None]
) -> None:
    stream = upscale_frames(model, frames, StreamOptions(), device=device, on_step=lambda *_: on_step("runs"))
    for _ in stream:
        pass


def _doubled(model: FlashVSR, device: torch.device) -> Doubled | None:
    """Guidance computes two prompts in one batch: what that costs, measured on the decoder with one clip and two."""
    peaks = []
    dtype = torch.float32 if device.type == "cpu" else model.prompt.dtype
    channels = model.transformer.config.in_dim
    for batch in (1, 2):
        latents = torch.zeros(batch, LATENTS, channels, LATENT_SIDE, LATENT_SIDE, device=device, dtype=dtype)
        condition = torch.zeros(batch, 4 * LATENTS - 3, 3, 8 * LATENT_SIDE, 8 * LATENT_SIDE, device=device, dtype=dtype)
        with torch.inference_mode():
            if device.type == "cpu":
                with StorageTracker() as tracker:
                    model.decoder(latents, condition, None)
                peaks.append(tracker.peak)
            elif device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                model.decoder(latents, condition, None)
                peaks.append(torch.cuda.max_memory_allocated(device) - before)
            else:
                return None
    return Doubled(peaks[0], peaks[1], "tracker" if device.type == "cpu" else "torch.cuda")
