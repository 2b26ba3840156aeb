"""Opening what a user points at: names for messages, and containers that read nothing beyond the file itself."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

import av
from av.container import InputContainer
from av.error import FFmpegError

from ..printable import printable

Source: TypeAlias = str | Path | BinaryIO

# Playlists and concat scripts may name URLs: whatever a file says, only local files are opened.
_CONTAINER_OPTIONS = {"protocol_whitelist": "file"}
_IO_BUFFER_BYTES = 1 << 18


class VideoError(ValueError):
    """A video cannot be read or written as asked; the message names the file, what was expected and what came.

    Control characters in it, which come from file names and metadata, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, len(message)))


class DamagedVideoError(VideoError):
    """A video ends early or holds data that cannot be decoded.

    Attributes:
        frames_read: good frames delivered before the error; None where nothing was decoded (`Clip.verify`).
    """

    def __init__(self, message: str, frames_read: int | None = None):
        super().__init__(message)
        self.frames_read = frames_read


_SEEKING = threading.Lock()
"""Pictures and sound of a video in memory are read from one file by two threads."""


class _SharedFile:
    """A separate read position on a file object that others also read; nothing is copied, the file stays open."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._position = 0

    def read(self, size: int) -> bytes:
        with _SEEKING:
            self._file.seek(self._position)
            data = self._file.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            with _SEEKING:
                self._position = self._file.seek(offset, os.SEEK_END)
        else:
            self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position


def source_name(source: Source) -> str:
    """What messages call the source: its file name with control characters escaped, or that it is in memory."""
    if isinstance(source, (str, Path)):
        return printable(Path(source).name)
    name = getattr(source, "name", None)
    return printable(Path(name).name) if isinstance(name, str) else "video in memory"


@contextlib.contextmanager
def binary(source: Source) -> Iterator[BinaryIO | _SharedFile]:
    """The source's bytes, to `read`, `seek` and `tell`; an open file keeps its own position."""
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            yield file
    else:
        yield _SharedFile(source)


def source_bytes(source: Source) -> int:
    """Size of the source. Raises FileNotFoundError, or VideoError if it is no file."""
    if not isinstance(source, (str, Path)):
        if not (hasattr(source, "seek") and source.seekable()):
            raise VideoError(
                f"{source_name(source)}: expected a path or a seekable binary file; got {type(source).__name__}."
            )
        return source.seek(0, os.SEEK_END)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a video or images; there is no such file.")
    if not path.is_file():
        raise VideoError(f"{path}: expected a regular file; got something else. Copy the video to a file first.")
    return path.stat().st_size


def open_container(source: Source) -> InputContainer:
    """Opens a container at its start; the caller closes it.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it cannot be read.
        VideoError: it is empty, or no video.
    """
    name = source_name(source)
    if source_bytes(source) == 0:
        raise VideoError(f"{name}: expected a video; got an empty file (0 bytes). Copy or download it again.")
    opened = f"file:{Path(source)}" if isinstance(source, (str, Path)) else _SharedFile(source)
    try:
        # Metadata of old files is often Latin-1; what is not UTF-8 must not cost the pictures.
        return av.open(
            opened, "r", container_options=_CONTAINER_OPTIONS, buffer_size=_IO_BUFFER_BYTES, metadata_errors="replace"
        )
    except PermissionError as error:
        raise PermissionError(f"{name}: expected a readable file; got permission denied.") from error
    except FFmpegError as error:
        raise VideoError(
            f"{name}: expected a video; got {_what_it_is(source)} ({error.strerror}). Check the file in a player."
        ) from error


def _what_it_is(source: Source) -> str:
    """A guess from the first bytes, for messages."""
    with binary(source) as file:
        head = file.read(512)
    if head[4:8] == b"ftyp":
        return "an MP4 whose index (moov) is missing: it was cut off before its end, or never finished"
    if head.startswith((b"\x1aE\xdf\xa3", b"RIFF")):
        return "the beginning of a video without readable content"
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return "data in no known video format"
    return "text" if text.isprintable() or "\n" in text else "data in no known video format"
