"""The display rotation of a video or photo: phones store the sensor's picture and how to turn it."""

from __future__ import annotations

import av
import numpy as np
from av.sidedata.sidedata import Type
from torch import Tensor


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """[[a, b], [c, d]] of the frame's display matrix, rounded to quarter turns and flips; None if it has none.

    FFmpeg's libavutil/display.h: x' = a·x + c·y, y' = b·x + d·y with y downwards, stored in 16.16 fixed point.
    """
    side_data = frame.side_data.get(Type.DISPLAYMATRIX)  # pyright: ignore  PyAV's stub knows keys by name only
    if side_data is None:
        return None
    cells = np.frombuffer(bytes(side_data), dtype="<i4").reshape(3, 3)[:2, :2] / 65536
    straight = abs(cells[0, 0]) >= abs(cells[0, 1])
    return np.sign(cells) * (np.eye(2) if straight else np.eye(2)[::-1])


def turns_sideways(matrix: np.ndarray | None) -> bool:
    """Whether width and height are swapped."""
    return matrix is not None and matrix[0, 0] == 0


def upright(picture: Tensor, matrix: np.ndarray | None) -> Tensor:
    """Turns and mirrors HWC as its display matrix says."""
    if matrix is None:
        return picture
    if turns_sideways(matrix):
        picture = picture.transpose(0, 1)
        flip_x, flip_y = matrix[1, 0] < 0, matrix[0, 1] < 0
    else:
        flip_x, flip_y = matrix[0, 0] < 0, matrix[1, 1] < 0
    dims = [dim for dim, flipped in ((0, flip_y), (1, flip_x)) if flipped]
    return (picture.flip(dims) if dims else picture).contiguous()


class Uprighter:
    """Turns the pictures of one clip upright, reading a display matrix only where the rotation changes.

    Reading a frame's side data makes PyAV tie the frame into a cycle, so it stays until the garbage collector runs.
    Reading it for every frame costs 70 MiB at 512×512 (measured over 400 frames); reading `rotation` costs nothing.
    """

    def __init__(self) -> None:
        self._rotation: int | None = None
        self._matrix: np.ndarray | None = None

    def __call__(self, picture: Tensor, frame: av.VideoFrame) -> Tensor:
        """`picture`, HWC, is the frame as stored."""
        if frame.rotation != self._rotation:
            self._rotation, self._matrix = frame.rotation, display_matrix(frame)
        return upright(picture, self._matrix)
