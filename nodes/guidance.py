"""Sampling in less memory: guidance without a doubled batch, and an allocator that is emptied between steps."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..memory import ledger, probe
from ..patches import residency
from ..patches.versions import empty_caches, supported, unique_id
from . import node_status, receipts
from .receipts import ReceiptCard

log = logging.getLogger("steadyvsr.nodes")

CATEGORY = "SteadyVSR/Memory"
GUIDANCE, LEAN = "Guidance Memory (CFG)", "Lean Sampling"
OFF, SEQUENTIAL, BATCHED = "off", "sequential", "batched"
NEVER, PRESSURE, EVERY_STEP = "never", "pressure", "every step"
GUIDANCE_KEY, LEAN_KEY = "steadyvsr_guidance", "steadyvsr_lean"
PLAIN_CONDS = 2
"""Positive and negative, in this order. Other kinds of guiders compute more, each in an order of its own."""


class GuidanceMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_GuidanceMemory",
            display_name=GUIDANCE,
            category=CATEGORY,
            description="Chooses how classifier-free guidance is computed. Positive and negative prompt in one batch "
            "need about twice the activations of one alone.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model; it is not changed, the output is a clone."),
                io.Combo.Input(
                    "mode",
                    options=[OFF, SEQUENTIAL, BATCHED],
                    default=OFF,
                    tooltip="off: the negative prompt is not computed: half the memory and half the time, but the cfg "
                    "value and the negative prompt have no effect. Only for models that need no guidance. sequential: "
                    "positive, then negative: half the memory, same result. batched: both at once, as ComfyUI does.",
                ),
            ],
            outputs=[io.Model.Output("guided_model", display_name="MODEL", tooltip="The model with that guidance.")],
            **supported(io.Schema, search_aliases=["cfg", "classifier-free guidance", "negative prompt"]),
        )

    @classmethod
    def execute(cls, model: Any, mode: str) -> io.NodeOutput:
        return io.NodeOutput(with_guidance(model, mode))


def with_guidance(model: Any, mode: str) -> Any:
    """A clone of a MODEL patcher that computes guidance in that way; it replaces an earlier choice.

    The wrapper encloses ComfyUI's own evaluation of the conditions, so functions of other nodes, before and after the
    guidance and around the model, see what they always see.

    Raises:
        ValueError: an unknown mode.
    """
    wrappers = {OFF: PositiveOnly(), SEQUENTIAL: _one_after_another, BATCHED: None}
    if mode not in wrappers:
        raise ValueError(f"{GUIDANCE}: expected a mode of {', '.join(wrappers)}; got {mode!r}. Choose one of them.")
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, GUIDANCE_KEY)
    wrapper = wrappers[mode]
    if wrapper is not None:
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, GUIDANCE_KEY, wrapper)
    return patched


def _one_after_another(
    executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict
) -> list[Tensor]:
    """Each condition in a call of its own. A condition that is None gives zeros, as in ComfyUI."""
    return [
        torch.zeros_like(x) if cond is None else executor(model, [cond], x, timestep, model_options)[0]
        for cond in conds
    ]


class PositiveOnly:
    """Computes the positive condition only and returns it for the negative too: any cfg then gives the positive.

    Other nodes may evaluate conditions one by one or three at once. Which of those could be left out is unknown, so all
    are computed, and the log says so once.
    """

    def __init__(self) -> None:
        self._said = False

    def __call__(
        self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict
    ) -> list[Tensor]:
        if len(conds) == PLAIN_CONDS and conds[0] is not None:
            (positive,) = executor(model, conds[:1], x, timestep, model_options)
            return [positive, torch.zeros_like(x) if conds[1] is None else positive]
        if not self._said:
            self._said = True
            log.warning("%s off: another node evaluates the prompts in its own way; none is left out there.", GUIDANCE)
        return _one_after_another(executor, model, conds, x, timestep, model_options)


class LeanSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_LeanSampling",
            display_name=LEAN,
            category=CATEGORY,
            description="Gives unused memory of torch's allocator back to the driver between sampler steps. What that "
            "cost in seconds is shown on this node, in the memory panel and in the log when sampling is over, and in "
            "every Memory Report after the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model; it is not changed, the output is a clone."),
                io.Combo.Input(
                    "clean",
                    options=[NEVER, PRESSURE, EVERY_STEP],
                    default=PRESSURE,
                    tooltip="never: measure nothing, clean nothing. pressure: after a step at which the card is fuller "
                    "than the warning level (a setting, 80 % by default); where that cannot be read, nothing is "
                    "cleaned. every step: always; the slowest.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("lean_model", display_name="MODEL", tooltip="The model that cleans up.")],
            **supported(io.Schema, search_aliases=["empty cache", "vram", "clean"]),
        )

    @classmethod
    def execute(cls, model: Any, clean: str) -> io.NodeOutput:
        if clean not in (NEVER, PRESSURE, EVERY_STEP):
            raise ValueError(f"{LEAN}: expected never, pressure or every step; got {clean!r}. Choose one of them.")
        patched = model.clone()
        patched.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, LEAN_KEY)
        if clean != NEVER:
            patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, LEAN_KEY, Cleaning(clean, unique_id(cls)))
        return io.NodeOutput(patched)


class Cleaning:
    """Wraps the sampler: cleans after its steps, and reports at the end what that cost.

    Args:
        when: pressure | every step.
        node_id: of the node that shows the result.
    """

    def __init__(self, when: str, node_id: str | None) -> None:
        self.when, self.node_id = when, node_id

    def __call__(
        self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, *rest: Any, **more: Any
    ) -> Any:
        steps = cleanings = unread = 0
        seconds = 0.0
        device = guider.model_patcher.load_device

        def after_step(step: int, denoised: Tensor, x: Tensor, total_steps: int) -> None:
            nonlocal steps, cleanings, unread, seconds
            if callback is not None:
                callback(step, denoised, x, total_steps)
            steps += 1
            started = time.perf_counter()
            fill = "" if self.when == EVERY_STEP else ledger.current().levels.of(probe.attempt(probe.current(), device))
            unread += fill == "unknown"
            if self.when == EVERY_STEP or fill in ("warn", "critical"):
                empty_caches()
                cleanings += 1
            seconds += time.perf_counter() - started

        try:
            return executor(guider, sigmas, extra_args, after_step, *rest, **more)
        finally:
            line = f"{cleanings} cleanings in {steps} steps, {seconds:.2f} s in all ({self.when})"
            if unread:
                line += f"; how full {device} is could not be read after {unread} of them"
            log.info("%s: %s", LEAN, line)
            # This node's outputs existed before sampling began; a Memory Report behind the sampler reads the ledger.
            residency.prompt_ledger().mark(f"{LEAN}: {line}", quiet=True)
            receipts.give(ReceiptCard(LEAN, line, "DONE"))
            node_status.send(self.node_id, receipt={"line": line, "verdict": "DONE"})
