"""Progress, live preview and interruption of one node's run."""

from __future__ import annotations

import time
from collections.abc import Callable

import av
import comfy.model_management as mm
import comfy.utils
from av.video.reformatter import Interpolation
from PIL import Image
from torch import Tensor

from .. import node_status

PREVIEW_PIXELS = 512
"""Longest side of the live preview."""
STATUS_SECONDS = 0.5
"""Shortest time between two updates of the status line on the node."""


class RunProgress:
    """The `on_step` of one run: checks whether ComfyUI was interrupted, then moves the bar.

    The bar counts output frames, the unit that the user knows; `total` may be an estimate.

    Args:
        picture: makes a video frame of a packed one; None where frames come as HWC.
    """

    def __init__(
        self, total: int, node_id: str | None, picture: Callable[[Tensor], av.VideoFrame] | None = None
    ) -> None:
        self.frames = 0
        self._picture = picture
        self._total = max(1, total)
        self._bar = comfy.utils.ProgressBar(self._total, node_id=node_id)
        self._newest: Tensor | None = None
        self._node_id = node_id
        self._started = time.perf_counter()
        self._said = 0.0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        mm.throw_exception_if_processing_interrupted()
        preview = None
        if self._newest is not None:
            shown = preview_image(self._newest) if self._picture is None else small(self._picture(self._newest))
            preview = ("JPEG", shown, PREVIEW_PIXELS)
            self._newest = None
        self._bar.update_absolute(self.frames, max(self._total, self.frames), preview)
        if time.perf_counter() - self._said >= STATUS_SECONDS:
            self._say(phase)

    def frame(self, frame: Tensor) -> None:
        """Counts a finished frame, HWC 0..1 or packed, and keeps it for the next preview."""
        self.frames += 1
        self._newest = frame

    def finish(self) -> None:
        self._bar.update_absolute(self.frames, self.frames)
        self._total = self.frames
        self._say("done")

    def _say(self, phase: str) -> None:
        self._said = time.perf_counter()
        fps = self.frames / max(self._said - self._started, 1e-6)
        eta = max(0, self._total - self.frames) / fps if self.frames else None
        progress = {"phase": phase, "frames": self.frames, "total": self._total, "fps": fps, "eta": eta}
        node_status.send(self._node_id, progress=progress)


def small(frame: av.VideoFrame) -> Image.Image:
    """A thumbnail of a video frame."""
    step = max(1, -(-max(frame.width, frame.height) // PREVIEW_PIXELS))
    size = (max(1, frame.width // step), max(1, frame.height // step))
    return frame.reformat(*size, "rgb24", interpolation=Interpolation.POINT).to_image()


def preview_image(frame: Tensor) -> Image.Image:
    """A thumbnail of a frame HWC 0..1: every n-th pixel, because many are made and each is seen for a second."""
    step = max(1, -(-max(frame.shape[:2]) // PREVIEW_PIXELS))
    return Image.fromarray((frame[::step, ::step] * 255).round().byte().cpu().numpy())
