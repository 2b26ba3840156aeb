"""Phase Gate ends a phase of a workflow; Memory Report shows what was measured in this run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui

from ..memory import plot, probe
from ..memory.budget import gib
from ..memory.offload import Verdict
from ..memory.reading import Figure, size_text
from ..patches import phases as gate
from ..patches import presses, residency
from ..patches.versions import supported, unique_id
from . import node_status, receipts
from .receipts import Line, ReceiptCard
from .sockets import as_json, passed_output, report_output, with_report

log = logging.getLogger("steadyvsr.nodes")

CATEGORY = "SteadyVSR/Memory"
GATE, REPORT = "Phase Gate", "Memory Report"
ALIASES = ["unload", "offload", "vram", "free memory", "memory budget"]
ERROR, WARN = "error", "warn"
MODELS = 4
NO_LIMIT = -1.0
LARGEST_GIB = 1024.0
NOTHING_KNOWN = vars(Figure())


def gib_input(name: str, tooltip: str, default: float = NO_LIMIT, **more: Any) -> io.Input:
    return io.Float.Input(name, default=default, min=NO_LIMIT, max=LARGEST_GIB, step=0.01, tooltip=tooltip, **more)


class PhaseGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_PhaseGate",
            display_name=GATE,
            category=CATEGORY,
            description="Ends a phase of a workflow: takes its models off the card, measures what is left there, and "
            "stops the workflow (or warns) if that is more than you allow. What follows waits for the gate.",
            inputs=[
                io.AnyType.Input(
                    "value", tooltip="What the phase produced. It is passed on unchanged, lists included."
                ),
                io.String.Input(
                    "phase", default="phase", tooltip="Name of the phase that ends here, for messages and reports."
                ),
                gib_input(
                    "budget_gb",
                    "What may still be on each card after this phase, in GiB: the larger of ComfyUI's books and live "
                    "tensors as the device counts them. -1: no limit. 0: nothing at all; on a CUDA card leave a few "
                    "hundredths for torch's own workspaces.",
                ),
                gib_input(
                    "needs_gb",
                    "What must be free on ComfyUI's card for what follows, in GiB, by measurement. 0: no requirement. "
                    "If it is not free, the message says what is in the way.",
                    default=0.0,
                ),
                io.Combo.Input(
                    "on_violation",
                    options=[ERROR, WARN],
                    default=ERROR,
                    tooltip="What happens if a model has not left the card or a limit is exceeded. error: the "
                    "workflow stops here. warn: it continues; the report and the log say so.",
                ),
                gib_input(
                    "peak_gb",
                    "The most that live tensors may take on a card during this phase, in GiB. -1: no limit. It is "
                    "watched while the nodes before this gate run: the one that exceeds it is stopped there.",
                    optional=True,
                ),
                io.AnyType.Input(
                    "wait_for",
                    optional=True,
                    tooltip="Something else that must be finished before this phase ends, such as the negative "
                    "prompt. It is not passed on.",
                ),
                *(
                    io.AnyType.Input(
                        f"model_{number}",
                        optional=True,
                        tooltip="A model of any kind to take off the card at the end of this phase. It stays in RAM. "
                        "Kept and pinned models move too: keep and pin protect against others, not against you.",
                    )
                    for number in range(1, MODELS + 1)
                ),
                io.Combo.Input(
                    "offload",
                    options=list(gate.SCOPES),
                    default=gate.THESE,
                    optional=True,
                    tooltip="What leaves the card here. these: the connected models. everything else too: with them "
                    "every model that nobody keeps. everything: kept and pinned ones as well.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                passed_output(is_output_list=True),
                report_output("What was measured here, as JSON."),
            ],
            # One gate for a whole list: a phase ends once.
            is_input_list=True,
            # ComfyUI runs an output node as soon as it can, so a phase is over before the next one starts; and a gate
            # whose value leads nowhere still runs.
            is_output_node=True,
            **supported(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def fingerprint_inputs(
        cls, budget_gb: list[float], needs_gb: list[float], peak_gb: list[float] | None = None, **_: object
    ) -> int:
        return gate.work_counter(limits_of(budget_gb, needs_gb, peak_gb))

    @classmethod
    def execute(
        cls,
        value: list[Any],
        phase: list[str],
        budget_gb: list[float],
        needs_gb: list[float],
        on_violation: list[str],
        peak_gb: list[float] | None = None,
        wait_for: list[Any] | None = None,
        model_1: list[Any] | None = None,
        model_2: list[Any] | None = None,
        model_3: list[Any] | None = None,
        model_4: list[Any] | None = None,
        offload: list[str] | None = None,
    ) -> io.NodeOutput:
        models = [model for wired in (model_1, model_2, model_3, model_4) for model in wired or () if model is not None]
        try:
            ended = gate.end_phase(phase[0], models, limits_of(budget_gb, needs_gb, peak_gb), scope_of(offload))
        except TypeError as error:
            raise ValueError(f"{GATE}: {error} on a model input. Connect a loader's output there.") from error
        for line in ended.lines():
            log.info("%s: %s", phase[0], line)
        # Before a violation is raised: the node and the panel show what was measured even if the workflow stops.
        show(ended, unique_id(cls))
        if ended.violations:
            said = "\n".join(f"{GATE}: expected {wanted}; got {got}. {todo}" for wanted, got, todo in ended.violations)
            if on_violation[0] == ERROR:
                raise RuntimeError(said)
            log.warning("%s", said)
        return with_report(value, report=_known({"node": GATE, **ended.to_json()}))


def show(ended: gate.Ended, node_id: str | None) -> None:
    """The result on the node and in the memory panel."""
    moved = [receipt for receipt in ended.receipts if receipt.verdict is not Verdict.NOT_LOADED]
    in_order = sorted(moved, key=lambda receipt: receipt.freed)
    verdict = "FAILED" if ended.violations else in_order[0].verdict.value if in_order else "DONE"
    line = " · ".join(f"{receipt.name}: {receipt}" for receipt in moved) or ended.lines()[0]
    models = tuple(Line(r.name, None, bool(r.still_loaded), r.asked, r.still_loaded) for r in moved)
    receipts.give(ReceiptCard(f"{GATE}: {ended.phase.name}", line, verdict, models))
    node_status.send(node_id, receipt={"line": line, "verdict": verdict})


def _known(value: Any) -> Any:
    """Plain values without figures that are unknown and have no note."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items() if item != NOTHING_KNOWN}
    return [_known(item) for item in value] if isinstance(value, list | tuple) else value


def limits_of(budget_gb: list[float], needs_gb: list[float], peak_gb: list[float] | None) -> gate.PhaseLimits:
    """Widgets in GiB as limits in bytes.

    They are lists because the gate takes lists. One that another node computes is None while ComfyUI asks for
    fingerprints.
    """
    resident, free, peak = (values[0] if values else None for values in (budget_gb, needs_gb, peak_gb))
    return gate.PhaseLimits(
        resident=gib(resident) if resident is not None and resident >= 0 else None,
        peak=gib(peak) if peak is not None and peak >= 0 else None,
        free=gib(free) if free is not None and free > 0 else None,
    )


def scope_of(offload: list[str] | None) -> str:
    """Workflows that were saved before this input was there take the connected models."""
    return offload[0] if offload and offload[0] in gate.SCOPES else gate.THESE


class MemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_MemoryReport",
            display_name=REPORT,
            category=CATEGORY,
            description="Reports and plots what was measured in this run so far: the phases that gates have ended, "
            "what Lean Sampling cost, the peak since the last report, which models are on which device now, and what "
            "the last press of a free-memory button did. It changes nothing.",
            inputs=[
                io.AnyType.Input(
                    "value",
                    tooltip="Anything; the report is made when it arrives. It is passed on unchanged. The report is "
                    "made in every run, so nodes behind it run again too: to avoid that, connect nothing to the "
                    "output.",
                ),
                io.String.Input(
                    "label",
                    default="report",
                    tooltip="A name for this point in the workflow, for the log and the plot.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                passed_output(is_output_list=True),
                report_output("What was measured, as JSON."),
                io.Image.Output(
                    "plot",
                    display_name="plot",
                    tooltip="Allocated, reserved and driver bytes over this run, one picture for each device.",
                ),
            ],
            is_input_list=True,
            is_output_node=True,
            **supported(io.Schema, search_aliases=ALIASES),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        residency.prompt_ledger()  # a run begins before its first node
        return float("nan")

    @classmethod
    def execute(cls, value: list[Any], label: list[str]) -> io.NodeOutput:
        book = residency.prompt_ledger()
        line = book.mark(label[0])
        run, peaks = book.since(residency.prompt_began()), book.take_peaks()
        residents = [resident for resident in residency.residents() if resident.bytes]
        process = probe.read("cpu", settled=True).process
        press = presses.last_press()
        measured = run.to_json()
        # Growth rests on earlier runs too: it is reported only where it is a leak, and apart from this run's numbers.
        growth = [phase.pop("growth") for phase in measured["phases"]]
        leaks = {
            f"{phase.name} on {device}": str(phase.growth[device])
            for phase, by_device in zip(run.phases, growth, strict=True)
            for device in by_device
            if phase.growth[device].leaking
        }
        # What others have marked, such as Lean Sampling, whose outputs exist before sampling begins.
        earlier = [mark for mark in run.marks if mark.kind == "mark"][: -len(line.splitlines())]
        text = [
            *line.splitlines(),
            *map(str, run.phases),
            *(f"{mark.reading.line(mark.stage)} · {mark.reading.device}" for mark in earlier),
            *(f"peak since the last report on {device}: {peak}" for device, peak in peaks.items()),
            *(f"on {item.device}: {item.name} {gate.exact_text(item.bytes)}" for item in residents),
            f"this process in RAM: {size_text(process.bytes)} ({process.source or process.note})",
            *(f"grows from run to run: {phase}, {leak}" for phase, leak in leaks.items()),
            *([] if press is None else [f"last press ({press.caller}): {press.line}"]),
            *([] if press is None else [f"last press, {look.line}" for look in press.looks]),
        ]
        report = _known(
            {
                "node": REPORT,
                "label": label[0],
                "text": text,
                "peak_since_last_report": {
                    device: {name: vars(figure) for name, figure in vars(peak).items()}
                    for device, peak in peaks.items()
                },
                "residents": [item.to_json() for item in residents],
                "process": vars(process),
                "growth_over_runs": leaks,
                "last_press": press and press.to_json(),
                **measured,
            }
        )
        devices = dict.fromkeys(mark.reading.device for mark in run.marks)
        picture = torch.cat([plot.draw(run, device) for device in devices])
        text = as_json(report)
        return io.NodeOutput(value, text, picture, ui=ui.PreviewText(text))
