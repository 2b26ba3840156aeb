"""Image sequences: a folder, a pattern or one image, read and written one image at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
from av.error import FFmpegError
from torch import Tensor

from .orientation import Uprighter
from .part_file import PartFolder, explained
from .pixels import frame_to_rgb, pack, packed_is_finite, packed_to_frame, rgb_to_frame
from .source import DamagedVideoError, Source, VideoError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
FRAME_NAME = "frame_{:06d}.png"


def list_images(source: Source) -> list[Path] | None:
    """The images that a path stands for, in order; None if it is no image sequence (a video, an open file).

    A folder: its images in natural order (2 before 10). `shot_%04d.png`: by number, without gaps. `*.png`: natural
    order. One image: itself.

    Raises:
        VideoError: an empty folder, a pattern that matches nothing, or a gap in the numbers.
    """
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
        if not found:
            raise VideoError(f"{path}: expected a folder with images; got none of {', '.join(sorted(IMAGE_SUFFIXES))}.")
        return sorted(found, key=_natural)
    if path.exists():
        return [path] if path.suffix.lower() in IMAGE_SUFFIXES else None
    if re.search(r"%0?\d*d", path.name):
        return _numbered(path)
    if any(char in path.name for char in "*?["):
        found = sorted(path.parent.glob(path.name), key=_natural)
        if not found:
            raise VideoError(f"{path}: expected images; nothing matches this pattern.")
        return found
    return None


def _natural(path: Path) -> list:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.findall(r"\d+|\D+", path.name)
    ]


def _numbered(path: Path) -> list[Path]:
    before, after = re.split(r"%0?\d*d", path.name, maxsplit=1)
    number = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    found = {int(match[1]): entry for entry in entries if (match := number.fullmatch(entry.name))}
    if not found:
        raise VideoError(f"{path}: expected numbered images; nothing matches this pattern.")
    for index in range(min(found), max(found)):
        if index not in found:
            raise VideoError(f"{path}: expected images {min(found)} to {max(found)}; number {index} is missing.")
    return [found[index] for index in sorted(found)]


def window_of(count: int, frame_rate: Fraction, start: Fraction, window: Fraction | None) -> range:
    """Indices k of the frames whose time k / frame_rate is in [start, start + window)."""
    first = -(-start * frame_rate // 1)
    last = count if window is None else -(-(start + window) * frame_rate // 1)
    return range(int(first), min(count, int(last)))


def decode_image(path: Path) -> av.VideoFrame:
    """The picture of an image file. Raises DamagedVideoError, or OSError if the file cannot be opened."""
    problem = "no picture in it"
    with open(path, "rb") as file:
        try:
            # An open file, not a path: FFmpeg would take a % in the name for a pattern.
            with av.open(file, "r", options={"err_detect": "explode"}) as container:
                for packet in container.demux(video=0):
                    for frame in packet.decode():
                        return frame
        except (FFmpegError, IndexError) as error:
            problem = getattr(error, "strerror", None) or "no picture in it"
    size = path.stat().st_size
    raise DamagedVideoError(f"{path.name}: expected an image; got {size} bytes that are none ({problem}). Replace it.")


def read_images(
    paths: tuple[Path, ...],
    size: tuple[int, int],
    frame_rate: Fraction,
    start: Fraction,
    window: Fraction | None,
    keep: bool,
) -> Iterator[tuple[Tensor, Fraction]]:
    """Yields (HWC float32 RGB 0..1, seconds from `start`) for each image in the window.

    Args:
        size: (height, width) that all images must have.
        keep: skip damaged images, and leave their time empty, instead of raising.

    Raises:
        VideoError: an image has another size.
        DamagedVideoError: an image is damaged, without `keep`.
    """
    turn_upright = Uprighter()
    for index in window_of(len(paths), frame_rate, start, window):
        try:
            frame = decode_image(paths[index])
        except DamagedVideoError as error:
            if keep:
                continue
            error.frames_read = index
            raise
        rgb = turn_upright(frame_to_rgb(frame), frame)
        if rgb.shape[:2] != size:
            raise VideoError(
                f"{paths[index].name}: expected {size[1]}x{size[0]} like the first image;"
                f" got {rgb.shape[1]}x{rgb.shape[0]}."
            )
        yield rgb, index / frame_rate - start


def verify_images(paths: tuple[Path, ...]) -> None:
    """Raises DamagedVideoError for the first empty file; other damage shows when an image is decoded."""
    for path in paths:
        if path.stat().st_size == 0:
            raise DamagedVideoError(f"{path.name}: expected an image; got an empty file (0 bytes). Replace it.")


class ImageSequenceWriter:
    """Writes frames as PNG files into a folder that gets its name only when all of them are written.

        with ImageSequenceWriter("frames", 1920, 1080) as writer:
            for frame in frames:
                writer.write(frame)

    The frames go to a part of its own beside it (see `part_file`); leaving the `with` block by an exception removes
    that and nothing else. An existing folder is refused without `force`; with it, files of the same names are replaced
    and others stay.
    """

    def __init__(self, folder: str | Path, width: int, height: int, *, sixteen_bit: bool = False, force: bool = False):
        self.path = Path(folder)
        self.width, self.height = width, height
        self.frames_written = 0
        self._format = "rgb48be" if sixteen_bit else "rgb24"
        self._encoder = _png_encoder(width, height, self._format)
        self._part = PartFolder(folder, force)

    def __enter__(self) -> ImageSequenceWriter:
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is None:
            self.finish()
        else:
            self.abort()

    def pack(self, frames: Tensor) -> Tensor:
        """THWC float RGB 0..1, on any device, as rows of bytes for `write` there."""
        return pack(frames, self._format)

    def write(self, frame: Tensor, time: Fraction | None = None) -> None:
        """Writes one frame as round(x·255) or round(x·65535); images have no time to store.

        Args:
            frame: HWC float RGB 0..1, or a row of `pack` on the CPU.
        """
        packed = checked(self.path.name, frame, self.width, self.height, self.frames_written, self.pack)
        data = _encoded(packed_to_frame(packed, self.width, self.height, self._format), self._encoder)
        target = self._part.part / FRAME_NAME.format(self.frames_written)
        with explained(self.path), open(target, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.frames_written += 1

    def finish(self, to: str | Path | None = None) -> Path:
        """Gives the folder its name (or the name `to`) and returns its path."""
        if not self.frames_written:
            self.abort()
            raise VideoError(f"{self.path}: expected at least one frame to write; got none.")
        self.path = self._part.commit(to)
        return self.path

    def abort(self) -> None:
        """Removes what was written so far."""
        self._part.discard()


def checked(
    name: str, frame: Tensor, width: int, height: int, index: int, packed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The frame as a row of `packed`, which it may be already.

    Raises:
        ValueError: it is neither that nor HWC of this size in floating point, or it is not finite.
    """
    if frame.ndim != 1:
        if tuple(frame.shape) != (height, width, 3) or not frame.is_floating_point():
            raise ValueError(
                f"{name}: expected frame {index} as float HWC {height}x{width}x3; got {frame.dtype} "
                f"{tuple(frame.shape)}."
            )
        frame = packed(frame[None])[0]
    if not packed_is_finite(frame):
        raise ValueError(f"{name}: expected numbers from 0 to 1; got NaN or infinity in frame {index}.")
    return frame


def _png_encoder(width: int, height: int, pixel_format: str) -> av.VideoCodecContext:
    encoder = cast(av.VideoCodecContext, av.CodecContext.create("png", "w"))
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
    encoder.time_base = Fraction(1, 1)
    encoder.thread_count = 1  # frame threads would hold pictures back
    return encoder


def _encoded(picture: av.VideoFrame, encoder: av.VideoCodecContext) -> bytes:
    return b"".join(bytes(packet) for packet in encoder.encode(picture))


def encode_png(frame: Tensor, pixel_format: str = "rgb24") -> bytes:
    """HWC float RGB 0..1 as the bytes of a PNG file, 8 bit (rgb24) or 16 bit (rgb48be)."""
    height, width, _ = frame.shape
    return _encoded(rgb_to_frame(frame, pixel_format), _png_encoder(width, height, pixel_format))
