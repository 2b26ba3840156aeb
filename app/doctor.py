"""What can be measured on this machine, and whether memory comes back: tried out with the embedded network."""

from __future__ import annotations

import functools
import gc
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..memory import holders, leak, offload, probe
from ..memory.reading import Figure, Reading, exact, size_text, unknown
from ..memory.tracker import StorageTracker
from ..models.flashvsr import FlashVSR, StreamOptions, upscale_frames

RUNS = leak.MINIMUM_RUNS
"""With fewer runs noise alone looks like growth, and the leak line says nothing."""
FRAMES, SIDE = 9, 32
"""A clip of 32 × 32: 128 × 128 when upscaled, the smallest size that the engine computes."""
LATENTS, LATENT_SIDE = 2, 32
"""Of the latents that are decoded as a batch of one and of two."""
FINE, HELD, NOT_MEASURED = 0, 1, 2
"""Exit codes."""

Offload = Callable[[FlashVSR, torch.device, probe.Probe], offload.Receipt]


@dataclass(frozen=True)
class Guidance:
    """Peak bytes of tensors in one computation with guidance "off", "batched", ….

    Attributes:
        peaks: bytes by mode.
        measured_on: which computation.
        source: what counted them.
    """

    peaks: Mapping[str, int]
    measured_on: str
    source: str

    def __str__(self) -> str:
        off = max(self.peaks["off"], 1)
        sizes = " · ".join(f"{mode} {size_text(size)} ({size / off:.2f} times)" for mode, size in self.peaks.items())
        return f"{sizes}; {self.measured_on}, {self.source}"


Measure = Callable[[FlashVSR, torch.device, probe.Probe], Guidance | None]


@dataclass(frozen=True)
class Findings:
    """What the doctor found.

    Attributes:
        machine: versions, and the name of each card.
        devices: one reading per device.
        device: the one that was tried out.
        receipt: of offloading the embedded network.
        dropped: bytes of its weights alive before the last reference was dropped, and after.
        growth: over the runs; None if it cannot be counted.
        after_runs: bytes after each run.
        guidance: off against batched.
        problems: what is wrong; empty if all is well.
        unmeasured: questions that cannot be answered here.
    """

    machine: Mapping[str, str]
    devices: tuple[Reading, ...]
    device: str
    receipt: offload.Receipt
    dropped: tuple[int, int]
    growth: leak.Growth | None
    after_runs: tuple[int, ...]
    guidance: Guidance | None
    seconds: float
    problems: tuple[str, ...] = field(default=())
    unmeasured: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """0: nothing is held and nothing grows. 1: something does. 2: that could not be measured."""
        return HELD if self.problems else NOT_MEASURED if self.unmeasured else FINE

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "machine": dict(self.machine),
            "devices": [reading.to_json() for reading in self.devices],
            "device": self.device,
            "offload": self.receipt.to_json(),
            "dropped": {"before": self.dropped[0], "after": self.dropped[1]},
            "growth": None if self.growth is None else {**vars(self.growth), "leaking": self.growth.leaking},
            "after_runs": list(self.after_runs),
            "guidance": None if self.guidance is None else {**vars(self.guidance), "peaks": dict(self.guidance.peaks)},
            "seconds": self.seconds,
            "problems": list(self.problems),
            "unmeasured": list(self.unmeasured),
            "exit_code": self.exit_code,
        }

    def lines(self) -> list[str]:
        """The same for people, one finding per line."""
        text = [" · ".join(f"{what} {version}" for what, version in self.machine.items())]
        for reading in self.devices:
            text += _device_lines(reading)
        text.append(f"offload on {self.device}: {self.receipt.verdict.value} · {self.receipt}")
        before, after = self.dropped
        text.append(f"dropped: {size_text(before)} of weights, {size_text(after)} alive afterwards")
        text.append(f"{len(self.after_runs)} runs: {self.growth if self.growth else 'nothing to count them with'}")
        text.append(f"guidance at the peak: {self.guidance or 'no peak counter here'}")
        text += [f"PROBLEM: {problem}" for problem in self.problems]
        text += [f"NOT MEASURED: {question}" for question in self.unmeasured]
        return text if self.exit_code else [*text, "nothing is held, nothing grows"]


def _device_lines(reading: Reading) -> list[str]:
    """What is known about one device and from which source; then the other processes on it."""
    lines = [f"{reading.device}: {size_text(reading.used.bytes)} of {size_text(reading.total.bytes)} in use"]
    for name in ("allocated", "reserved", "inactive_split", "dynamic", "process", "used"):
        figure = getattr(reading, name)
        if figure.bytes is not None:
            lines.append(f"  {name}: {size_text(figure.bytes)} ({figure.source}, {figure.confidence})")
        elif figure.note:
            lines.append(f"  {name}: unknown: {figure.note}")
    for other in reading.others:
        lines.append(f"  another process: {other.name} ({other.pid}) {size_text(other.bytes)}")
    if not reading.others and reading.device.startswith("cuda"):
        listed = reading.used.source == "NVML"
        lines.append(f"  other processes: {'NVML lists none' if listed else 'unknown without NVML'}")
    said = {figure.note for figure in vars(reading).values() if isinstance(figure, Figure)}
    return lines + [f"  note: {note}" for note in reading.notes if note not in said]


def examine(
    load: Callable[[], FlashVSR],
    device: torch.device,
    *,
    reader: probe.Probe | None = None,
    move: Offload | None = None,
    guidance: Measure | None = None,
    on_step: Callable[[str], None] = lambda what: None,
) -> Findings:
    """Loads the network, offloads it, runs it and drops it, measuring all along.

    Args:
        load: returns the network, on the CPU.
        reader: what to read with; None: the probe of the process.
        move: loads the network onto the device and offloads it, verified; None: with `torch.nn.Module.to`.
        guidance: measures guidance off against batched; None: with the network's decoder.
        on_step: called with the name of the next step; what it raises leaves through here.
    """
    started = time.perf_counter()
    reader = reader or probe.current()
    on_step("devices")
    tried = probe.attempt(reader, device, settled=True)
    others = [each for each in probe.devices() if str(each) != tried.device]
    devices = (tried, *(probe.attempt(reader, each, settled=True) for each in others))
    model = load()
    on_step("offload")
    receipt = (move or _moved_by_torch)(model, device, reader)
    on_step("runs")
    after_runs, growth = _runs(model, device, reader, on_step)
    on_step("guidance")
    measured = (guidance or _decoder_guidance)(model, device, reader)
    on_step("drop")
    watched = holders.watch((name, x) for part in _parts(model) for name, x in part.state_dict().items())
    before = sum(item.bytes for item in watched if item.alive)
    del model
    gc.collect()
    after = sum(item.bytes for item in watched if item.alive)
    problems, unmeasured = [], []
    if receipt.verdict is offload.Verdict.STILL_HELD:
        problems.append(f"memory is held after an offload: {receipt}")
    if receipt.error:
        problems.append(f"the offload failed: {receipt.error}")
    if growth is not None and growth.leaking:
        problems.append(f"memory grows from run to run: {growth}")
    if after:
        problems.append(f"{size_text(after)} of weights stay alive although nobody uses them")
    if tried.tensors.bytes is None and tried.used.bytes is None:
        unmeasured.append(f"{tried.device}: {'; '.join(tried.notes) or 'no figure can be read'}")
    if receipt.verdict is offload.Verdict.UNVERIFIABLE:
        unmeasured.append(f"whether an offload gives memory back: {'; '.join(receipt.notes)}")
    if receipt.verdict is offload.Verdict.NOT_LOADED:
        unmeasured.append(f"whether an offload gives memory back: nothing was loaded onto {tried.device}")
    if growth is None:
        unmeasured.append("whether memory grows from run to run: tensors cannot be counted")
    return Findings(
        _machine(devices), devices, tried.device, receipt, (before, after), growth, after_runs, measured,
        time.perf_counter() - started, tuple(problems), tuple(unmeasured),
    )  # fmt: skip


def _machine(devices: tuple[Reading, ...]) -> dict[str, str]:
    names = {"torch": torch.__version__, "Python": platform.python_version(), "on": platform.system()}
    for reading in devices:
        if reading.device.startswith("cuda") and torch.cuda.is_available():
            names[reading.device] = torch.cuda.get_device_name(reading.device)
    return names


def _parts(model: FlashVSR) -> list[torch.nn.Module]:
    return [model.transformer, model.lq_projection, model.decoder]


def _moved_by_torch(model: FlashVSR, device: torch.device, reader: probe.Probe) -> offload.Receipt:
    """Outside ComfyUI this process owns the network and moves it itself."""
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
    return offload.offload(subject, lambda: probe.empty_cache(device), reader=reader)


def _runs(
    model: FlashVSR, device: torch.device, reader: probe.Probe, on_step: Callable[[str], None]
) -> tuple[tuple[int, ...], leak.Growth | None]:
    """Bytes of tensors after each of `RUNS` equal runs. On the CPU a tracker counts them."""
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


def _run(model: FlashVSR, frames: list[torch.Tensor], device: torch.device, on_step: Callable[[str], None]) -> None:
    stream = upscale_frames(model, frames, StreamOptions(), device=device, on_step=lambda *_: on_step("runs"))
    for _ in stream:
        pass


def peak_of(work: Callable[[], Any], device: torch.device, reader: probe.Probe) -> Figure:
    """Peak bytes of the tensors that `work` makes; unknown if nothing counts peaks on this device."""
    if device.type == "cpu":
        with StorageTracker() as tracker:
            work()
        return exact(tracker.peak, "tracker")
    before = probe.attempt(reader, device)
    if before.peak.bytes is None or before.allocated.bytes is None:
        return unknown("no peak counter")
    reader.reset_peak(device)
    work()
    reader.synchronise(device)
    after = probe.attempt(reader, device).peak
    return after if after.bytes is None else exact(after.bytes - before.allocated.bytes, after.source)


def _decoder_guidance(model: FlashVSR, device: torch.device, reader: probe.Probe) -> Guidance | None:
    """Guidance doubles the batch. Outside ComfyUI there is no sampler: the decoder takes one clip, then two."""
    found = {}
    dtype = torch.float32 if device.type == "cpu" else model.prompt.dtype
    channels = model.transformer.config.in_dim
    for mode, batch in (("off", 1), ("batched", 2)):
        latents = torch.zeros(batch, LATENTS, channels, LATENT_SIDE, LATENT_SIDE, device=device, dtype=dtype)
        condition = torch.zeros(batch, 4 * LATENTS - 3, 3, 8 * LATENT_SIDE, 8 * LATENT_SIDE, device=device, dtype=dtype)
        with torch.inference_mode():
            found[mode] = peak_of(functools.partial(model.decoder, latents, condition, None), device, reader)
    measured_on = "one clip and two in the embedded decoder; the node Memory Doctor measures a sampler's guidance"
    return guidance_of(found, measured_on)


def guidance_of(found: Mapping[str, Figure], measured_on: str) -> Guidance | None:
    """The peaks as `Guidance`; None if one is unknown."""
    peaks = {mode: figure.bytes for mode, figure in found.items() if figure.bytes is not None}
    return Guidance(peaks, measured_on, found["off"].source) if len(peaks) == len(found) else None
