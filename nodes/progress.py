"""Progress, live preview and interruption of one node's run."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.utils
from PIL import Image
from torch import Tensor

PREVIEW_PIXELS = 512
"""Longest side of the live preview."""


class RunProgress:
    """The `on_step` of one run: asks ComfyUI for an interrupt, then moves the bar.

    The bar counts output frames, the one unit that the user knows; `total` may be an estimate.
    """

    def __init__(self, total: int, node_id: str | None) -> None:
        self.frames = 0
        self._total = max(1, total)
        self._bar = comfy.utils.ProgressBar(self._total, node_id=node_id)
        self._newest: Tensor | None = None

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        mm.throw_exception_if_processing_interrupted()
        preview = None
        if self._newest is not None:
            preview = ("JPEG", preview_image(self._newest), PREVIEW_PIXELS)
            self._newest = None
        self._bar.update_absolute(self.frames, max(self._total, self.frames), preview)

    def frame(self, frame: Tensor) -> None:
        """Counts one finished frame, HWC 0..1, and keeps it for the next preview."""
        self.frames += 1
        self._newest = frame

    def finish(self) -> None:
        self._bar.update_absolute(self.frames, self.frames)


def preview_image(frame: Tensor) -> Image.Image:
    """A thumbnail of a frame HWC 0..1, by taking every n-th pixel: it is made many times and seen for a second."""
    step = max(1, -(-max(frame.shape[:2]) // PREVIEW_PIXELS))
    return Image.fromarray((frame[::step, ::step] * 255).round().byte().cpu().numpy())
