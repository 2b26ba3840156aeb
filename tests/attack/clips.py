"""Small clips in many containers, and ways to damage them."""

from __future__ import annotations

import io
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np

FRAMES, WIDTH, HEIGHT, RATE, SAMPLE_RATE = 24, 64, 48, 12, 44_100
TITLE = "title-to-be-replaced-0123456789"


@dataclass(frozen=True)
class Form:
    """How a clip is stored.

    Attributes:
        suffix: of its name.
        container: of FFmpeg.
        video, pixels: encoder and pixel format.
        audio: encoder, or "" for a silent clip.
        options: of the container.
    """

    suffix: str
    container: str
    video: str
    audio: str = ""
    options: tuple[tuple[str, str], ...] = ()
    pixels: str = "yuv420p"


FRAGMENTS = (("movflags", "frag_keyframe+empty_moov+default_base_moof"),)
FORMS = {
    "mp4": Form(".mp4", "mp4", "libx264", "aac"),
    "silent mp4": Form(".mp4", "mp4", "libx264"),
    "mp4, index first": Form(".mp4", "mp4", "libx264", "aac", (("movflags", "faststart"),)),
    "fragmented mp4": Form(".mp4", "mp4", "libx264", "", FRAGMENTS),
    "fragmented mov": Form(".mov", "mov", "libx264", "aac", FRAGMENTS),
    "mkv": Form(".mkv", "matroska", "libx264", "aac"),
    "silent mkv": Form(".mkv", "matroska", "mpeg4"),
    "avi": Form(".avi", "avi", "mpeg4", "libmp3lame"),
    "silent avi": Form(".avi", "avi", "mjpeg", "", (), "yuvj420p"),
    "flv": Form(".flv", "flv", "libx264", "aac"),
    "silent flv": Form(".flv", "flv", "flv"),
    "ts": Form(".ts", "mpegts", "libx264", "aac"),
    "silent ts": Form(".ts", "mpegts", "mpeg2video"),
    "webm": Form(".webm", "webm", "libvpx", "libopus"),
    "silent webm": Form(".webm", "webm", "libvpx"),
    "gif": Form(".gif", "gif", "gif", "", (), "rgb8"),
    "wmv": Form(".wmv", "asf", "wmv2", "wmav2"),
    "silent wmv": Form(".wmv", "asf", "wmv2"),
}


def picture(index: int) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    planes = [(columns * 4 + index * 9) % 256, rows * 5 % 256, np.full_like(rows, 20 + 8 * index)]
    return np.stack(planes, -1).astype(np.uint8)


@cache
def good(form: str, first_second: float = 0.0) -> bytes:
    """A clip of 2 s whose times begin at `first_second`."""
    how = FORMS[form]
    # FFmpeg opens the file again to move an index to its front.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        write(path, how)
        content = path.read_bytes()
    return shifted(content, how, [(0, first_second)]) if first_second else content


def write(path: Path, how: Form) -> None:
    with av.open(str(path), "w", format=how.container, options=dict(how.options)) as container:
        container.metadata["title"] = TITLE
        video: Any = container.add_stream(how.video, rate=RATE, options={"threads": "1", "g": "6"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, how.pixels
        rate = 48_000 if how.audio == "libopus" else SAMPLE_RATE
        audio: Any = container.add_stream(how.audio, rate=rate, layout="mono") if how.audio else None
        if audio is not None:
            audio.bit_rate = 64_000
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            container.mux(video.encode(frame))
            if audio is not None:
                samples = np.arange(index * rate // RATE, (index + 1) * rate // RATE)
                tone = (0.4 * np.sin(2 * math.pi * 440 * samples / rate)).astype(np.float32)[None]
                sound = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                sound.sample_rate, sound.pts = rate, int(samples[0])
                container.mux(audio.encode(sound))
        for stream in (video, audio) if audio else (video,):
            container.mux(stream.encode(None))


def shifted(content: bytes, how: Form, jumps: list[tuple[int, float]]) -> bytes:
    """The same packets with other times: from packet N on so many seconds later, for each (N, seconds)."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(file, "w", format=how.container) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for number, packet in enumerate(source.demux()):
            if packet.dts is None or packet.time_base is None:
                continue
            ticks = int(sum(seconds for first, seconds in jumps if number >= first) / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) + ticks, packet.dts + ticks
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    return file.getvalue()


@dataclass(frozen=True)
class Damaged:
    """A clip after the damage.

    Attributes:
        how: in words.
        frames: that are in it for whoever reads all of it.
        whole: whether every frame must come out.
        name: of the file; None: an ordinary one.
    """

    content: bytes
    how: str
    frames: int = FRAMES
    whole: bool = False
    name: str | bytes | None = None


def cut(form: str, rng: random.Random) -> Damaged:
    content = good(form)
    share = rng.choice([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, rng.random(), rng.random()])
    return Damaged(content[: int(len(content) * share)], f"cut off at {share:.0%}")


def bits(form: str, rng: random.Random) -> Damaged:
    content, count = bytearray(good(form)), rng.choice([1, 1, 4, 32, 256])
    where = rng.choice(["anywhere", "anywhere", "the first kB", "the last kB"])
    first = max(0, len(content) - 1024) if where == "the last kB" else 0
    last = min(1024, len(content)) if where == "the first kB" else len(content)
    for _ in range(count):
        content[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return Damaged(bytes(content), f"{count} bits flipped in {where}")


def gap(form: str, rng: random.Random) -> Damaged:
    """A piece in the middle is missing, zeroed, noise or there twice."""
    content = good(form)
    start = rng.randrange(len(content))
    stop = min(len(content), start + int(len(content) * rng.choice([0.01, 0.05, 0.2])) + 1)
    kind = rng.choice(["missing", "zeroed", "noise", "twice"])
    piece = {
        "missing": b"",
        "zeroed": bytes(stop - start),
        "noise": rng.randbytes(stop - start),
        "twice": content[start:stop] * 2,
    }
    changed = content[:start] + piece[kind] + content[stop:]
    return Damaged(changed, f"{stop - start} bytes {kind} at {start / len(content):.0%}")


def titled(form: str, rng: random.Random) -> Damaged:
    """A title that is not UTF-8, or that speaks to a terminal. No picture is touched by it."""
    titles = [
        "Grüße aus Köln".encode("latin-1"), b"\xff" * len(TITLE), b"\x1b[31mred\x1b[2J", b"\r\nError: none",
        "日本".encode("shift-jis"),
        b"\x00\x01\x02", b"\xc3", b"\xed\xa0\x80", "\u202egnp.exe".encode(),
    ]  # fmt: skip
    title = rng.choice(titles).ljust(len(TITLE), b" ")[: len(TITLE)]
    content = good(form)
    return Damaged(content.replace(TITLE.encode(), title), f"the title {title.strip()!r}", whole=True)


def together(form: str, rng: random.Random) -> Damaged:
    """Two clips in one file. Containers with an index hold the first one only, whatever lies behind it."""
    other = rng.choice([form, form, "ts", "silent ts"])
    chained = FORMS[form].container in ("mpegts", "flv") and FORMS[other].container == FORMS[form].container
    return Damaged(good(form) + good(other), f"followed by a {other}", 2 * FRAMES if chained else FRAMES)


def later(form: str, rng: random.Random) -> Damaged:
    """Two clips of one form with a gap of time between them, or the second one earlier than the first."""
    form = rng.choice(["ts", "silent ts"])
    seconds = rng.choice([3.0, 600.0, 2**31 / 90_000 + 5, 2**32 / 90_000, 2**33 / 90_000 - 3, 90_000.0])
    pair = [good(form), good(form, seconds)]
    if rng.random() < 0.3:
        pair.reverse()
    return Damaged(b"".join(pair), f"{form} with the times of {seconds:.0f} s behind or before it", 2 * FRAMES)


def jumping(form: str, rng: random.Random) -> Damaged:
    """Times that jump in the middle of a clip."""
    form = rng.choice(["mkv", "silent mkv", "ts", "silent ts", "flv", "mp4", "webm"])
    seconds = rng.choice([5.0, 3600.0, 2**31 / 90_000 + 5, 2**31 / 1000 + 5, 2**33 / 90_000])
    return Damaged(
        shifted(good(form), FORMS[form], [(rng.randrange(1, 20), seconds)]), f"{form} with a jump of {seconds:.0f} s"
    )


def hardly(form: str, rng: random.Random) -> Damaged:
    content = good(form)
    pieces = {
        "nothing": b"", "one byte": content[:1], "zeros": bytes(rng.choice([1, 16, 4096])),
        "text": b"no video at all\n",
        "noise": rng.randbytes(rng.choice([16, 4096])), "its start and noise": content[:64] + rng.randbytes(5000),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile:///etc/passwd\n",
        "a script": b"#!/bin/sh\nls\n",
        "a concat list": b"ffconcat version 1.0\nfile /etc/passwd\n", "a web page": b"<!DOCTYPE html><html></html>",
    }  # fmt: skip
    how = rng.choice(list(pieces))
    return Damaged(pieces[how], how, 1 << 30)


def named(form: str, rng: random.Random) -> Damaged:
    """A good or a cut-off clip under a name that speaks to a terminal or is no UTF-8."""
    suffix = FORMS[form].suffix
    names: list[str | bytes] = [
        f"\x1b[31mred{suffix}", f"two\nlines{suffix}", b"caf\xe9" + suffix.encode(), f"\u202egpj.{suffix}",
        f"-o{suffix}",
        f"%d{suffix}", f"a*b{suffix}", f"a?b[0]{suffix}", f"file:x{suffix}", f"http:{suffix}", "clip",
        f"clip{suffix}.txt", "clip.jpg.mp4",
        f"{'x' * 240}{suffix}", f"\r{suffix}", f" {suffix}", f"tab\t{suffix}",
    ]  # fmt: skip
    name, content = rng.choice(names), good(form)
    is_cut = rng.random() < 0.5
    if is_cut:
        content = content[: len(content) // 3]
    return Damaged(content, f"{'cut off, ' if is_cut else ''}called {name!r}", name=name)


DAMAGES: tuple[Callable[[str, random.Random], Damaged], ...] = (
    cut, cut, cut, bits, bits, gap, gap, titled, together, later, jumping, hardly, named,
)  # fmt: skip
