"""Beside ComfyUI-MultiGPU, imported before or after us: kept models stay, the status of the wrappers is true.

STEADYVSR_MULTIGPU names checkouts of it (several joined by the system's path separator), COMFYUI_PATH those of ComfyUI.
Tested were its a38cbda, which 0.3.64 cannot import, and 1ca3daf, which replaces `unload_all_models`.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from steadyvsr.tests.comfy.server import ROOT, Server
from steadyvsr.tests.comfy.test_free_rows import ROWS, rows, start
from steadyvsr.tests.conftest import comfyui_checkouts
from steadyvsr.tests.patches.test_free_worlds import at_least
from steadyvsr.tests.session.observed import played, ran

SCRIPT = Path(__file__).with_name("multigpu_session.py")
CHECKOUTS = [Path(part) for part in os.environ.get("STEADYVSR_MULTIGPU", "").split(os.pathsep) if part]
PLACES = [(comfyui, multigpu) for comfyui in comfyui_checkouts() for multigpu in CHECKOUTS]
OURS = ("keep", "pin")
NAMES = ("unload_all_models", "free_memory", "soft_empty_cache", "load_models_gpu")
WORKER = (
    "PromptExecutor.execute", "execution.execute", "PromptExecutor.reset", "PromptQueue.get", "PromptQueue.get_flags",
)  # fmt: skip
OTHERS = ("throw_exception_if_processing_interrupted", *WORKER)

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not CHECKOUTS, reason="needs ComfyUI-MultiGPU: set STEADYVSR_MULTIGPU"),
]


WORLDS = ROOT / "tests" / "patches" / "free_worlds.py"


@cache
def ran_once(comfyui: Path, multigpu: Path, order: str) -> dict:
    return ran(SCRIPT, ROOT, multigpu, order, place=comfyui)


def session(comfyui: Path, multigpu: Path, order: str) -> dict:
    """What the session script saw; the test is skipped where this ComfyUI cannot import that checkout."""
    seen = ran_once(comfyui, multigpu, order)
    if seen["refused"]:
        pytest.skip(f"this ComfyUI cannot import it: {seen['refused']}")
    return seen


@pytest.fixture(params=PLACES, ids=[f"{comfyui.name}-{multigpu.name}" for comfyui, multigpu in PLACES])
def checkouts(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    return request.param


@pytest.fixture(params=["before", "after"])
def beside(request: pytest.FixtureRequest, checkouts: tuple[Path, Path]) -> dict:
    return session(*checkouts, request.param)


@pytest.mark.parametrize("column", OURS)
def test_every_scenario_ends_as_without_it(beside, checkouts, column):
    """S10 has an entry without a patcher, which 1ca3daf cannot take: alone it ends ComfyUI's worker."""
    alone = played(WORLDS, checkouts[0])[column]
    assert len(alone) == 15
    for name, found in alone.items():
        there = beside[column][name]
        if name == "S12":  # it sets a flag of its own when caches are emptied by force
            found, there = ({**x, "seen": {**x["seen"], "flags": None}} for x in (found, there))
        if name == "S8":
            found, there = ({**x, "seen": {**x["seen"], "end": None}} for x in (found, there))
        assert {key: there[key] for key in found} == found, name


@pytest.mark.parametrize("column", OURS)
def test_its_own_ways_of_unloading_take_a_and_leave_b_and_c(beside, column):
    marked, forced = beside[column]["flagged"], beside[column]["forced"]
    assert forced["seen"]["flags"] == ["free_memory"], "it asks for a reset in the middle of a prompt"
    for press in (marked["seen"]["first"], marked["seen"]["second"], forced["seen"]["first"]):
        at_least(press, "BC")
        assert press["pre"] == "ABC/ABC" and press["end"] == "BC/BC"
    assert marked["reads"] == {"A": 2, "B": 1, "C": 1} and forced["reads"] == {"A": 1, "B": 1, "C": 1}
    assert marked["errors"] == forced["errors"] == []


def test_the_status_says_where_the_wrappers_stand(checkouts):
    first, second = session(*checkouts, "before"), session(*checkouts, "after")
    assert first["theirs"] == second["theirs"] and any(first["theirs"].values())
    for seen in (first, second):
        for statuses in seen["status"].values():
            statuses.pop("unload_model_and_clones", None)  # of 0.33 alone
    on_top, gone = (dict.fromkeys((*NAMES, *OTHERS), state) for state in ("on top", "replaced"))
    assert first["status"] == {"start": on_top, "end": on_top, "uninstalled": gone}
    # Its functions do not say what they wrap, so ours beneath them count as replaced until the next loader runs.
    expected = on_top | {name: "replaced" for name, theirs in second["theirs"].items() if theirs}
    assert second["status"] == {"start": expected, "end": on_top, "uninstalled": gone}


def test_a_server_with_both_packs_keeps_what_it_was_told_to_keep(checkouts, tmp_path):
    comfyui, multigpu = checkouts
    servers: list[Server] = []
    try:
        prompts = start(servers, comfyui, tmp_path, beside=multigpu)
        imported = "[MultiGPU Core Patching]" in servers[0].log.read_text()
        if not imported:
            pytest.skip("this ComfyUI cannot import it")
        assert rows(prompts, "keep") == ROWS
        state = prompts.state()
        assert state["reads"]["B"] == state["reads"]["C"] == 1 and state["worker"] is True
    finally:
        for server in servers:
            server.stop()
