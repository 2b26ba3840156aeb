"""Run by a real ComfyUI's Python, in its folder: the node Memory Doctor on a simulated card.

    python doctor_session.py PACK_FOLDER BASE_FOLDER

Prints one JSON object on the last line: scenario → what was observed, or {"error": traceback}. The assertions are in
test_doctor.py.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback

import phases_host as host  # starts ComfyUI; what follows needs that
from phases_host import CARD, RECORD, mm, nodes, resident, torch

assert host.FILES

CAPACITY = 64_000_000


def ask() -> dict:
    """The node's report, what was on the card while it worked, and what is there afterwards."""
    RECORD.take()
    node = nodes.NODE_CLASS_MAPPINGS["SteadyVSR_Doctor"].PREPARE_CLASS_CLONE({})
    output = node.execute()
    loads, _ = RECORD.take()
    gc.collect()
    return {
        "report": json.loads(output.args[0]),
        "shown": output.ui.as_dict()["text"][0] if hasattr(output.ui, "as_dict") else str(output.ui),
        "loads": [load["resident"] for load in loads],
        "resident_after": resident(),
        "listed_after": len(mm.current_loaded_models),
    }


def fine() -> dict:
    return ask()


def held() -> dict:
    """ComfyUI's free_memory does nothing when the doctor's offload asks it."""
    RECORD.stubbed = ""
    try:
        return ask()
    finally:
        RECORD.stubbed = None


def interrupted() -> dict:
    """The user presses cancel while it works."""
    mm.interrupt_current_processing(True)
    try:
        ask()
    except mm.InterruptProcessingException:
        stopped = True
    else:
        stopped = False
    finally:
        mm.interrupt_current_processing(False)
    gc.collect()
    return {"stopped": stopped, "resident_after": resident()}


def main() -> None:
    CARD.capacity = CAPACITY
    results = {}
    for scenario in (fine, held, interrupted):
        try:
            with torch.inference_mode():  # as ComfyUI runs nodes
                results[scenario.__name__] = scenario()
        except BaseException:  # noqa: B036  reported, and the test of this scenario fails on it
            results[scenario.__name__] = {"error": traceback.format_exc()}
        mm.unload_all_models()
    sys.stdout.write("\n" + json.dumps(results) + "\n")


main()
