"""The memory of one tiled VAE run: predicted for a tile, measured on the first one, reported at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm

from ...memory import budget, ledger, probe
from ...memory.reading import MIB, Reading, size_text
from ...patches.residency import handle_of, residents
from ..attempts import Attempts, figures, node_line, peak_figures

MARGIN = 1.2
"""Factor on a tile's bytes, for the allocator's rounding."""
WORKSPACE_BYTES = 256 * MIB
"""Left free beside a tile on an accelerator: convolutions take workspace that no shape reveals."""
SLACK_BYTES = 16 * MIB
"""Growth over a run that does not count as a leak."""


@dataclass
class TileMemory:
    """Call the methods in this order.

    Attributes:
        vae: a ComfyUI VAE object.
        image: height and width in pixels.
        budget_gb: GiB on the device, the VAE's weights included; 0: what is free.
        predicted: bytes of a tile of a given side, beside the weights.
        measured_tile: bytes that the first tile took beside the weights; None where nothing counted them.
    """

    vae: Any
    image: tuple[int, int]
    budget_gb: float
    predicted: Callable[[int], int]
    measured_tile: int | None = None
    _tile: int = 0
    _before: Reading = field(init=False)
    _loaded: Reading = field(init=False)
    _after: Reading = field(init=False)
    _moved: int = 0
    _held: int = 0
    _others: list[dict[str, Any]] = field(default_factory=list)
    _peak: ledger.Peak = field(default_factory=ledger.Peak)

    def read(self, *, settled: bool = False) -> Reading:
        return probe.read(self.vae.device, settled=settled)

    def largest_tile(self, sides: Sequence[int]) -> int:
        """The first of these sides (largest first) that is predicted to fit, else the last."""
        return next((side for side in sides if self._fits(self.predicted(side))), sides[-1])

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The ledger's phase around the run."""
        self._before, before = self.read(settled=True), self._books()
        with ledger.current().phase(name):
            yield
            self._note_peak()
        self._after = self.read(settled=True)
        self._moved = self._books() - before

    def load(self, tile: int) -> None:
        """Has ComfyUI put the weights on the device and make room for one tile of that side.

        Asking for more than one tile needs would move other models away for nothing.
        """
        self._tile = tile
        try:
            mm.load_models_gpu(
                [self.vae.patcher],
                memory_required=self.predicted(tile),
                force_full_load=getattr(self.vae, "disable_offload", False),
            )
        finally:  # a run may go on without them there
            self._loaded, self._held = self.read(), self.vae.patcher.loaded_size()
            own = handle_of(self.vae.patcher.model)
            found = [item for item in residents(self.vae.device) if item.bytes and item.handle != own]
            self._others = [{"name": item.name, "bytes": item.bytes} for item in found]
            self._begin_peak()

    @contextmanager
    def measuring_tile(self) -> Iterator[None]:
        """Measures the peak of one tile, where the device has a counter for it."""
        self._note_peak()
        first = self._begin_peak()
        yield
        last = self._note_peak()
        if last.peak.bytes is not None and first.allocated.bytes is not None:
            self.measured_tile = max(0, last.peak.bytes - first.allocated.bytes)

    def fitting_tile(self, tile: int, sides: Sequence[int]) -> int | None:
        """The first of these sides (largest first) that fits by what a tile of side `tile` was measured to take. None
        where nothing was measured or none fits."""
        measured = self.measured_tile
        if measured is None:
            return None
        return next((side for side in sides if self._fits(measured * self._area(side) // self._area(tile))), None)

    def report(self, kept: int) -> dict[str, Any]:
        """Bytes with their sources. `kept`: bytes of the result that stay on the device."""
        predicted, measured, peak = self.predicted(self._tile), self.measured_tile, self._run_peak()
        if measured is None and peak is not None:
            measured = peak - self._held
        return {
            "budget_bytes": self._limit,
            "weights_bytes": self._held,
            "predicted_bytes": predicted,
            "measured_bytes": measured,
            "predicted_per_measured": round(predicted / measured, 4) if measured else None,
            "run_peak_bytes": peak,
            "before": figures(self._before),
            "peak": peak_figures(self._peak),
            "after": figures(self._after),
            "grown_bytes": self._grown(),
            "kept_on_device_bytes": kept,
            "other_models": self._others,
        }

    def verdict(self, kept: int) -> dict[str, Any]:
        """Whether, by measurement, the peak stayed within the budget and the memory came back; with the reason."""
        peak, grown, limit = self._run_peak(), self._grown(), self._limit
        if peak is None or grown is None:
            note = self._loaded.peak.note or self._loaded.allocated.note or "this device has no peak counter"
            return {"verified": False, "verified_reason": f"not measurable on {self.vae.device}: {note}"}
        kept_to = limit is None or peak <= limit
        returned = grown <= kept + SLACK_BYTES
        words = f"peak {size_text(peak)}, weights included, "
        words += "no budget" if limit is None else f"{'within' if kept_to else 'above'} {size_text(limit)}"
        words += f"; {size_text(grown)} more than before" + ("" if returned else ", which did not come back")
        return {"verified": kept_to and returned, "verified_reason": words}

    def summary(self, attempts: Attempts) -> dict[str, Any]:
        """For the line on the node."""
        return node_line(self._held + self.predicted(self._tile), self._run_peak(), self._limit, attempts)

    def _fits(self, need: int) -> bool:
        allowed = self._allowed()
        workspace = 0 if self._on_cpu else WORKSPACE_BYTES
        return allowed is None or self.vae.patcher.model_size() + MARGIN * need + workspace <= allowed

    def _allowed(self) -> int | None:
        """Bytes that weights and tiles may take together; None where nothing says so."""
        free = self.read().free
        if free is not None:
            # Plus what ComfyUI would move away for a tile; on the CPU, the weights are in RAM already.
            free += self.vae.patcher.model_size() if self._on_cpu else self._books()
        return min((limit for limit in (free, self._limit) if limit is not None), default=None)

    @property
    def _limit(self) -> int | None:
        """The budget in bytes; None without one."""
        return budget.gib(self.budget_gb) if self.budget_gb > 0 else None

    @property
    def _on_cpu(self) -> bool:
        return self.vae.device.type == "cpu"

    def _area(self, side: int) -> int:
        height, width = self.image
        return min(side, height) * min(side, width)

    def _books(self) -> int:
        """Bytes of weights on the device by ComfyUI's books."""
        return sum(item.bytes for item in residents(self.vae.device))

    def _begin_peak(self) -> Reading:
        reading = self.read()
        if reading.peak.bytes is not None:
            ledger.current().mark("tile", quiet=True)  # the ledger notes the peak so far before the counter restarts
            probe.current().reset_peak(self.vae.device)
        return reading

    def _note_peak(self) -> Reading:
        reading = self.read()
        self._peak = self._peak.with_(reading)
        return reading

    def _run_peak(self) -> int | None:
        """Peak bytes of this VAE's weights and tiles, without what others hold on the device."""
        peak, loaded = self._peak.allocated.bytes, self._loaded.allocated.bytes
        if peak is None or loaded is None or self._loaded.peak.bytes is None:
            return None
        # A tracker on the CPU counts what was made since it began; the weights were there before.
        return peak - loaded + self._held

    def _grown(self) -> int | None:
        """Bytes that are on the device after the run and were not before, weights excluded."""
        before, after = self._before.allocated.bytes, self._after.allocated.bytes
        if before is None or after is None:
            return None
        return after - before - (0 if self._on_cpu else self._moved)
