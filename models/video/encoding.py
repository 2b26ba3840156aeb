"""How pictures are encoded: container, codec, pixel format, and the encoder's options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import torch
from av.error import FFmpegError

from .pixels import can_hold, frame_to_rgb, pack, packed_to_frame

CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm",
}  # fmt: skip
_QUALITY = {
    "libx264": ("crf", 16, 51), "libx265": ("crf", 18, 51), "libvpx-vp9": ("crf", 22, 63), "libsvtav1": ("crf", 22, 63),
    "h264_nvenc": ("cq", 18, 51), "hevc_nvenc": ("cq", 20, 51), "av1_nvenc": ("cq", 24, 63),
}  # fmt: skip
"""By codec: what its option is called, a value where compression is hard to see (the scales differ; those of NVENC by
analogy, tried on no card), and the worst. Codecs not listed here have no such setting."""
_PRESETS = frozenset({"libx264", "libx265", "libsvtav1", "h264_nvenc", "hevc_nvenc", "av1_nvenc"})
AUTO = "auto"
_HARDWARE = {False: ("h264_nvenc", "hevc_nvenc"), True: ("hevc_nvenc", "av1_nvenc")}
"""Encoders on the card for eight bits and for ten, the one that more players show first."""
_CHECK_FRAMES, _CHECK_LEVELS = 3, 4 / 255
_CHOICES_8_BIT = ("yuv420p", "yuv422p", "yuv444p")
_CHOICES_10_BIT = ("yuv420p10le", "p010le", "yuv422p10le", "yuv444p10le")
_LOSSLESS_CHOICES = {"ffv1": (("gbrp10le",), ("bgr0",))}
"""By codec: formats for ten bits and for eight, in RGB so that nothing is lost."""
LOOKAHEAD_FRAMES = 20
"""Frames of H.264 that wait in the encoder, which plans its rate with them. Its own 40 take twice the memory, some 5
bytes per pixel and frame, and are complete only after 60 frames of a clip, so a longer one seemed to leak."""


@dataclass(frozen=True)
class Encoding:
    """How the pictures are encoded, as decided by `choose_encoding`.

    Attributes:
        crf: quality, under whatever name the codec has for it; None: it has none.
        preset: speed against size, in the codec's words; None: its default.
        note: what a user should be told about the choice.
    """

    container: str
    codec: str
    pixel_format: str
    crf: int | None
    preset: str | None = None
    note: str | None = None

    def options(self) -> dict[str, str]:
        """For FFmpeg's encoder."""
        options = {} if self.crf is None else {_QUALITY[self.codec][0]: str(self.crf)}
        if self.preset is not None:
            options["preset"] = self.preset
        if self.codec == "libx264":
            options["rc-lookahead"] = str(LOOKAHEAD_FRAMES)
        if self.codec == "libx265":
            options["x265-params"] = "log-level=none"
        if self.codec.endswith("_nvenc"):
            options |= {"rc": "vbr", "b": "0"}  # quality alone decides
        return options


def choose_encoding(
    path: str | Path,
    width: int,
    height: int,
    *,
    codec: str | None = None,
    crf: int | None = None,
    ten_bit: bool = False,
    preset: str | None = None,
) -> Encoding:
    """Chooses container (by the file's ending), codec, pixel format (4:2:0; 4:4:4 for odd sizes) and quality.

    Args:
        codec: None means VP9 for .webm, else H.264 (H.265 for ten bits, which few players show as H.264); "auto" the
            same, but by the card (NVENC) where its encoder passes a check at this size. The note says which.
        crf: None means a default.
        preset: passed to the encoder; None means its default.

    Raises:
        ValueError: the ending is unknown, there is no such encoder, or it cannot hold the size; nothing is ever
            cropped. The message names the file, and the next even size where that helps.
    """
    name = Path(path).name
    container = CONTAINERS.get(Path(path).suffix.lower())
    if container is None:
        raise ValueError(f"{name}: expected an ending of {', '.join(CONTAINERS)}; got {Path(path).suffix or 'none'}.")
    in_software = "libvpx-vp9" if container == "webm" else ("libx265" if ten_bit else "libx264")
    if codec != AUTO:
        return _encoding(name, container, codec or in_software, width, height, crf, ten_bit, preset)
    refused = []
    for candidate in ("av1_nvenc",) if container == "webm" else _HARDWARE[ten_bit]:
        try:
            found = _encoding(name, container, candidate, width, height, crf, ten_bit, preset)
        except ValueError as error:
            refused.append(f"{candidate}: {error}")
            continue
        if (reason := refusal(found, width, height)) is None:
            return replace(found, note=f"Encoded on the card by {candidate}.")
        refused.append(f"{candidate}: {reason}")
    note = f"Encoded on the CPU by {in_software}, as no encoder of a card works here ({'; '.join(refused)})."
    return replace(_encoding(name, container, in_software, width, height, crf, ten_bit, preset), note=note)


def refusal(encoding: Encoding, width: int, height: int) -> str | None:
    """Why an encoder cannot be used at this size; None if it encodes some frames and they come back as they were."""
    ramp = torch.linspace(0.2, 0.8, width).expand(1, height, width)[..., None].expand(-1, -1, -1, 3)
    packed = pack(ramp, encoding.pixel_format)[0]
    try:
        encoder = cast(av.VideoCodecContext, av.CodecContext.create(encoding.codec, "w"))
        encoder.width, encoder.height, encoder.pix_fmt = width, height, encoding.pixel_format
        encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 25), Fraction(25), encoding.options()
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(encoder.codec.canonical_name, "r"))
        packets = []
        for index in range(_CHECK_FRAMES):
            frame = packed_to_frame(packed, width, height, encoding.pixel_format)
            frame.pts = index
            packets += encoder.encode(frame)
        packets += encoder.encode(None)
        decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
        if len(decoded) != _CHECK_FRAMES:
            return f"{len(decoded)} of {_CHECK_FRAMES} frames came back"
        difference = max(float((frame_to_rgb(frame) - ramp[0]).abs().mean()) for frame in decoded)
    except (FFmpegError, ValueError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if difference < _CHECK_LEVELS else f"frames came back {difference * 255:.0f} of 255 levels off"


def _encoding(
    name: str,
    container: str,
    codec: str,
    width: int,
    height: int,
    crf: int | None,
    ten_bit: bool,
    preset: str | None,
) -> Encoding:
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
    if preset is not None and codec not in _PRESETS:
        raise ValueError(f"{name}: expected no preset for {codec}, which has none; got {preset!r}.")
    if codec not in _QUALITY:
        if crf is not None:
            raise ValueError(f"{name}: expected no crf for {codec}, which has none; got {crf}.")
        return Encoding(container, codec, pixel_format, None, preset)
    _, default, worst = _QUALITY[codec]
    if crf is not None and not 0 <= crf <= worst:
        raise ValueError(f"{name}: expected a crf from 0 (best) to {worst}; got {crf}.")
    return Encoding(container, codec, pixel_format, default if crf is None else crf, preset)


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
