"""Writing clips: RGB float frames in, one finished video file out, or nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from torch import Tensor

from .audio import AudioCopy
from .images import check_frame
from .part_file import PartFile, explained
from .pixels import MATRIX_BT709, MATRIX_BT2020, PRIMARIES_BT2020, RANGE_LIMITED, ColourTags, can_hold, rgb_to_frame
from .reader import Clip
from .source import VideoError
from .waveform import Waveform, WaveformEncoder

CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm",
}  # fmt: skip
# Where compression is hard to see; the scales differ. Codecs not listed here have no such setting.
_DEFAULT_CRF = {"libx264": 16, "libx265": 18, "libvpx-vp9": 22, "libsvtav1": 22}
_CHOICES_8_BIT = ("yuv420p", "yuv422p", "yuv444p")
_CHOICES_10_BIT = ("yuv420p10le", "yuv422p10le", "yuv444p10le")
_LOSSLESS_CHOICES = {"ffv1": (("gbrp10le",), ("bgr0",))}
"""By codec: formats for ten bits and for eight, in RGB so that nothing is lost."""
_IO_BUFFER_BYTES = 1 << 20
MAX_TICKS = 2**31 - 1
"""Between two frames of an MP4 or MOV file."""
LOOKAHEAD_FRAMES = 20
"""Frames of H.264 that wait in the encoder, which plans its rate with them. Its own 40 take twice the memory, some 5
bytes per pixel and frame, and are complete only after 60 frames of a clip, so a longer one seemed to leak."""


class MuxingError(VideoError):
    """A container cannot take any more. What it holds can be kept: see `ClipWriter.keep`."""


@dataclass(frozen=True)
class Encoding:
    """How the pictures are encoded, as decided by `choose_encoding`."""

    container: str
    codec: str
    pixel_format: str
    crf: int | None


def choose_encoding(
    path: str | Path,
    width: int,
    height: int,
    *,
    codec: str | None = None,
    crf: int | None = None,
    ten_bit: bool = False,
) -> Encoding:
    """Chooses container (by the file's ending), codec, pixel format (4:2:0; 4:4:4 for odd sizes) and quality.

    Args:
        codec: None means VP9 for .webm, else H.264 (H.265 for ten bits, which few players show as H.264).
        crf: None means a default.

    Raises:
        ValueError: the ending is unknown, there is no such encoder, or it cannot hold the size; nothing is ever
            cropped. The message names the file, and the next even size where that helps.
    """
    name = Path(path).name
    container = CONTAINERS.get(Path(path).suffix.lower())
    if container is None:
        raise ValueError(f"{name}: expected an ending of {', '.join(CONTAINERS)}; got {Path(path).suffix or 'none'}.")
    if codec is None:
        codec = "libvpx-vp9" if container == "webm" else ("libx265" if ten_bit else "libx264")
    try:
        encoder = av.Codec(codec, "w")
    except (FFmpegError, ValueError) as error:
        raise ValueError(
            f"{name}: expected an encoder of this FFmpeg build; got {codec!r}. Try another --codec."
        ) from error
    if encoder.type != "video":
        raise ValueError(f"{name}: expected a video codec; got {codec!r}, which is for {encoder.type}.")
    offered: list[str] = [video_format.name for video_format in encoder.video_formats or ()] or list(_CHOICES_8_BIT)
    pixel_format = _pixel_format(codec, offered, width, height, ten_bit)
    if pixel_format is None:
        even = f"{width + width % 2}x{height + height % 2}"
        wanted = f"{'ten bits' if ten_bit else 'pictures'} of {width}x{height}"
        raise ValueError(
            f"{name}: {codec} cannot hold {wanted} without loss of a row or column; got only"
            f" {', '.join(offered)}. Ask for {even}, or use libx264 in .mp4 or .mkv."
        )
    if crf is not None and codec not in _DEFAULT_CRF:
        raise ValueError(f"{name}: expected no crf for {codec}, which has none; got {crf}.")
    worst = 51 if codec in ("libx264", "libx265") else 63
    if crf is not None and not 0 <= crf <= worst:
        raise ValueError(f"{name}: expected a crf from 0 (best) to {worst}; got {crf}.")
    return Encoding(container, codec, pixel_format, _DEFAULT_CRF.get(codec) if crf is None else crf)


def _pixel_format(codec: str, offered: list[str], width: int, height: int, ten_bit: bool) -> str | None:
    """The codec's customary format that has whole chroma samples at this size."""
    ten, eight = _LOSSLESS_CHOICES.get(codec, (_CHOICES_10_BIT, _CHOICES_8_BIT))
    for choices in (ten,) if ten_bit else (eight, ten):
        usable = [choice for choice in choices if choice in offered]
        fitting = [choice for choice in usable if can_hold(choice, width, height)]
        if fitting:
            # 4:2:2 is for codecs without 4:2:0 (ProRes); an odd size gets 4:4:4.
            return fitting[0] if fitting[0] == usable[0] else fitting[-1]
    return None


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
        codec, crf, ten_bit: see `choose_encoding`.

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
        force: bool = False,
    ):
        self.path = Path(path)
        self.width, self.height = width, height
        self.encoding = choose_encoding(path, width, height, codec=codec, crf=crf, ten_bit=ten_bit)
        self.frames_written = 0
        self.notes: list[str] = []
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
        options = {} if encoding.crf is None else {"crf": str(encoding.crf)}
        if encoding.codec == "libx264":
            options["rc-lookahead"] = str(LOOKAHEAD_FRAMES)
        if encoding.codec == "libx265":
            options["x265-params"] = "log-level=none"
        try:
            with explained(self.path):
                stream = self._container.add_stream(encoding.codec, rate=frame_rate, options=options)
                assert isinstance(stream, VideoStream)  # every codec of an Encoding is a video codec
                stream.width, stream.height, stream.pix_fmt = self.width, self.height, encoding.pixel_format
                context = stream.codec_context
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

    def write(self, frame: Tensor, time: Fraction | None = None) -> None:
        """Encodes one frame, HWC float RGB 0..1; values beyond are clamped, code values are rounded.

        Args:
            time: seconds from the start; None: one step of the frame rate after the last frame.

        Raises:
            ValueError: a wrong shape, NaN, or a time that is not after the last one.
            MuxingError: the container cannot hold it (a gap that its clock cannot count, …).
        """
        check_frame(self.path.name, frame, self.width, self.height, self.frames_written)
        if time is not None:
            pts = round(time / self._time_base)
        else:
            pts = 0 if self._last_pts is None else self._last_pts + round(self._step / self._time_base)
        if self._last_pts is not None and pts <= self._last_pts:
            last, now = float(self._last_pts * self._time_base), float(pts * self._time_base)
            raise ValueError(f"{self.path.name}: expected frame {self.frames_written} after {last} s; got {now} s.")
        self._expect_countable(pts)
        self._last_pts = pts
        picture = rgb_to_frame(frame, self.encoding.pixel_format, self._matrix)
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
