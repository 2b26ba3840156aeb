"""Reading clips: frames come out upright, in RGB float32, one at a time, each with its time.

A `Clip` is a description and holds no open file. Every call of `frames_with_times` opens the source for itself and
closes it at the end, so memory does not depend on the clip's length and two readers do not disturb each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from . import images
from .completeness import Progress, header_end, missing_tail, swallowed_frames
from .orientation import Uprighter, display_matrix, turns_sideways, upright
from .pixels import (
    MATRIX_BT709,
    PRIMARIES_BT709,
    PRIMARIES_UNSPECIFIED,
    TRANSFER_BT709,
    TRANSFER_UNSPECIFIED,
    ColourTags,
    bit_depth,
    frame_to_rgb,
    has_alpha,
    matrix_of,
)
from .source import Source, VideoError, open_container, source_name
from .timeline import JoinedClock, time_origin

log = logging.getLogger("steadyvsr.video")

DEFAULT_FRAME_RATE = Fraction(24)
LISTED_FRAMES = 8


@dataclass(frozen=True)
class Clip:
    """One video stream (and the audio beside it) of a file, an in-memory file or an image sequence.

    Attributes:
        width, height: of the upright frames, after the display rotation.
        frame_rate: the average, frames per second.
        time_base: seconds per tick of the source's timestamps.
        frame_count: frames within the window according to the header; None if it does not say.
        start, window: the part asked for, in seconds; window None = to the end.
        sample_aspect_ratio: width / height of one upright pixel.
        damaged: "raise" or "keep", as given to `open_clip`.
        images: the files of an image sequence; empty for a video.
        notes: what a user should be told (alpha dropped, interlaced, …).
    """

    source: Source
    name: str
    width: int
    height: int
    frame_rate: Fraction
    time_base: Fraction
    frame_count: int | None
    has_audio: bool
    sample_aspect_ratio: Fraction
    bit_depth: int
    colour: ColourTags
    start: Fraction
    window: Fraction | None
    damaged: str
    images: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def frames(self) -> Iterator[Tensor]:
        """Yields each frame in order: HWC float32 RGB 0..1. Raises like `frames_with_times`."""
        for frame, _ in self.frames_with_times():
            yield frame

    def frames_with_times(self, on_note: Callable[[str], object] = log.warning) -> Iterator[tuple[Tensor, Fraction]]:
        """Yields each frame with its time in seconds from the start of the window, strictly increasing.

        Args:
            on_note: called at the end with what a user should be told: damaged frames that the decoder filled in.

        Raises:
            DamagedVideoError: after the good frames, if the file ends earlier than its header says or a frame cannot be
                decoded; with damaged="keep" such frames are skipped and logged instead.
            VideoError: the size of the picture changes.
        """
        if self.images:
            size, keep = (self.height, self.width), self.damaged == "keep"
            yield from images.read_images(self.images, size, self.frame_rate, self.start, self.window, keep)
            return
        with open_container(self.source) as container:
            yield from _read(self, container, on_note)

    def progress(self, container: InputContainer, stream: VideoStream) -> Progress:
        """Nothing seen yet of the packets that this clip needs."""
        end = None if self.window is None else self.start + self.window
        return Progress(self.name, self.frame_rate, end, container, stream)

    def verify(self) -> list[str]:
        """Reads through the file without decoding, and returns what a user should be told about it.

        Takes minutes of disk reading at most, before hours of upscaling that would end in the same message.

        Raises:
            DamagedVideoError: it is cut off or unreadable; with damaged="keep" that is among what is returned.
        """
        if self.images:
            images.verify_images(self.images)
            return []
        with open_container(self.source) as container:
            stream = _picture_stream(self.name, container)
            progress = self.progress(container, stream)
            problem = None
            try:
                # All streams: where only the container states a duration, the sound may be what goes on longest.
                for packet in container.demux():
                    progress.packet(packet)
                    if progress.past_window:
                        return progress.notes()
            except FFmpegError as error:
                problem = f"unreadable data ({error.strerror})"
            tail = missing_tail(self.source, container.format.name)
            problem = problem or progress.problem_at_end() or (str(tail) if tail and tail.certain else None)
            if problem and self.damaged == "raise":
                raise progress.damage(problem)
            notes = progress.notes()
            swallowed = swallowed_frames(self.source, container.format.name, progress.packets)
            if swallowed:
                notes.append(f"damaged: frames that cannot be told from the data of those before them: {swallowed}")
            if problem or tail:
                notes.append(f"damaged: {problem or tail}; frames at the end may be missing")
            return notes


def open_clip(
    source: Source,
    *,
    start: float | Fraction = 0,
    duration: float | Fraction | None = None,
    frame_rate: Fraction | None = None,
    damaged: str = "raise",
) -> Clip:
    """Describes a video file, a binary file object, an image, a folder of images or a pattern (`s_%04d.png`, `*.png`).

        clip = open_clip("in.mp4", start=10, duration=5)
        for frame, time in clip.frames_with_times(): ...

    Args:
        start, duration: the window in seconds; a duration of None or 0 means to the end.
        frame_rate: of an image sequence (default 24); a video keeps its own.
        damaged: "raise", or "keep" to deliver what can be decoded and log the rest.

    Raises:
        FileNotFoundError, PermissionError: the source is not there or cannot be read.
        VideoError: it is empty, text, audio only or without frames. Every message names the file.
        ValueError: an option is out of range.
    """
    name = source_name(source)
    if damaged not in ("raise", "keep"):
        raise ValueError(f"{name}: expected damaged = raise or keep; got {damaged!r}.")
    if start < 0 or (duration is not None and duration < 0):
        raise ValueError(f"{name}: expected a start and a duration of 0 seconds or more; got {start} and {duration}.")
    begin = Fraction(start).limit_denominator(1_000_000)
    window = Fraction(duration).limit_denominator(1_000_000) if duration else None
    listed = images.list_images(source)
    if listed is not None:
        return _open_images(source, name, listed, frame_rate or DEFAULT_FRAME_RATE, begin, window, damaged)
    with open_container(source) as container:
        return _describe(source, name, container, begin, window, damaged)


def _open_images(source, name, listed, frame_rate, begin, window, damaged) -> Clip:
    first = images.decode_image(listed[0])
    rgb = upright(frame_to_rgb(first), display_matrix(first))
    chosen = images.window_of(len(listed), frame_rate, begin, window)
    if not chosen:
        raise VideoError(
            f"{name}: expected frames from {float(begin)} s on; got {len(listed)} images at {frame_rate}/s."
        )
    return Clip(
        source=source, images=tuple(listed), name=name, width=rgb.shape[1], height=rgb.shape[0], frame_rate=frame_rate,
        time_base=1 / frame_rate, frame_count=len(chosen), has_audio=False, sample_aspect_ratio=Fraction(1),
        bit_depth=bit_depth(first), colour=ColourTags(), start=begin, window=window, damaged=damaged,
        notes=("alpha dropped",) if has_alpha(first) else (),
    )  # fmt: skip


def _describe(source, name, container: InputContainer, begin, window, damaged) -> Clip:
    stream = _picture_stream(name, container)
    first = _first_frame(name, container, stream)
    matrix = display_matrix(first)
    height, width = upright(torch.empty(first.height, first.width, 1), matrix).shape[:2]
    aspect = stream.sample_aspect_ratio or Fraction(1)
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate or DEFAULT_FRAME_RATE
    end = header_end(container, stream)
    seconds = None if end is None else max(Fraction(0), end - time_origin(container) - begin)
    if window is not None:
        seconds = window if seconds is None else min(window, seconds)
    count = stream.frames or None
    if count is None or begin or window is not None:
        count = None if seconds is None else round(seconds * rate)
    notes = []
    if has_alpha(first):
        notes.append("alpha dropped")
    if first.interlaced_frame:
        notes.append("interlaced: both fields of a frame are treated as one picture; deinterlace first")
    context = stream.codec_context
    assert stream.time_base is not None  # FFmpeg sets it for every stream it opens
    return Clip(
        source=source, name=name, width=width, height=height, frame_rate=Fraction(rate),
        time_base=Fraction(stream.time_base), frame_count=count, has_audio=bool(container.streams.audio),
        bit_depth=bit_depth(first),
        sample_aspect_ratio=1 / aspect if turns_sideways(matrix) else aspect,
        colour=ColourTags(
            matrix_of(first) if not first.format.is_rgb else MATRIX_BT709,
            _tag(context, "color_primaries", PRIMARIES_UNSPECIFIED, PRIMARIES_BT709),
            _tag(context, "color_trc", TRANSFER_UNSPECIFIED, TRANSFER_BT709),
        ),
        start=begin, window=window, damaged=damaged, notes=tuple(notes),
    )  # fmt: skip


def _picture_stream(name: str, container: InputContainer) -> VideoStream:
    """The first stream of moving pictures: the cover of a music file is a video stream in name only."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise VideoError(f"{name}: expected a video stream; got {', '.join(kinds)} only.")
    if streams[0].codec_context is None:
        raise VideoError(f"{name}: expected a video codec that this build of FFmpeg reads; got an unknown one.")
    return streams[0]


def _tag(context, attribute: str, unspecified: int, default: int) -> int:
    value = int(getattr(context, attribute))
    return default if value in (0, unspecified) else value


def _first_frame(name: str, container: InputContainer, stream) -> av.VideoFrame:
    problem = "the stream is empty"
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except FFmpegError as error:
                problem = error.strerror
                continue
            if frames:
                return frames[0]
    except FFmpegError as error:
        problem = error.strerror
    raise VideoError(f"{name}: expected at least one frame; got none that can be decoded ({problem}).")


def _read(clip: Clip, container: InputContainer, on_note: Callable[[str], object]) -> Iterator[tuple[Tensor, Fraction]]:
    stream = _picture_stream(clip.name, container)
    stream.thread_type = "AUTO"
    assert stream.time_base is not None  # FFmpeg sets it for every stream it opens
    progress = clip.progress(container, stream)
    origin = progress.origin + clip.start
    clock = JoinedClock(container)
    filled_in: list[int] = []
    if clip.start:
        container.seek(int(origin / stream.time_base), stream=stream, backward=True)
    half_tick = stream.time_base / 2
    previous: Fraction | None = None
    turn_upright = Uprighter()
    progress.delivered = 0
    for frame in _decode(clip, container, stream, progress):
        if frame.pts is not None:
            time = clock.moved(frame.pts * stream.time_base, 1 / clip.frame_rate) - origin
        else:
            time = previous + 1 / clip.frame_rate if previous is not None else Fraction(0)
        if previous is not None and time <= previous:
            time = previous + stream.time_base
        if time < -half_tick and clip.start:
            continue
        if clip.window is not None and time >= clip.window - half_tick:
            return
        previous = time
        rgb = turn_upright(frame_to_rgb(frame), frame)
        height, width, _ = rgb.shape
        if (height, width) != (clip.height, clip.width):
            raise VideoError(
                f"{clip.name}: expected every frame to be {clip.width}x{clip.height}; got {width}x{height} at frame"
                f" {progress.delivered}. Split the video where its size changes."
            )
        if frame.is_corrupt:
            filled_in.append(progress.delivered)
        yield rgb, time
        progress.delivered += 1
    if filled_in:
        listed = ", ".join(map(str, filled_in[:LISTED_FRAMES])) + (" …" if len(filled_in) > LISTED_FRAMES else "")
        on_note(f"{clip.name}: damaged frames, filled in by the decoder: {len(filled_in)} (counted from 0: {listed})")
    if not progress.delivered:
        raise VideoError(f"{clip.name}: expected frames from {float(clip.start):g} s on; got none.")


def _decode(clip: Clip, container: InputContainer, stream, progress: Progress) -> Iterator[av.VideoFrame]:
    """Yields decoded frames in display order; damage is raised where it shows, or logged with damaged="keep".

    Raising loses up to a handful of good frames that the decoder holds back for reordering: with several decoding
    threads they may already come from behind the damage.
    """
    packets = container.demux(stream)
    first_problem: str | None = None
    lost = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except FFmpegError as error:
            first_problem = first_problem or f"unreadable data ({error.strerror})"
            break
        progress.packet(packet)
        try:
            frames = packet.decode()
        except FFmpegError as error:
            if clip.damaged == "raise":
                raise progress.damage(f"a frame that cannot be decoded ({error.strerror})") from error
            first_problem = first_problem or f"frames that cannot be decoded ({error.strerror})"
            lost += 1
            continue
        yield from frames
    first_problem = first_problem or progress.problem_at_end()
    if first_problem and clip.damaged == "raise":
        raise progress.damage(first_problem)
    if first_problem:
        kept = progress.delivered
        log.warning("%s: damaged: %s; %d frames kept, %d packets lost", clip.name, first_problem, kept, lost)
