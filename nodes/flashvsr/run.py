"""One run of the engine inside ComfyUI: loads the weights, streams frames, shows progress and reports at the end."""

from __future__ import annotations

import gc
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TypeVar

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.v0_0_2 import Input, InputImpl
from torch import Tensor

from ...app.clip import Footage, OutputOptions, footage_of, open_video, write_footage
from ...models.flashvsr import StreamOptions, output_size, upscale_frames
from ...models.video import ClipWriter, DamagedVideoError, Waveform, open_clip
from ...patches.versions import is_out_of_memory, memory_errors, trim_window
from .. import node_status
from .memory import RunLimits, RunMemory
from .model import LoadedFlashVSR
from .progress import RunProgress
from .wan_decoder import StreamingWanVAE

Result = TypeVar("Result")


@dataclass
class Run:
    """One execution of an upscale node.

    Attributes:
        node: its display name, which errors begin with.
        flashvsr: the model.
        options: of the engine.
        vae: replaces the model's own decoder; None keeps it.
        node_id: of the node in the graph, for the progress bar.
        limits: what the user allows it in memory.
        report: what was done and measured, as plain values; complete when the run has ended.
    """

    node: str
    flashvsr: LoadedFlashVSR
    options: StreamOptions
    vae: StreamingWanVAE | None
    node_id: str | None
    limits: RunLimits = RunLimits()
    report: dict = field(default_factory=lambda: {"notes": []})

    def note(self, text: str) -> None:
        """Adds something the user should know to the report."""
        self.report["notes"].append(text)

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result.

        Raises:
            ValueError: the frames are too small.
        """
        try:
            return output_size(width, height, self.options.scale)
        except ValueError as error:
            raise ValueError(f"{self.node}: {str(error).partition(': ')[2]} Use larger frames.") from error

    def upscale(
        self, frames: Iterable[Tensor], width: int, height: int, count: int, writer: ClipWriter | None = None
    ) -> Generator[Tensor, None, None]:
        """Yields HWC fp32 frames in 0..1 on the CPU, or those for a writer as it packs them.

        Close the generator to end a run early; that releases everything the run holds.

        Args:
            frames: HWC 0..1, all of width × height.
            count: how many there are, or a guess; for the progress bar.
        """
        model, size = self.flashvsr, self.output_size(width, height)
        patchers = model.patchers(decoder=self.vae is None)
        if self.vae is not None:
            patchers.append(self.vae.patcher)
        memory = RunMemory(self.node, model, patchers, self.vae, size, self.options.kv_ratio, self.limits)
        progress = RunProgress(count, self.node_id, None if writer is None else writer.picture)

        def step(phase: str, done: int, total: int | None) -> None:
            progress(phase, done, total)
            memory.on_step(phase, done, total)

        with memory.running():
            started = time.perf_counter()
            stream = upscale_frames(
                model.networks(),
                frames,
                self.options,
                vae=self.vae,
                device=model.device,
                dtype=model.dtype,
                finish=None if writer is None else writer.pack,
                on_step=step,
                plan=memory.plan,
                memory_errors=memory_errors(),
                on_memory_error=memory.on_memory_error,
            )
            with closing(stream):
                for frame in stream:
                    progress.frame(frame)
                    yield frame
            progress.finish()
            seconds = time.perf_counter() - started
        self.report |= {
            "node": self.node,
            "model": model.name,
            "version": model.version,
            "frames": progress.frames,
            "input_size": [width, height],
            "output_size": list(size),
            "scale": self.options.scale,
            "seed": self.options.seed,
            "decoder": "tc" if self.vae is None else "vae",
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": round(seconds, 3),
            "frames_per_second": round(progress.frames / seconds, 3),
            "weights_loaded_bytes": sum(patcher.loaded_size() for patcher in patchers),
            "memory": memory.report,
        }
        node_status.send(self.node_id, memory=memory.summary())


class TempVideo(str):
    """Path of a video that nobody else knows: the file goes with the last object that holds this value.

    A VIDEO holds it, and so does what other nodes cut from that VIDEO: the file goes when ComfyUI caches none of them.
    """

    def __new__(cls, path: Path) -> TempVideo:
        made = super().__new__(cls, path)
        weakref.finalize(made, _remove, path)
        return made


def _remove(path: Path) -> None:
    with suppress(OSError):  # in use, on Windows: ComfyUI empties the folder when it starts
        path.unlink(missing_ok=True)


def with_room(node: str, what: str, work: Callable[[], Result]) -> Result:
    """Calls `work`, which comes before the engine and its ladder; once more, with the caches emptied, if it must be.

    Raises:
        mm.OOM_EXCEPTION: memory ran out again.
    """
    try:
        return work()
    except memory_errors() as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the traceback holds what was made.
    gc.collect()
    mm.soft_empty_cache()
    try:
        return work()
    except memory_errors() as error:
        if not is_out_of_memory(error):
            raise
        raise mm.OOM_EXCEPTION(
            f"{node}: out of memory for {what}, and nothing is left to try ({error}). Upscale fewer frames at once, or "
            "use FlashVSR Upscale Video, which keeps a window of them."
        ) from error


def checked_frames(images: Tensor, node: str) -> Iterator[Tensor]:
    """The frames of an IMAGE batch, THWC with 1, 3 or 4 channels, as RGB views.

    Raises:
        ValueError: a frame with NaN or infinity; the message names it.
    """
    for index, frame in enumerate(images):
        if not with_room(node, f"a look at frame {index}", lambda frame=frame: bool(torch.isfinite(frame).all())):
            raise ValueError(
                f"{node}: expected finite pixel values; got NaN or infinity in frame {index}. Check the node before it."
            )
        yield frame.expand(-1, -1, 3) if frame.shape[2] == 1 else frame[..., :3]


def upscale_video(run: Run, video: Input.Video) -> Path:
    """Streams a VIDEO through the engine into a new file in ComfyUI's temp folder and returns its path.

    A run that is interrupted or fails leaves no file.

    Raises:
        DamagedVideoError: the file is damaged. Where that shows only on the way, the message names the file with the
            frames before it.
    """
    footage = _footage(video, run)
    width, height = run.output_size(footage.width, footage.height)
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    writer = open_video(footage, folder / f"steadyvsr_{uuid.uuid4().hex}.mp4", run.options.scale, OutputOptions())
    upscale = partial(run.upscale, width=footage.width, height=footage.height, count=footage.count or 1, writer=writer)
    path, damage = write_footage(footage, upscale, writer)
    if damage is not None:
        raise DamagedVideoError(
            f"{run.node}: {damage} The frames before that, upscaled, are in {path}: copy it before ComfyUI restarts, "
            "which empties that folder.",
            damage.frames_read,
        ) from damage
    for text in (*footage.notes, *writer.notes):
        run.note(text)
    if writer.encoding.pixel_format != "yuv420p":
        run.note(f"{width}x{height} is written as {writer.encoding.pixel_format}: an odd size has no 4:2:0 form.")
    return path


def _footage(video: Input.Video, run: Run) -> Footage:
    if isinstance(video, InputImpl.VideoFromFile):
        start, duration = trim_window(video)
        return footage_of(open_clip(video.get_stream_source(), start=start, duration=duration))
    components = video.get_components()
    count, height, width, channels = components.images.shape
    if count == 0:
        raise ValueError(f"{run.node}: expected at least 1 frame; got an empty video. Check the node before it.")
    notes = ("The alpha channel was dropped.",) if channels == 4 else ()
    step = 1 / Fraction(components.frame_rate)

    def frames() -> Iterator[tuple[Tensor, Fraction]]:
        for index, frame in enumerate(checked_frames(components.images, run.node)):
            yield frame, index * step

    sound = None
    if components.audio:
        # The picture may end before the sound: both end with the picture, as in ComfyUI's own Create Video.
        rate = int(components.audio["sample_rate"])
        sound = Waveform(components.audio["waveform"][0, :, : round(count * step * rate)], rate)
    return Footage(frames, width, height, count, Fraction(components.frame_rate), step, sound, notes=notes)
