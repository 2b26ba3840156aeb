"""Colour: code values to RGB and back, against H.273's formulas written out independently in float64."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from steadyvsr.models.video.pixels import RANGE_FULL, RANGE_LIMITED, frame_to_rgb, matrix_of, rgb_to_frame

HEIGHT, WIDTH = 48, 64
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def formula_rgb(codes: np.ndarray, matrix: int, full: bool, bits: int) -> np.ndarray:
    """H.273 equations 20–31 backwards: codes CHW → HWC."""
    kr, kb = WEIGHTS[matrix]
    unit, top = 2.0 ** (bits - 8), 2.0**bits - 1
    luma, cb, cr = codes.astype(np.float64)
    luma = luma / top if full else (luma / unit - 16) / 219
    cb, cr = ((c - 2.0 ** (bits - 1)) / (top if full else 224 * unit) for c in (cb, cr))
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.stack([red, green, blue], -1).clip(0, 1)


def random_frame(bits: int) -> tuple[av.VideoFrame, np.ndarray]:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, HEIGHT, WIDTH))
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p" if bits == 8 else f"yuv444p{bits}le")
    dtype = np.uint8 if bits == 8 else np.uint16
    for plane, values in zip(frame.planes, codes, strict=True):
        rows = np.zeros((HEIGHT, plane.line_size // np.dtype(dtype).itemsize), dtype)
        rows[:, :WIDTH] = values
        plane.update(rows.tobytes())
    return frame, codes


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize("full", [False, True])
def test_yuv_becomes_the_rgb_of_the_standard(bits, matrix, full):
    frame, codes = random_frame(bits)
    frame.colorspace, frame.color_range = matrix, RANGE_FULL if full else RANGE_LIMITED
    expected = formula_rgb(codes, matrix, full, bits)
    assert np.abs(frame_to_rgb(frame).numpy() - expected).max() < 2e-6


def test_an_untagged_frame_is_bt709_from_720_lines_on_and_bt601_below():
    assert matrix_of(av.VideoFrame(64, 576, "yuv420p")) == 6
    assert matrix_of(av.VideoFrame(64, 720, "yuv420p")) == 1


@pytest.mark.parametrize(
    ("pixel_format", "levels"), [("yuv444p", 1.7), ("yuv444p10le", 0.43), ("gbrp", 0.51), ("gbrp10le", 0.13)]
)
def test_rgb_survives_a_round_trip_to_the_rounding_of_its_format(pixel_format, levels):
    rgb = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    error = (frame_to_rgb(rgb_to_frame(rgb, pixel_format)) - rgb).abs().max() * 255
    assert error < levels


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p10le", "yuv420p10le"])
def test_chroma_of_a_ramp_is_not_shifted_by_subsampling(pixel_format):
    """A linear ramp is reproduced by linear filters at the right positions, and by no others."""
    x, y = torch.meshgrid(torch.linspace(0.2, 0.8, WIDTH), torch.linspace(0.2, 0.8, HEIGHT), indexing="xy")
    rgb = torch.stack([x, 1 - x, y], -1)
    inner = (slice(2, -2), slice(2, -2))
    error = (frame_to_rgb(rgb_to_frame(rgb, pixel_format))[inner] - rgb[inner]).abs().max() * 255
    assert error < 1.8


@pytest.mark.parametrize("packed", ["nv12", "p010le", "yuyv422"])
def test_packed_formats_give_the_same_picture_as_their_planar_form(packed):
    planar = {"nv12": "yuv420p", "p010le": "yuv420p10le", "yuyv422": "yuv422p"}[packed]
    frame = rgb_to_frame(torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1)), planar)
    assert torch.equal(frame_to_rgb(frame.reformat(format=packed)), frame_to_rgb(frame))


def test_alpha_is_dropped_without_blending():
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    rgb = frame_to_rgb(av.VideoFrame.from_ndarray(pixels, format="rgba"))
    assert torch.equal(rgb, torch.from_numpy(pixels[..., :3].astype(np.float32) / np.float32(255)))


def test_grey_becomes_three_equal_channels():
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    rgb = frame_to_rgb(av.VideoFrame.from_ndarray(pixels, format="gray"))
    assert torch.equal(rgb, torch.from_numpy(pixels.astype(np.float32) / np.float32(255))[..., None].expand(-1, -1, 3))


def test_values_are_rounded_not_cut_off():
    rgb = torch.full((HEIGHT, WIDTH, 3), 99.6 / 255)
    assert rgb_to_frame(rgb, "rgb24").to_ndarray().min() == 100
