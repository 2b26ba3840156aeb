"""Whether a video is all there: what its container states, compared with the file and with what its packets hold."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import torch
from av.container import InputContainer

from .source import DamagedVideoError, Source, binary, source_bytes
from .timeline import JoinedClock, has_joined_clock, time_origin

# A header's duration is rounded: a clip counts as cut off only if it ends more than this many frames earlier.
END_TOLERANCE_FRAMES = Fraction(5, 2)
CONTAINER_TOLERANCE = Fraction(1, 50)
"""Of a duration that is stated for all streams together, by what wrote the file rather than by an index."""
MISSING_SHARE = Fraction(1, 100)
"""Of the bytes that a container states: fewer may be padding or an index at the end, and are only noted."""
REGULAR_FRAMES, REGULAR_SHARE, MOST_IRREGULAR, LATE_STEPS = 8, 0.25, 0.25, 1.75
"""A video is regular if it has so many frames, and all but a quarter come within a quarter of the usual step; then one
that takes so many steps is late."""
MISSING_FRAMES = 0.75
FLV_END_BYTES = 64
"""After the last frame: its size, and an empty tag that ends the stream."""
_STATISTICS = re.compile(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,9})?)", re.ASCII)
"""Matroska's: 00:00:02.000000000."""
END_SHARE = 1.1
"""Of a frame: a transport stream, which states no length, is suspicious if picture and sound end so far apart."""
_GIF_FRAME = re.compile(rb"!\xf9\x04.{4}\0,", re.DOTALL)
"""How the blocks of a frame begin: its time, then its picture."""
_GIF_FRAME_BYTES = 9
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_BOX_LIMIT = 200_000
_TS_PACKET_BYTES = 188
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_BROADCAST = 1


def header_end(container: InputContainer, stream) -> Fraction | None:
    """When the video ends according to its header, on the stream's own clock; None if no header says so."""
    begin = (stream.start_time or 0) * stream.time_base
    if container.format.name == "avi" and stream.frames:
        return begin + stream.frames * stream.time_base  # its duration is re-estimated when the file is short
    if stream.duration:
        return begin + stream.duration * stream.time_base
    for key, value in stream.metadata.items():
        stated = _STATISTICS.fullmatch(value) if key == "DURATION" or key.startswith("DURATION-") else None
        if stated:
            return int(stated[1]) * 3600 + int(stated[2]) * 60 + Fraction(stated[3])
    if not container.streams.audio and container.duration:
        return begin + Fraction(container.duration, av.time_base)
    return None


class Progress:
    """How far a pass through the packets has come, compared with what the header promised.

    Args:
        name: of the file, for messages.
        rate: frames per second.
        window_end: seconds after which nothing is read; None: the end of the file.

    Attributes:
        delivered: frames given to the caller so far; None where nothing is decoded.
        packets: of the picture, so far.
        past_window: whether all packets of the clip's window have been seen.
    """

    def __init__(self, name: str, rate: Fraction, window_end: Fraction | None, container: InputContainer, stream):
        self.name, self.rate = name, rate
        self.origin = time_origin(container)
        self.window_end = None if window_end is None else self.origin + window_end
        self.expected_end = header_end(container, stream)
        self.expected_frames = stream.frames or (
            None if self.expected_end is None else round(self.expected_end * self.rate)
        )
        self.delivered: int | None = None
        self.past_window = False
        self._stream, self._container = stream, container
        self._clock = JoinedClock(container)
        self.packets = 0
        self._end = self._last_end = self._sound_end = Fraction(0)
        self._incomplete = self._last_byte = 0
        self._times = array("d")

    def packet(self, packet: av.Packet) -> None:
        """Counts a packet of any stream."""
        if not packet.size:
            return
        self._incomplete += packet.is_corrupt
        self._last_byte = max(self._last_byte, (packet.pos or 0) + packet.size)
        if packet.pts is not None and packet.time_base:
            step = packet.duration * packet.time_base if packet.duration else 0
            self._last_end = max(self._last_end, packet.pts * packet.time_base + step)
            if packet.stream.type == "audio":
                self._sound_end = max(self._sound_end, packet.pts * packet.time_base + step)
        if packet.stream.index != self._stream.index:
            return
        self.packets += 1
        if packet.pts is not None:
            step = packet.duration * packet.time_base if packet.duration else 1 / self.rate
            self._end = max(self._end, packet.pts * packet.time_base + step)
            self._times.append(float(packet.pts * packet.time_base))
            # Packets come in decoding order: one that is a second past the window means that all of it was seen.
            dts = packet.dts if packet.dts is not None else packet.pts
            self._clock.moved(dts * packet.time_base, 1 / self.rate)
            self.past_window = self.window_end is not None and dts * packet.time_base > self.window_end + 1

    def problem_at_end(self) -> str | None:
        """What shows that frames are missing, after the last packet."""
        # In a transport stream this flag also means that two recordings were joined.
        if self._incomplete and not has_joined_clock(self._container):
            return "a packet that is cut off"
        if not self._end or self.past_window:
            return None
        step = max(1 / self.rate, (self._end - self.origin) / self.packets)
        promised, end, tolerance = self.expected_end, self._end, END_TOLERANCE_FRAMES * step
        if promised is None and self._container.duration and not has_joined_clock(self._container):
            # Stated for picture and sound together: compared with the end of whatever goes on longest.
            stated = Fraction(self._container.duration, av.time_base)
            promised, end = self.origin + stated, self._last_end
            tolerance = max(tolerance, CONTAINER_TOLERANCE * stated)
        if promised is None:
            return None
        cut = promised if self.window_end is None else min(promised, self.window_end)
        if cut - end > tolerance:
            return f"the end of the file at {float(end - self.origin):.2f} s of {float(promised - self.origin):.2f} s"
        return None

    def notes(self) -> list[str]:
        """What a user should be told although no frame is known to be missing."""
        notes = []
        if self._clock.jumps:
            notes.append(f"jumps of the file's clock that were closed up: {self._clock.jumps}")
        if self._incomplete:
            notes.append(f"incomplete or lost packets: {self._incomplete}; frames near them may be damaged")
        gaps, first = self._gaps()
        if gaps:
            notes.append(f"gaps between frames: {gaps}, the first after {first:.2f} s; frames may be missing there")
        missing = float((self.expected_end or 0) - self._end) * float(self.rate)
        if self.window_end is None and missing > MISSING_FRAMES and self._container.format.name != "asf":
            notes.append(f"the end comes {missing:.1f} frames before the one that the file states")
        apart = float(self._end - self._sound_end)
        is_whole_stream = has_joined_clock(self._container) and self.window_end is None and not self._clock.jumps
        if is_whole_stream and self._sound_end and abs(apart) * float(self.rate) > END_SHARE:
            first, last = ("sound", "picture") if apart > 0 else ("picture", "sound")
            notes.append(f"the {first} ends {abs(apart):.2f} s before the {last}; the end may be missing")
        unread = self._container.size - self._last_byte
        if self._container.format.name == "flv" and self.window_end is None and unread > FLV_END_BYTES:
            notes.append(f"{unread:,} bytes after the last frame could not be read")
        return notes

    def _gaps(self) -> tuple[int, float]:
        """How many frames of a video with regular frames come late, and the time before the first of them."""
        # Packets without a time leave gaps that are none, and so do AVI's chunks of no bytes, which repeat a frame; the
        # last picture of a program stream has the time that its end code got.
        if len(self._times) < max(REGULAR_FRAMES, self.packets) or self._container.format.name in ("avi", "mpeg"):
            return 0, 0.0
        times = torch.frombuffer(self._times, dtype=torch.float64).unique()
        steps = times.diff()
        if len(steps) < REGULAR_FRAMES - 1:
            return 0, 0.0
        usual = steps.median()
        late = (steps > LATE_STEPS * usual).nonzero()[:, 0]
        regular = ((steps / usual - 1).abs() < REGULAR_SHARE).double().mean() >= 1 - MOST_IRREGULAR
        return (len(late), times[late[0]].item()) if regular and len(late) else (0, 0.0)

    def damage(self, problem: str) -> DamagedVideoError:
        """The error for a problem."""
        expected = f"{self.expected_frames} frames" if self.expected_frames else "an intact video"
        got = f"{self.packets} readable packets" if self.delivered is None else f"{self.delivered} frames"
        return DamagedVideoError(
            f"{self.name}: expected {expected}; got {got}, then {problem}."
            " Get an intact copy, or ask for the readable part (command line: --keep-damaged).",
            self.delivered,
        )


@dataclass(frozen=True)
class MissingTail:
    """A file that is shorter than its own structure states.

    Attributes:
        stated, there: bytes.
        certain: whether the format leaves no doubt that pictures or sound are missing.
    """

    stated: int
    there: int
    certain: bool

    def __str__(self) -> str:
        return f"the end of the file after {self.there:,} of at least {self.stated:,} bytes"


def missing_tail(source: Source, format_name: str) -> MissingTail | None:
    """How much a container lacks by its own structure; None if nothing, or if its format states no sizes."""
    size = source_bytes(source)
    measure, is_exact = _MEASURES.get(format_name, (None, False))
    if measure is None:
        return None
    with binary(source) as file:
        stated = measure(file, size)
    if stated is None or stated <= size:
        return None
    return MissingTail(stated, size, is_exact and stated - size > MISSING_SHARE * stated)


def _riff(file: Any, size: int) -> int | None:
    end = 0
    while end + 8 <= size:  # large files are several chunks in a row
        file.seek(end)
        head = file.read(8)
        if head[:4] != b"RIFF":
            break
        end += 8 + int.from_bytes(head[4:], "little")
    return end


def _matroska(file: Any, size: int) -> int | None:
    file.seek(0)
    head, at = file.read(_HEAD_BYTES), 0
    for identity in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):  # the header, then the segment with everything else
        if head[at : at + 4] != identity or at + 5 > len(head) or not head[at + 4]:
            return None
        length = 9 - head[at + 4].bit_length()
        value = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
        at += 4 + length + value
    return None if value == (1 << 7 * length) - 1 else at  # all ones: a live recording that does not know


def _boxes(file: Any, size: int) -> int | None:
    end = 0
    for _ in range(_BOX_LIMIT):
        if end == size:
            return end
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if len(head) >= 8 and length < 8:
            return None  # 0: to the end of the file; else no box
        end += max(8, length)
        if end > size:
            return end
    return None


def _asf(file: Any, size: int) -> int | None:
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0 or len(head) < at + 92 or head[at + 88] & _ASF_BROADCAST:
        return None
    return int.from_bytes(head[at + 40 : at + 48], "little")


def _gif(file: Any, size: int) -> int | None:
    file.seek(0)
    head = file.read(13).ljust(13, b"\0")
    at = 13 + (3 << (head[10] & 7) + 1 if head[10] & 0x80 else 0)  # a colour table
    while True:
        file.seek(at)
        block = file.read(10)
        if block[:1] == b";":
            return at + 1
        if block[:1] == b"!":
            at += 2
        elif block[:1] == b"," and len(block) == 10:
            at += 11 + (3 << (block[9] & 7) + 1 if block[9] & 0x80 else 0)
        else:
            return size + 1  # cut off, or no block where one should be
        file.seek(at)
        while length := file.read(1):
            at += 1 + length[0]
            if not length[0]:
                break
            file.seek(at)
        else:
            return size + 1


def swallowed_frames(source: Source, format_name: str, packets: int) -> int:
    """Frames of a GIF beyond its `packets`: where a length is wrong, one frame's data go on over those behind it."""
    if format_name != "gif":
        return 0
    found, before = 0, b""
    with binary(source) as file:
        while chunk := file.read(_CHUNK_BYTES):
            found += len(_GIF_FRAME.findall(before + chunk))
            before = chunk[1 - _GIF_FRAME_BYTES :]
    return max(0, found - packets)


def _flv(file: Any, size: int) -> int | None:
    file.seek(-4, os.SEEK_END)
    last = int.from_bytes(file.read(4), "big")  # every tag is followed by its size
    if not 11 <= last <= size - 4:
        return size + 1
    file.seek(size - 4 - last)
    return size if 11 + int.from_bytes(file.read(4)[1:], "big") == last else size + 1


def _transport_stream(file: Any, size: int) -> int | None:
    file.seek(0)
    head = file.read(_TS_PACKET_BYTES + 1)
    return -(-size // _TS_PACKET_BYTES) * _TS_PACKET_BYTES if head[:1] == head[-1:] == b"G" else None


_MEASURES: dict[str, tuple[Callable[[Any, int], int | None], bool]] = {
    "avi": (_riff, False), "matroska,webm": (_matroska, False), "mov,mp4,m4a,3gp,3g2,mj2": (_boxes, True),
    "asf": (_asf, True), "gif": (_gif, False), "flv": (_flv, False), "mpegts": (_transport_stream, False),
}  # fmt: skip
"""By FFmpeg's name of the format: how many bytes a file must have, and whether that count can be trusted."""
