"""Converting between decoded video frames and RGB tensors, in float32 from the code values on.

libswscale only changes the memory layout of a frame (packed to planar, big to little endian). The colour matrix, the
range and the chroma positions are applied here: swscale's 16-bit RGB is up to one 8-bit level too dark (measured with
PyAV 18.1: white comes out as 65280 of 65535), and PyAV 14.2 loses the source's range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.plane import VideoPlane
from torch import Tensor

# ITU-T H.273 code points, as FFmpeg's AVColorSpace / AVColorPrimaries / AVColorTransferCharacteristic number them.
MATRIX_BT709, MATRIX_BT601, MATRIX_BT2020 = 1, 6, 9
PRIMARIES_BT709, PRIMARIES_UNSPECIFIED, PRIMARIES_BT2020 = 1, 2, 9
TRANSFER_BT709, TRANSFER_UNSPECIFIED = 1, 2
RANGE_LIMITED, RANGE_FULL = 1, 2

# (Kr, Kb) of each matrix: H.273 table 4.
LUMA_WEIGHTS = {
    MATRIX_BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    MATRIX_BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    MATRIX_BT2020: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
HD_LINES = 720
PACKED_RGB = frozenset({"rgb24", "rgb48be", "bgr0"})
REARRANGED = {"bgr0": "rgb24", "p010le": "yuv420p10le"}
"""Formats that libswscale makes, at the end, of another one by moving bytes."""

_YUV = re.compile(r"yuv(?P<jpeg>j?)a?(?P<chroma>4[0-4][0-4])p(?P<bits>\d*)(?:le|be)?")
_CHROMA_STEPS = {"444": (1, 1), "440": (1, 2), "422": (2, 1), "420": (2, 2), "411": (4, 1), "410": (4, 4)}


@dataclass(frozen=True)
class ColourTags:
    """How RGB was or will be written as YUV: H.273 code points for matrix, primaries and transfer."""

    matrix: int = MATRIX_BT709
    primaries: int = PRIMARIES_BT709
    transfer: int = TRANSFER_BT709


@dataclass(frozen=True)
class PixelLayout:
    """A planar pixel format that this module reads and writes plane by plane.

    Attributes:
        planes: index of the frame's plane for each of (Y, Cb, Cr), (R, G, B) or (Y,).
        x_step, y_step: luma samples per chroma sample.
    """

    name: str
    kind: str
    bits: int
    planes: tuple[int, ...]
    x_step: int = 1
    y_step: int = 1
    full_range: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("u1") if self.bits == 8 else np.dtype("<u2")


def pixel_layout(name: str) -> PixelLayout | None:
    """The layout of a planar format by FFmpeg's name (little endian above 8 bits), or None if it is not planar."""
    yuv = _YUV.fullmatch(name)
    if yuv and not name.endswith("be"):
        x_step, y_step = _CHROMA_STEPS[yuv["chroma"]]
        return PixelLayout(name, "yuv", int(yuv["bits"] or 8), (0, 1, 2), x_step, y_step, bool(yuv["jpeg"]))
    gbr = re.fullmatch(r"gbra?p(\d*)(?:le)?", name)
    if gbr:
        return PixelLayout(name, "rgb", int(gbr[1] or 8), (2, 0, 1), full_range=True)
    grey = re.fullmatch(r"gray(\d*)(?:le)?", name)
    if grey:
        return PixelLayout(name, "grey", int(grey[1] or 8), (0,), full_range=True)
    return None


def can_hold(pixel_format: str, width: int, height: int) -> bool:
    """Whether `rgb_to_frame` writes this format at this size: RGB, or YUV with whole chroma samples."""
    layout = pixel_layout(REARRANGED.get(pixel_format, pixel_format))
    if layout is None:
        return pixel_format in PACKED_RGB
    return layout.kind != "grey" and width % layout.x_step == 0 and height % layout.y_step == 0


def bit_depth(frame: av.VideoFrame) -> int:
    """Bits of the frame's deepest component."""
    return max(component.bits for component in frame.format.components)


def has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"


def matrix_of(frame: av.VideoFrame) -> int:
    """The frame's YUV matrix; if the file does not say, BT.709 from 720 lines on and else BT.601, as players do."""
    matrix = int(frame.colorspace)
    if matrix in LUMA_WEIGHTS:
        return matrix
    return MATRIX_BT709 if frame.height >= HD_LINES else MATRIX_BT601


def frame_to_rgb(frame: av.VideoFrame) -> Tensor:
    """Converts a decoded frame to HWC float32 RGB 0..1 on the CPU; alpha is dropped, nothing is rotated."""
    frame, layout = _as_planar(frame)
    if layout is None:
        packed = frame.to_ndarray()
        return torch.from_numpy(packed.astype(np.float32)).div_(255.0 if packed.dtype == np.uint8 else 65535.0)
    planes = [_read_plane(frame, index, layout.dtype) for index in layout.planes]
    if layout.kind == "rgb":
        return torch.stack(planes, dim=-1).div_(2**layout.bits - 1)
    tagged = int(frame.color_range)
    full_range = tagged == RANGE_FULL or (layout.full_range and tagged != RANGE_LIMITED)
    top, unit = 2**layout.bits - 1, 2 ** (layout.bits - 8)
    luma = planes[0].div_(top) if full_range else planes[0].sub_(16 * unit).div_(219 * unit)
    if layout.kind == "grey":
        return luma.clamp_(0, 1).unsqueeze(-1).repeat(1, 1, 3)
    # JPEG's chroma samples lie between luma columns, those of MPEG-2 and everything after it on the even ones.
    centred = layout.name.startswith("yuvj")
    height, width = luma.shape
    differences = []
    for plane in planes[1:]:
        chroma = plane.sub_(128 * unit).div_(top if full_range else 224 * unit)
        chroma = _interpolate(chroma, 0, layout.y_step, height, centred=True)
        differences.append(_interpolate(chroma, 1, layout.x_step, width, centred))
    cb, cr = differences
    kr, kb = LUMA_WEIGHTS[matrix_of(frame)]
    kg = 1 - kr - kb
    rgb = torch.empty(*luma.shape, 3)
    torch.add(luma, cr, alpha=2 * (1 - kr), out=rgb[..., 0])
    torch.add(luma, cb, alpha=-2 * kb * (1 - kb) / kg, out=rgb[..., 1]).sub_(cr, alpha=2 * kr * (1 - kr) / kg)
    torch.add(luma, cb, alpha=2 * (1 - kb), out=rgb[..., 2])
    return rgb.clamp_(0, 1)


def rgb_to_frame(rgb: Tensor, pixel_format: str, matrix: int = MATRIX_BT709) -> av.VideoFrame:
    """Converts HWC float RGB 0..1 to a frame of `pixel_format`, rounding code values (limited range for YUV).

    Raises:
        ValueError: `can_hold` refuses the format.
    """
    height, width, _ = rgb.shape
    return packed_to_frame(pack(rgb[None], pixel_format, matrix)[0], width, height, pixel_format, matrix)


def pack(rgb: Tensor, pixel_format: str, matrix: int = MATRIX_BT709) -> Tensor:
    """The bytes of frames as an encoder takes them, made on the device where the frames are.

    Args:
        rgb: THWC float in 0..1.

    Returns:
        uint8, T × bytes of a frame: plane by plane without padding, and at the end one byte that is 1, or 0 for a frame
        with NaN or infinity. See `packed_to_frame`.

    Raises:
        ValueError: `can_hold` refuses the format.
    """
    height, width = rgb.shape[1:3]
    if not can_hold(pixel_format, width, height):
        raise ValueError(f"pixel format {pixel_format}: cannot hold {width}x{height} RGB. Choose yuv444p.")
    finite = rgb.sum((1, 2, 3), dtype=torch.float32).isfinite()
    layout = pixel_layout(REARRANGED.get(pixel_format, pixel_format))
    if layout is None:
        deep = pixel_format == "rgb48be"
        parts = [_code_bytes(rgb.float().clamp(0, 1), 65535 if deep else 255, 0, 65535 if deep else 255, deep)]
    else:
        parts = _planar_bytes(rgb, layout, matrix)
    return torch.cat([*(part.flatten(1) for part in parts), finite.to(torch.uint8)[:, None]], 1)


def packed_to_frame(
    packed: Tensor, width: int, height: int, pixel_format: str, matrix: int = MATRIX_BT709
) -> av.VideoFrame:
    """The frame of one row of `pack`, which has to be on the CPU. Whether it was finite is not looked at."""
    if pixel_format in REARRANGED:
        return packed_to_frame(packed, width, height, REARRANGED[pixel_format], matrix).reformat(format=pixel_format)
    data = packed.numpy()
    layout = pixel_layout(pixel_format)
    frame = av.VideoFrame(width, height, pixel_format)
    if layout is None:
        _write_plane(frame, 0, data[:-1].reshape(height, -1))
        return frame
    if layout.kind == "yuv":
        frame.colorspace, frame.color_range = matrix, RANGE_LIMITED  # some encoders (ProRes) tag from the frame
    start = 0
    for index in layout.planes:
        plane = frame.planes[index]
        rows, row_bytes = plane.height, plane.width * layout.dtype.itemsize
        _write_plane(frame, index, data[start : start + rows * row_bytes].reshape(rows, row_bytes))
        start += rows * row_bytes
    return frame


def packed_is_finite(packed: Tensor) -> bool:
    """Whether a row of `pack` comes from a frame without NaN and infinity."""
    return bool(packed[-1])


def _planar_bytes(rgb: Tensor, layout: PixelLayout, matrix: int) -> list[Tensor]:
    """Bytes of each plane, T × rows × bytes of a row. Plane after plane, so that few copies exist at once."""
    top, unit = 2**layout.bits - 1, 2 ** (layout.bits - 8)
    if layout.kind == "rgb":
        return [_code_bytes(colour.float().clamp(0, 1), top, 0, top) for colour in rgb.unbind(-1)]
    kr, kb = LUMA_WEIGHTS[matrix]
    red, green, blue = (colour.float().clamp(0, 1) for colour in rgb.unbind(-1))
    luma = red * kr + green * (1 - kr - kb) + blue * kb
    del green
    parts = [_code_bytes(luma, 219 * unit, 16 * unit, top)]
    for colour, weight in ((blue, kb), (red, kr)):
        chroma = _downsample_chroma((colour - luma) / (2 * (1 - weight)), layout)
        parts.append(_code_bytes(chroma, 224 * unit, 128 * unit, top))
    return parts


def _code_bytes(values: Tensor, factor: int, offset: int, top: int, big_endian: bool = False) -> Tensor:
    """values · factor + offset, rounded, as bytes: the last dimension is twice as long where `top` needs two."""
    codes = (values * factor + offset).round_().clamp_(0, top)
    if top == 255:
        return codes.to(torch.uint8)
    codes = codes.to(torch.int32)
    low, high = (codes & 255).to(torch.uint8), (codes >> 8).to(torch.uint8)
    return torch.stack([high, low] if big_endian else [low, high], -1).flatten(-2)


def _as_planar(frame: av.VideoFrame) -> tuple[av.VideoFrame, PixelLayout | None]:
    """The frame in a layout known here, or (packed rgb24 / rgb48le, None); bytes are moved, no matrix is applied."""
    layout = pixel_layout(frame.format.name)
    if layout is not None:
        return frame, layout
    bits = bit_depth(frame)
    depth = "" if bits <= 8 else f"{bits}le"
    name = frame.format.name
    if name.startswith("gray") or name.startswith("ya"):
        target = "gray" if bits <= 8 else "gray16le"
    elif name.startswith("gbr") and not name.startswith("gbrpf") and not name.startswith("gbrapf"):
        target = f"gbrp{depth}"
    elif frame.format.is_rgb or name == "pal8" or len(frame.format.components) < 3:
        return frame.reformat(format="rgb24" if bits <= 8 else "rgb48le"), None
    else:
        x_step, y_step = 64 // frame.format.chroma_width(64), 64 // frame.format.chroma_height(64)
        chroma = next((key for key, steps in _CHROMA_STEPS.items() if steps == (x_step, y_step)), "444")
        target = f"yuv{chroma}p{depth}"
    return frame.reformat(format=target), pixel_layout(target)


def _plane_bytes(plane: VideoPlane) -> np.ndarray:
    """A view of the plane's memory, one row per line, padding included."""
    buffer = np.frombuffer(plane, dtype=np.uint8)  # pyright: ignore  a buffer, which PyAV's stub does not say
    return buffer.reshape(-1, plane.line_size)


def _read_plane(frame: av.VideoFrame, index: int, dtype: np.dtype) -> Tensor:
    plane = frame.planes[index]
    rows = _plane_bytes(plane)[: plane.height]
    return torch.from_numpy(rows[:, : plane.width * dtype.itemsize].view(dtype).astype(np.float32))


def _write_plane(frame: av.VideoFrame, index: int, data: np.ndarray) -> None:
    rows, row_bytes = data.shape
    _plane_bytes(frame.planes[index])[:rows, :row_bytes] = data


def _interpolate(chroma: Tensor, dim: int, step: int, length: int, centred: bool) -> Tensor:
    """Linear interpolation along `dim` to `length` luma positions; edges repeat."""
    if step == 1:
        return chroma
    position = torch.arange(length, dtype=torch.float64)
    if centred:
        position = position - (step - 1) / 2
    position = (position / step).clamp(0, chroma.shape[dim] - 1)
    lower = position.floor().long()
    upper = (lower + 1).clamp(max=chroma.shape[dim] - 1)
    weight = (position - lower).float()
    weight = weight[:, None] if dim == 0 else weight
    return torch.lerp(chroma.index_select(dim, lower), chroma.index_select(dim, upper), weight)


def _downsample_chroma(chroma: Tensor, layout: PixelLayout) -> Tensor:
    """THW: averages rows, and filters columns with [1 2 1]/4 around the even ones, where chroma lies; edges repeat."""
    if layout.y_step > 1:
        chroma = chroma.unflatten(1, (-1, layout.y_step)).mean(dim=2)
    if layout.x_step == 2:
        left = torch.cat([chroma[..., :1], chroma[..., 1:-1:2]], dim=-1)
        chroma = (left + 2 * chroma[..., ::2] + chroma[..., 1::2]) / 4
    elif layout.x_step > 2:
        chroma = chroma.unflatten(2, (-1, layout.x_step)).mean(dim=3)
    return chroma
