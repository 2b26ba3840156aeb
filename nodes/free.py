"""The free-memory buttons as nodes: free what nobody keeps, or give up what is kept."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from server import PromptServer

from ..memory.reading import size_text
from ..patches import hooks, presses
from ..patches.kept import registry
from ..patches.residency import residents
from ..patches.versions import supported
from .sockets import passed_output, report_output, with_report

CATEGORY = "SteadyVSR/Memory"
FREE, RELEASE = "Free Memory", "Release Kept Models"
REPORT_TOOLTIP = "What was asked and what is loaded now, as JSON."


class FreeMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_FreeMemory",
            display_name=FREE,
            category=CATEGORY,
            description="Presses ComfyUI's free-memory button at the end of this workflow. Kept models stay. The "
            "memory panel and the log show what it freed; to free a model within a workflow, use a Phase Gate.",
            inputs=[
                io.AnyType.Input(
                    "value", tooltip="Anything; the request is noted when it arrives. It is passed on unchanged."
                ),
                io.Boolean.Input(
                    "unload_models", default=True, tooltip="Take every model that is not kept off its device."
                ),
                io.Boolean.Input(
                    "free_memory",
                    default=False,
                    tooltip="Also drop the results of nodes, and with them models in RAM that nobody keeps. With this "
                    "alone, ComfyUI unloads models too.",
                ),
                io.String.Input("reason", default="", tooltip="A note that is shown beside the result."),
            ],
            outputs=[passed_output(), report_output(REPORT_TOOLTIP)],
            is_output_node=True,
            **supported(io.Schema, search_aliases=["unload models", "clean vram", "purge"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, value: Any, unload_models: bool, free_memory: bool, reason: str) -> io.NodeOutput:
        queue = PromptServer.instance.prompt_queue
        for name, wanted in (("unload_models", unload_models), ("free_memory", free_memory)):
            if wanted:
                queue.set_flag(name, True)
        presses.set_reason(reason)
        report = {
            "node": FREE,
            "asked": {"unload_models": unload_models, "free_memory": free_memory, "reason": reason},
            "when": "after this workflow",
            "loaded_now": [item.to_json() for item in residents()],
            "kept": [entry.name for entry in registry().owned()],
            "wrappers": hooks.status(),
        }
        return with_report(value, report=report)


class ReleaseKept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SteadyVSR_ReleaseKept",
            display_name=RELEASE,
            category=CATEGORY,
            description="Releases every kept model: from then on ComfyUI treats it like any other, and the "
            "free-memory buttons take it. The node itself moves nothing.",
            inputs=[
                io.AnyType.Input(
                    "value", tooltip="Anything; models are released when it arrives. It is passed on unchanged."
                )
            ],
            outputs=[passed_output(), report_output(REPORT_TOOLTIP)],
            is_output_node=True,
            **supported(io.Schema, search_aliases=["unpin", "forget models"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        given_up = registry().release()
        registry().settle()
        released = [
            {"id": entry.id, "name": entry.name, "bytes": entry.size_bytes, "size": size_text(entry.size_bytes)}
            for entry in given_up
        ]
        loaded = [item.to_json() for item in residents()]
        return with_report(value, report={"node": RELEASE, "released": released, "loaded_now": loaded})
