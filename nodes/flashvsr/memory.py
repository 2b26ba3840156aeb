"""The memory of one FlashVSR run in ComfyUI: predicted before, watched during, reported after.

A plan that fits is chosen. When the device runs out all the same, other models are unloaded first; then the run goes
down the engine's ladder (`models.flashvsr.memory_plan`), and at the bottom the error shows the table of attempts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm

from ...memory import budget, ledger, probe
from ...memory.reading import Reading, size_text
from ...models.flashvsr.footprint import activation_bytes
from ...models.flashvsr.memory_plan import TILES, MemoryPlan, plans, smaller
from ...patches.residency import residents, unload_others
from ...patches.versions import empty_caches, is_out_of_memory, memory_errors
from ..attempts import UNLOAD_OTHERS, Attempts, figures, node_line, peak_figures
from .model import LoadedFlashVSR
from .wan_decoder import StreamingWanVAE

PHASE = "FlashVSR"
CLEAN = ("pressure", "never", "every step")
ATTEMPT_COLUMNS = {"phase": "phase", "frame": "frame", "free": "free", "plan": "did not fit", "tried": "then"}
"""Of an attempt: the phase (set up, project, transform or decode), the output frames that were finished, the plan."""


@dataclass(frozen=True)
class RunLimits:
    """What a run is allowed.

    Attributes:
        budget_gb: GiB on the device, the model's own weights included; 0: what is free.
        tile: side of spatial tiles in output pixels; 0: whole frames as long as they fit.
        clean: when to empty the allocator's pool between two process steps: pressure | never | every step.
        log_steps: one line in the log for each process step.
    """

    budget_gb: float = 0.0
    tile: int = 0
    clean: str = CLEAN[0]
    log_steps: bool = False


@dataclass
class RunMemory:
    """One run's memory. Call the methods in this order.

    Attributes:
        node: display name, which errors begin with.
        patchers: of all networks in the run.
        vae: replaces the model's own decoder, or None.
        size: width and height of the output.
        report: what was predicted, what was read, and how the plan changed; bytes with their sources.
    """

    node: str
    model: LoadedFlashVSR
    patchers: list[Any]
    vae: StreamingWanVAE | None
    size: tuple[int, int]
    kv_ratio: float
    limits: RunLimits
    plan: MemoryPlan = field(init=False)
    attempts: Attempts = field(init=False)
    report: dict[str, Any] = field(default_factory=dict)
    _steps: int = 0
    _done: int = 0
    _phase: str = ""
    _cleanings: int = 0
    _cleaning_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.attempts = Attempts(self.node, ATTEMPT_COLUMNS)
        try:
            self.plan = MemoryPlan(tile=self.limits.tile or None)
        except ValueError as error:
            raise ValueError(f"{self.node}: {error} Choose 0 or another tile.") from error

    def need(self, plan: MemoryPlan) -> budget.Need:
        """Predicted bytes on the device."""
        model = self.model
        activations = activation_bytes(
            model.config,
            self.size,
            self.kv_ratio,
            model.dtype.itemsize,
            prompt_tokens=model.prompt.shape[1],
            on_cpu=model.device.type == "cpu",
            plan=plan,
            wan_decoder=None if self.vae is None else self.vae.costs(),
        )
        return budget.Need(weights=sum(patcher.model_size() for patcher in self.patchers), activations=activations)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The ledger's phase around the run, with the weights on the device. After it the report is complete."""
        before = self._read(settled=True)
        with ledger.current().phase(PHASE):
            self._choose(before)
            self._load()
            loaded = self._read()
            yield
            held = sum(patcher.loaded_size() for patcher in self.patchers)
        self._sum_up(before, loaded, held)

    def on_step(self, phase: str, done: int, total: int | None) -> None:
        """For the engine's `on_step`: logging and cleaning between two process steps."""
        border, self._phase, self._done = phase == "project" and self._phase != "project", phase, done
        if not border:
            return
        if self._steps:
            ledger.mark(PHASE, step=self._steps, quiet=not self.limits.log_steps)
            if self._wants_cleaning():
                started = time.perf_counter()
                empty_caches()
                self._cleanings += 1
                self._cleaning_seconds += time.perf_counter() - started
        self._steps += 1

    def on_memory_error(self, phase: str, plan: MemoryPlan, error: Exception) -> MemoryPlan | None:
        """For the engine: makes room, or returns the next plan (None: the error is not about memory).

        Raises:
            mm.OOM_EXCEPTION: nothing is left to try; the message holds the table of attempts.
        """
        if not is_out_of_memory(error):
            return None
        empty_caches()
        free = self._read().free
        if unload_others(self.model.device, self.patchers):
            self._attempt(phase, UNLOAD_OTHERS, free)
            return plan
        found = smaller(plan, phase, self.size)
        self._attempt(phase, found[0] if found else "", free)
        if found is None:
            raise self.attempts.exhausted(error, "Choose a smaller scale, a smaller precision or another device.")
        self.plan = found[1]
        return self.plan

    def summary(self) -> dict[str, Any]:
        """For the line on the node."""
        peak = self.report["peak"]
        known = next((peak[name]["bytes"] for name in ("allocated", "driver") if peak[name]["bytes"] is not None), None)
        budget_bytes = self.report["budget_bytes"] if self.limits.budget_gb > 0 else None
        return node_line(self.report["predicted"]["bytes"], known, budget_bytes, self.attempts)

    def _choose(self, before: Reading) -> None:
        """The first plan that is predicted to fit."""
        start, weights = self.plan, self.need(self.plan).weights
        limited = self.limits.budget_gb > 0
        allowed = budget.gib(self.limits.budget_gb) if limited else self._available(before, weights)
        settings = [(name, plan) for name, plan in plans(start, self.size) if limited or name != TILES]
        self.report |= {
            "budget_bytes": allowed,
            "budget_source": "budget_gb" if limited else f"free ({before.used.source or 'unknown'})",
        }
        if allowed is not None:
            try:
                found = budget.fit(allowed, settings, lambda setting: self.need(setting[1]), weights if limited else 0)
            except ValueError as error:
                raise ValueError(f"{self.node}: {error}") from error
            if limited and not found.fits:
                lines = [f"{size_text(size)}  {name}: {plan}" for (name, plan), size in found.tried]
                raise ValueError(
                    f"{self.node}: expected a budget_gb in which a plan fits; got {size_text(allowed)}. "
                    "Predicted:\n" + "\n".join(lines) + "\nRaise budget_gb, or choose a smaller scale."
                )
            # A prediction alone makes no frame worse: tiles wait for a real error or for a budget.
            self.plan = (found.setting or settings[-1])[1]
        need = self.need(self.plan)
        self.report |= {
            "predicted": {"weights_bytes": need.weights, "activations_bytes": need.activations, "bytes": need.tensors},
            "plan_at_start": str(self.plan),
        }

    def _load(self) -> None:
        """Puts the weights on the device, as far down the ladder as that takes."""
        while True:
            try:
                mm.load_models_gpu(self.patchers, memory_required=self.need(self.plan).activations)
                return
            except memory_errors() as error:
                failure = error.with_traceback(None)  # the traceback holds what was being copied
            if self.on_memory_error("set up", self.plan, failure) is None:
                raise failure

    def _available(self, before: Reading, weights: int) -> int | None:
        """Bytes that the run can have: what is free, and what ComfyUI would move away for it; None where unknown."""
        if before.free is None:
            return None
        if self.model.device.type == "cpu":
            # The weights are in RAM already, and nothing can be moved away.
            return before.free + weights
        return before.free + sum(item.bytes for item in residents(self.model.device) if not item.dead)

    def _wants_cleaning(self) -> bool:
        if self.limits.clean == "pressure":
            return ledger.current().levels.of(self._read()) in ("warn", "critical")
        return self.limits.clean == "every step"

    def _attempt(self, phase: str, tried: str, free: int | None) -> None:
        self.attempts.append(
            {"phase": phase, "frame": self._done, "plan": str(self.plan), "tried": tried, "free": free}
        )

    def _read(self, *, settled: bool = False) -> Reading:
        return probe.read(self.model.device, settled=settled)

    def _sum_up(self, before: Reading, loaded: Reading, held: int) -> None:
        phase, after = ledger.current().phases[-1], self._read(settled=True)
        peak = phase.peaks.get(after.device, ledger.Peak().with_(after))
        self.report |= {
            "before": figures(before),
            "peak": peak_figures(peak),
            "after": figures(after),
            "plan_at_end": str(self.plan),
            "attempts": self.attempts,
            "cleanings": {
                "when": self.limits.clean, "times": self._cleanings, "seconds": round(self._cleaning_seconds, 4),
            },
        }  # fmt: skip
        if peak.allocated.bytes is not None and loaded.allocated.bytes is not None and not self.attempts:
            # What others hold on the device is not part of the prediction.
            measured = peak.allocated.bytes - (loaded.allocated.bytes - held)
            predicted = held + self.report["predicted"]["activations_bytes"]
            self.report["predicted"]["error"] = round((predicted - measured) / max(measured, 1), 4)
