"""One run from file to file: decoder → engine → encoder, with one window of frames resident, and what it cost."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import Tensor

from ..memory.host import trim
from ..models.flashvsr import FlashVSR, StreamOptions, output_size, upscale_frames
from ..models.flashvsr.config import PRECISIONS
from ..models.flashvsr.memory_plan import MemoryPlan, smaller
from ..models.video import Clip, ClipWriter, DamagedVideoError, ImageSequenceWriter, VideoError

BF16_CAPABILITY = (8, 0)
"""The first CUDA capability that computes in bf16 natively (Ampere)."""


@dataclass(frozen=True)
class OutputOptions:
    """How the result is written; see `ClipWriter` and `ImageSequenceWriter`."""

    codec: str | None = None
    crf: int | None = None
    ten_bit: bool = False
    image_sequence: bool = False
    force: bool = False


@dataclass(frozen=True)
class RunReport:
    """What a run did and cost.

    Attributes:
        seconds: wall time from the first frame pulled to the finished file
        peak_rss_bytes: of the whole process since it began, Python and libraries included
        peak_cuda_bytes: of tensors on the CUDA device during the run; None without one
        complete: False where the source was damaged and only its readable part was written
    """

    output: str
    frames: int
    width: int
    height: int
    seconds: float
    frames_per_second: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None
    complete: bool
    notes: tuple[str, ...]


@dataclass
class _Damage:
    error: DamagedVideoError | None = None


class Ladder:
    """Goes down the engine's memory plans when an accelerator runs out of memory, and tells what it did.

    Attributes:
        notes: one sentence for each error that the run survived.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.notes: list[str] = []
        self._size = size

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        """For `upscale_frames`."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = smaller(plan, phase, self._size)
        if found is None:
            return None
        self.notes.append(f"Out of memory in {phase}; the run went on with less: {found[1]}.")
        return found[1]


def choose_device(name: str) -> torch.device:
    """auto: the CUDA device if there is one, else the CPU. Raises ValueError for a device that torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected auto, cpu or one that PyTorch sees; got {name!r} ({reason}).") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto: fp32 on the CPU, bf16 where CUDA computes in it natively, else fp16."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return torch.bfloat16
    return torch.float16


def open_writer(clip: Clip, path: str | Path, scale: float, options: OutputOptions) -> ClipWriter | ImageSequenceWriter:
    """A writer for the clip at its output size: same rate, times, sound, pixel aspect and colour tags."""
    width, height = output_size(clip.width, clip.height, scale)
    if options.image_sequence:
        if options.codec is not None or options.crf is not None:
            raise ValueError(f"{Path(path).name}: expected no --codec and no --crf for an image sequence (PNG).")
        return ImageSequenceWriter(path, width, height, sixteen_bit=options.ten_bit, force=options.force)
    return ClipWriter(
        path, width, height, clip.frame_rate, time_base=clip.time_base, audio=clip, colour=clip.colour,
        sample_aspect_ratio=clip.sample_aspect_ratio, codec=options.codec, crf=options.crf, ten_bit=options.ten_bit,
        force=options.force,
    )  # fmt: skip


def upscale_clip(
    model: FlashVSR,
    clip: Clip,
    writer: ClipWriter | ImageSequenceWriter,
    options: StreamOptions,
    *,
    vae=None,
    device: torch.device,
    dtype: torch.dtype,
    on_frame: Callable[[Tensor], object] = lambda frame: None,
    on_step: Callable[[str, int, int | None], object] = lambda phase, done, total: None,
    plan: MemoryPlan | None = None,
) -> RunReport:
    """Runs the clip through the model into the writer and finishes it.

    A source that turns out damaged on the way loses nothing: all frames read before are upscaled and stored as
    `NAME.partial.EXT`, and the report says that it is not complete. Any other exception leaves through here with the
    writer's file removed.

    Args:
        on_frame: called with every output frame (HWC float32 RGB 0..1 on the CPU) after it was written.
        on_step: see `upscale_frames`.
        plan: where the run begins on the ladder; None at its top.
    """
    times: deque[Fraction] = deque()
    damage = _Damage()

    def step(phase: str, done: int, total: int | None) -> None:
        if phase == "transform":
            # Freed frames leave holes in the heap; given back once a step, resident memory stays flat at no cost.
            trim()
        on_step(phase, done, total)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    try:
        source = _source(clip, times, damage)
        ladder = Ladder((writer.width, writer.height))
        # Not for the CPU: there the system ends the process, and the Wan decoder's cache would be kept twice.
        down = None if device.type == "cpu" else ladder.on_memory_error
        outputs = upscale_frames(
            model,
            source,
            options,
            vae=vae,
            device=device,
            dtype=dtype,
            on_step=step,
            on_memory_error=down,
            plan=plan,
        )
        # Closed by hand: a traceback keeps both generators, with all that they hold, until it is gone itself.
        with contextlib.closing(source), contextlib.closing(cast("Generator[Tensor, None, None]", outputs)):
            for frame in outputs:
                writer.write(frame, times.popleft())
                on_frame(frame)
        if damage.error is not None and not writer.frames_written:
            raise damage.error
        path = writer.finish(None if damage.error is None else _partial_name(writer.path))
    except BaseException:
        writer.abort()
        raise
    seconds = time.perf_counter() - started
    notes = (*clip.notes, *getattr(writer, "notes", ()), *ladder.notes)
    return RunReport(
        output=str(path),
        frames=writer.frames_written,
        width=writer.width,
        height=writer.height,
        seconds=seconds,
        frames_per_second=writer.frames_written / seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_cuda_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        complete=damage.error is None,
        notes=notes if damage.error is None else (*notes, str(damage.error)),
    )


def _source(clip: Clip, times: deque[Fraction], damage: _Damage) -> Generator[Tensor, None, None]:
    """The clip's frames; their times go to `times`. Damage ends the clip here: the engine then finishes what it has."""
    try:
        for frame, when in clip.frames_with_times():
            times.append(when)
            yield frame
    except DamagedVideoError as error:
        damage.error = error


def _partial_name(path: Path) -> Path:
    """The first free name of clip.partial.mp4, clip.partial2.mp4, …"""
    for number in range(1, 10_000):
        candidate = path.with_name(f"{path.stem}.partial{number if number > 1 else ''}{path.suffix}")
        if not candidate.exists():
            return candidate
    raise VideoError(f"{path}: expected a free name for the readable part; all of {path.stem}.partial* are taken.")


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since it began."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # Not getrusage: its peak starts with that of the process which started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # other systems count in KiB
