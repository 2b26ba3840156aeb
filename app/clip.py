"""One run from file to file: decoder → engine → encoder, each in a thread of its own. Only a window is in memory.

The command line, the workers of a folder run and the VIDEO node all go through `write_footage`.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..memory import probe
from ..memory.host import trim
from ..models.flashvsr import FlashVSR, StreamOptions, output_size, upscale_frames
from ..models.flashvsr.config import PRECISIONS
from ..models.flashvsr.memory_plan import MemoryPlan, smaller
from ..models.video import (
    Clip,
    ClipWriter,
    ColourTags,
    DamagedVideoError,
    ImageSequenceWriter,
    MuxingError,
    VideoError,
    Waveform,
)
from .pipeline import read_ahead, written_behind

BF16_CAPABILITY = (8, 0)
"""The first CUDA capability that computes in bf16 natively (Ampere)."""
MEMORY_WORDS = ("DefaultCPUAllocator", "not enough memory", "out of memory")
"""By which a RuntimeError of torch is known as one of memory: its CPU allocator on Linux, on Windows, cuDNN."""
STEP_FRAMES = 8
"""The engine pulls so many frames for each of its steps."""
READ_BYTES, WRITE_BYTES, WAITING_FRAMES = 128 << 20, 192 << 20, 16
"""At most these bytes, and so many frames, wait before and behind the engine: at 4K output, more than the frames of one
of its steps, packed in 8 bits. Of small frames, more would only be memory."""

Upscale = Callable[[Generator[Tensor, None, None]], Generator[Tensor, None, None]]
"""The engine: frames HWC 0..1 in, as many of the output size out: HWC 0..1, or packed by the writer's `pack`."""


@dataclass(frozen=True)
class OutputOptions:
    """How the result is written; see `ClipWriter` and `ImageSequenceWriter`."""

    codec: str | None = None
    crf: int | None = None
    ten_bit: bool = False
    image_sequence: bool = False
    force: bool = False
    preset: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Footage:
    """A clip as a run takes it, from a file or from tensors.

    Attributes:
        frames: begins a pass through the frames: HWC float RGB 0..1, each with its time in seconds.
        width, height: of the frames.
        count: how many there are; None where nothing says so.
        frame_rate: frames per second.
        time_base: seconds per tick of the times.
        sound: what goes along into the output file.
        colour, sample_aspect_ratio: see `ClipWriter`.
        notes: what a user should be told about the source; complete after a pass.
        decoded: whether the frames are decoded on the way, which a thread of its own may do ahead of the engine.
    """

    frames: Callable[[], Iterator[tuple[Tensor, Fraction]]]
    width: int
    height: int
    count: int | None
    frame_rate: Fraction
    time_base: Fraction
    sound: Clip | Waveform | None = None
    colour: ColourTags = ColourTags()
    sample_aspect_ratio: Fraction = Fraction(1)
    notes: Sequence[str] = ()
    decoded: bool = False


@dataclass(frozen=True)
class RunReport:
    """What a run did and cost.

    Attributes:
        seconds: from the first frame pulled to the finished file.
        peak_rss_bytes: of the whole process since it started, Python and libraries included.
        peak_cuda_bytes: of tensors on the CUDA device during the run; None without one.
        complete: False if the source was damaged and only its readable part was written.
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


class Ladder:
    """Steps down the engine's memory plans when an accelerator runs out of memory, and records each step.

    Attributes:
        notes: one sentence for each error that the run survived.
    """

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.notes: list[str] = []
        self._size, self._device = size, device

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        """For `upscale_frames`."""
        probe.empty_cache(self._device)
        found = smaller(plan, phase, self._size)
        if found is None:
            return None
        self.notes.append(f"Out of memory in {phase}; the run went on with less: {found[1]}.")
        return found[1]


def choose_device(name: str) -> torch.device:
    """The device of that name; auto: CUDA if there is any, else the CPU. Raises ValueError for one torch lacks."""
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
    """The compute dtype; auto: fp32 on the CPU, bf16 where CUDA computes in it natively, else fp16."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY:
        return torch.bfloat16
    return torch.float16


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a card's, or the machine's, for which torch has no type of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)


def footage_of(clip: Clip) -> Footage:
    """The clip of a file, ready for a run.

    Raises:
        DamagedVideoError: the file is cut off or unreadable, and the clip was not opened with damaged="keep". To find
            out takes minutes of reading at most, before hours of work that would end in the same message.
    """
    notes = [*clip.notes, *clip.verify()]
    return Footage(
        partial(clip.frames_with_times, notes.append), clip.width, clip.height, clip.frame_count, clip.frame_rate,
        clip.time_base, clip, clip.colour, clip.sample_aspect_ratio, notes, decoded=True,
    )  # fmt: skip


def open_writer(
    footage: Footage, path: str | Path, scale: float, options: OutputOptions
) -> ClipWriter | ImageSequenceWriter:
    """A writer for the footage at its output size: a video with the source's times and sound, or a folder of PNGs."""
    if not options.image_sequence:
        return open_video(footage, path, scale, options)
    if (options.codec, options.crf, options.preset) != (None, None, None):
        raise ValueError(f"{Path(path).name}: expected no --codec, --crf or --preset for an image sequence (PNG).")
    width, height = output_size(footage.width, footage.height, scale)
    return ImageSequenceWriter(path, width, height, sixteen_bit=options.ten_bit, force=options.force)


def open_video(footage: Footage, path: str | Path, scale: float, options: OutputOptions) -> ClipWriter:
    """A video with the footage's rate, times, sound, pixel aspect and colour tags."""
    width, height = output_size(footage.width, footage.height, scale)
    return ClipWriter(
        path, width, height, footage.frame_rate, time_base=footage.time_base, audio=footage.sound,
        colour=footage.colour, sample_aspect_ratio=footage.sample_aspect_ratio, codec=options.codec, crf=options.crf,
        ten_bit=options.ten_bit, preset=options.preset, threads=options.threads, force=options.force,
    )  # fmt: skip


def write_footage(
    footage: Footage,
    upscale: Upscale,
    writer: ClipWriter | ImageSequenceWriter,
    on_frame: Callable[[Tensor], object] = lambda frame: None,
) -> tuple[Path, DamagedVideoError | None]:
    """Pulls the footage through the engine into the writer and finishes the file.

    Frames are decoded and encoded in threads of their own while the engine works here; so many as `READ_BYTES`,
    `WRITE_BYTES` and `WAITING_FRAMES` say may wait in between. All three have ended when this returns or raises.

    Footage that turns out damaged on the way loses nothing: all frames before the damage are upscaled and stored as
    `NAME.partial.EXT`, and so are those before a `MuxingError`, whose message then says so. Any other exception leaves
    through here with the writer's file removed and both generators closed.

    Args:
        on_frame: called with every output frame, as `upscale` gave it, when it was handed to the writer.

    Returns:
        The path of the file, and the damage if there was any.

    Raises:
        DamagedVideoError: not one frame can be read.
        MuxingError: the output's container cannot hold this.
    """
    times: deque[Fraction] = deque()
    damage: list[DamagedVideoError] = []

    def source() -> Generator[Tensor, None, None]:
        count = 0
        try:
            for count, (frame, moment) in enumerate(footage.frames(), 1):
                if count % STEP_FRAMES == 1:
                    # Freed frames leave holes in the heap; given back once a step, resident memory stays flat.
                    trim()
                times.append(moment)
                yield frame
        except DamagedVideoError as error:
            if not count:
                raise
            # For the engine the footage ends here: it finishes what it has.
            damage.append(error)

    def write(item: tuple[Tensor, Fraction]) -> None:
        writer.write(*item)

    try:
        # Closed by hand: a traceback keeps both generators, with all that they hold, until it is gone itself.
        frames = source()
        if footage.decoded:
            frames = read_ahead(frames, lambda frame: max(frame.nbytes, READ_BYTES // WAITING_FRAMES), READ_BYTES)
        with (
            closing(frames) as pulled,
            closing(upscale(pulled)) as outputs,
            written_behind(write, lambda item: max(item[0].nbytes, WRITE_BYTES // WAITING_FRAMES), WRITE_BYTES) as put,
        ):
            for frame in outputs:
                put((frame, times.popleft()))
                on_frame(frame)
                del frame
        path = writer.finish(_partial_name(writer.path) if damage else None)
    except MuxingError as error:
        try:
            assert isinstance(writer, ClipWriter)  # images are not muxed
            kept = writer.keep(_partial_name(writer.path))
        except BaseException:
            writer.abort()
            raise error from None
        raise MuxingError(f"{error} The frames before it are in {kept}.") from error
    except BaseException:
        writer.abort()
        raise
    return path, damage[0] if damage else None


def upscale_clip(
    model: FlashVSR,
    footage: Footage,
    writer: ClipWriter | ImageSequenceWriter,
    options: StreamOptions,
    *,
    vae=None,
    device: torch.device,
    dtype: torch.dtype,
    on_frame: Callable[[Tensor], object] = lambda frame: None,
    on_step: Callable[[str, int, int | None], object] = lambda phase, done, total: None,
    plan: MemoryPlan | None = None,
    packed: bool = True,
) -> RunReport:
    """`write_footage` with the engine, outside ComfyUI, and what it cost.

    Args:
        on_frame: see `write_footage`.
        on_step: see `upscale_frames`.
        plan: where the run begins on the ladder; None at its top.
        packed: frames leave the device as the writer packs them; False: as RGB, for an `on_frame` that looks at them.
    """
    ladder = Ladder((writer.width, writer.height), device)
    upscale = partial(
        upscale_frames, model, options=options, vae=vae, device=device, dtype=dtype, on_step=on_step, plan=plan,
        finish=writer.pack if packed else None,
        # Not on the CPU: there the system kills the process, and the Wan decoder's cache would be kept twice.
        on_memory_error=None if device.type == "cpu" else ladder.on_memory_error,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    path, damage = write_footage(footage, upscale, writer, on_frame)
    seconds = time.perf_counter() - started
    notes = (*footage.notes, *getattr(writer, "notes", ()), *ladder.notes)
    return RunReport(
        output=str(path),
        frames=writer.frames_written,
        width=writer.width,
        height=writer.height,
        seconds=seconds,
        frames_per_second=writer.frames_written / seconds,
        peak_rss_bytes=peak_rss_bytes(),
        peak_cuda_bytes=peak_cuda_bytes(device),
        complete=damage is None,
        notes=notes if damage is None else (*notes, str(damage)),
    )


def _partial_name(path: Path) -> Path:
    """The first free name of clip.partial.mp4, clip.partial2.mp4, …"""
    for number in range(1, 10_000):
        candidate = path.with_name(f"{path.stem}.partial{number if number > 1 else ''}{path.suffix}")
        if not os.path.lexists(candidate):
            return candidate
    raise VideoError(f"{path}: expected a free name for the readable part; all of {path.stem}.partial* are taken.")


def peak_cuda_bytes(device: torch.device) -> int | None:
    """Highest allocation of tensors on a CUDA device since the run began; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


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
