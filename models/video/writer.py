"""Writing clips: RGB float frames in, one finished video file out, or nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from torch import Tensor

from .audio import AudioCopy
from .encoding import choose_encoding
from .images import checked
from .part_file import PartFile, explained
from .pixels import (
    MATRIX_BT709,
    MATRIX_BT2020,
    PRIMARIES_BT2020,
    RANGE_LIMITED,
    ColourTags,
    pack,
    packed_to_frame,
)
from .reader import Clip
from .source import VideoError
from .waveform import Waveform, WaveformEncoder

_IO_BUFFER_BYTES = 1 << 20
MAX_TICKS = 2**31 - 1
"""Between two frames of an MP4 or MOV file."""


class MuxingError(VideoError):
    """A container cannot take any more. What it holds can be kept: see `ClipWriter.keep`."""


class ClipWriter:
    """Encodes frames into `path`, which is created or replaced only when the clip is complete.

        with ClipWriter("out.mp4", 1920, 1080, clip.frame_rate, audio=clip) as writer:
            for frame, time in frames:
                writer.write(frame, time)

    The file grows as a part of its own (see `part_file`); leaving the block by an exception removes it. Colours are
    BT.709 (BT.2020 for a source in those primaries), limited range, tagged as such. Sound is copied packet by packet,
    or re-encoded with a note if the container cannot hold it.

    Args:
        frame_rate: frames per second; also the step of frames written without a time.
        time_base: seconds per tick; the source's keeps variable frame rates exact. None: 1 / frame_rate.
        audio: a clip, whose sound within its window goes along, or samples, which become AAC.
        colour: primaries and transfer to tag, as in `Clip.colour`.
        sample_aspect_ratio: width / height of one pixel.
        codec, crf, ten_bit, preset: see `choose_encoding`.
        threads: of the encoder, where it lets itself be told; None: as many as it likes.

    Attributes:
        frames_written: so far.
        encoding: what was chosen.
        notes: what a user should be told.

    Raises:
        ValueError: the container or codec cannot hold this.
        FileExistsError: `path` exists, without `force`.
        OSError: an unwritable folder, a full disk, …, with the path and the reason. Nothing under `path` ever changes.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        frame_rate: Fraction | int,
        *,
        time_base: Fraction | None = None,
        audio: Clip | Waveform | None = None,
        colour: ColourTags | None = None,
        sample_aspect_ratio: Fraction = Fraction(1),
        codec: str | None = None,
        crf: int | None = None,
        ten_bit: bool = False,
        preset: str | None = None,
        threads: int | None = None,
        force: bool = False,
    ):
        self.path = Path(path)
        self.width, self.height = width, height
        self.encoding = choose_encoding(path, width, height, codec=codec, crf=crf, ten_bit=ten_bit, preset=preset)
        self.frames_written = 0
        self.notes = [] if self.encoding.note is None else [self.encoding.note]
        self._threads = threads
        self._step = 1 / Fraction(frame_rate)
        self._time_base = time_base or self._step
        self._last_pts: int | None = None
        self._closed = False
        self._audio: AudioCopy | WaveformEncoder | None = None
        self._part = PartFile(path, force)
        try:
            self._container: OutputContainer = av.open(
                self._part.file, "w", format=self.encoding.container, buffer_size=_IO_BUFFER_BYTES
            )
        except BaseException:
            self._part.discard()
            raise
        try:
            self._open(Fraction(frame_rate), audio, colour or ColourTags(), sample_aspect_ratio)
        except BaseException:
            self.abort()
            raise

    def _open(self, frame_rate: Fraction, audio: Clip | Waveform | None, colour: ColourTags, aspect: Fraction) -> None:
        encoding = self.encoding
        try:
            with explained(self.path):
                stream = self._container.add_stream(encoding.codec, rate=frame_rate, options=encoding.options())
                assert isinstance(stream, VideoStream)  # every codec of an Encoding is a video codec
                stream.width, stream.height, stream.pix_fmt = self.width, self.height, encoding.pixel_format
                context = stream.codec_context
                if self._threads is not None:
                    context.thread_count = self._threads
                context.time_base = stream.time_base = self._time_base
                context.sample_aspect_ratio = aspect
                self._matrix = MATRIX_BT2020 if colour.primaries == PRIMARIES_BT2020 else MATRIX_BT709
                context.colorspace, context.color_range = self._matrix, RANGE_LIMITED
                context.color_primaries, context.color_trc = colour.primaries, colour.transfer
                if encoding.codec == "libx265" and encoding.container in ("mp4", "mov"):
                    context.codec_tag = "hvc1"  # Apple's players accept no other
                self._stream = stream
                if isinstance(audio, Waveform):
                    self._audio = WaveformEncoder(audio, self._container)
                elif audio is not None and audio.has_audio:
                    self._audio = AudioCopy(audio, self._container)
                if self._audio is not None:
                    self.notes += self._audio.notes
                self._container.start_encoding()
        except (FFmpegError, ValueError) as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(
                f"{self.path.name}: {encoding.container} with {encoding.codec} at {self.width}x{self.height}"
                f" was refused by the encoder ({error}). Try another --codec or another ending."
            ) from error

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is not None:
            self.abort()
        elif not self._closed:
            try:
                self.finish()
            except BaseException:
                self.abort()
                raise

    def pack(self, frames: Tensor) -> Tensor:
        """THWC float RGB 0..1, on any device, as rows of bytes for `write` there: an eighth of what they were.

        A card does this in no time; `write` would do it on the CPU.
        """
        return pack(frames, self.encoding.pixel_format, self._matrix)

    def picture(self, packed: Tensor) -> av.VideoFrame:
        """The frame of a row of `pack` on the CPU."""
        return packed_to_frame(packed, self.width, self.height, self.encoding.pixel_format, self._matrix)

    def write(self, frame: Tensor, time: Fraction | None = None) -> None:
        """Encodes one frame; values beyond 0..1 are clamped, code values are rounded.

        Args:
            frame: HWC float RGB 0..1, or a row of `pack` on the CPU.
            time: seconds from the start; None: one step of the frame rate after the last frame.

        Raises:
            ValueError: a wrong shape, NaN, or a time that is not after the last one.
            MuxingError: the container cannot hold it (a gap that its clock cannot count, …).
        """
        packed = checked(self.path.name, frame, self.width, self.height, self.frames_written, self.pack)
        if time is not None:
            pts = round(time / self._time_base)
        else:
            pts = 0 if self._last_pts is None else self._last_pts + round(self._step / self._time_base)
        if self._last_pts is not None and pts <= self._last_pts:
            last, now = float(self._last_pts * self._time_base), float(pts * self._time_base)
            raise ValueError(f"{self.path.name}: expected frame {self.frames_written} after {last} s; got {now} s.")
        self._expect_countable(pts)
        self._last_pts = pts
        picture = self.picture(packed)
        picture.pts, picture.time_base = pts, self._time_base
        with self._muxing():
            self._container.mux(self._stream.encode(picture))
            if self._audio is not None:
                self._audio.advance(pts * self._time_base)
        self.frames_written += 1

    def _expect_countable(self, pts: int) -> None:
        """Raises MuxingError for a gap beyond MP4's clock. FFmpeg refuses some and silently shortens others."""
        gap = 0 if self._last_pts is None else (pts - self._last_pts) * self._time_base
        tick = self._stream.time_base
        if self.encoding.container in ("mp4", "mov") and tick and gap / tick > MAX_TICKS:
            raise MuxingError(
                f"{self.path.name}: expected frames and sound that {self.encoding.container} can hold; got a gap of"
                f" {float(gap):.0f} s after {self.frames_written} frames."
            )

    def finish(self, to: str | Path | None = None) -> Path:
        """Writes what the encoder still holds and the rest of the sound, and gives the file its name.

        With `to` it gets that name instead (for the readable part of a damaged source). Returns the path.

        Raises:
            MuxingError: the container cannot hold the rest; `keep` or `abort` comes next.
        """
        try:
            if not self.frames_written:
                raise VideoError(f"{self.path.name}: expected at least one frame to write; got none.")
            with self._muxing():
                self._container.mux(self._stream.encode(None))
                if self._audio is not None:
                    self._audio.advance(None)
            return self.keep(to)
        except MuxingError:
            raise
        except BaseException:
            self.abort()
            raise

    def keep(self, to: str | Path | None) -> Path:
        """Closes the file with what is in it, and gives it its name or the name `to`. Returns the path."""
        with contextlib.suppress(FFmpegError):  # what the encoder still holds, where the container takes it
            self._container.mux(self._stream.encode(None))
        with self._muxing():
            self._container.close()
        path = self._part.commit(to)
        self._closed = True
        if self._audio is not None:
            self._audio.close()
        return path

    @contextlib.contextmanager
    def _muxing(self) -> Iterator[None]:
        try:
            with explained(self.path):
                yield
        except FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise MuxingError(
                f"{self.path.name}: expected frames and sound that {self.encoding.container} can hold; got"
                f" {error.strerror} after {self.frames_written} frames."
            ) from error

    def abort(self) -> None:
        """Removes what was written so far and leaves `path` as it was. Does nothing after `finish`."""
        if self._closed:
            return
        self._closed = True
        if self._audio is not None:
            self._audio.close()
        # Closing writes the trailer of a file that the next line removes.
        with contextlib.suppress(FFmpegError, OSError, ValueError):
            self._container.close()
        self._part.discard()
