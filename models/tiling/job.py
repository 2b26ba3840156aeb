"""What a tiled computation offers to its runner: units of work that can be tried again with smaller tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

OnStep = Callable[[], None]
"""Called between the pieces of a unit. What it raises, such as an interrupt, leaves through the job."""


class NotFinite(ValueError):
    """A unit gave NaN or infinity; the message names the place and the dtype."""


class TileJob(Protocol):
    """An encode or decode in progress. Between two units it holds nothing on the device.

        while job.done < job.total:
            job.advance(lambda: None)
        frames = job.result

    A unit that raised left no trace and can be tried again, on another device, in another dtype or with smaller tiles.
    Finished units are kept if the result allows it, and computed again otherwise.

    Attributes:
        device: where the next unit is computed; the weights must be there.
        dtype: in which it is computed.
        tile: side of the tiles in pixels.
        result: what has been computed so far, on the CPU; complete when `done == total`.
        done, total: units.
    """

    device: torch.device
    dtype: torch.dtype
    tile: int
    result: Tensor

    @property
    def done(self) -> int: ...

    @property
    def total(self) -> int: ...

    def advance(self, on_step: OnStep) -> None:
        """Computes one unit."""

    def cut(self, tile: int) -> None:
        """Goes on in tiles of this side."""
