"""What a node declares itself with: `io` and `ui`, VIDEO values, and the extension that lists the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import torch

from . import io, ui

__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io", "ui"]


class ComfyExtension:
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        raise NotImplementedError


@dataclass
class VideoComponents:
    images: torch.Tensor
    frame_rate: Fraction
    audio: dict[str, Any] | None = None


class VideoInput:
    pass


class VideoFromFile(VideoInput):
    def __init__(self, file: str | BytesIO) -> None:
        self._file = file

    def get_stream_source(self) -> str | BytesIO:
        return self._file


class VideoFromComponents(VideoInput):
    def __init__(self, components: VideoComponents) -> None:
        self._components = components

    def get_components(self) -> VideoComponents:
        return self._components


Input = SimpleNamespace(Image=torch.Tensor, Video=VideoInput)
InputImpl = SimpleNamespace(VideoFromFile=VideoFromFile, VideoFromComponents=VideoFromComponents)
Types = SimpleNamespace(VideoComponents=VideoComponents)
