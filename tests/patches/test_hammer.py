"""What other threads ask of the registry meets ComfyUI's worker at its safe points, and nowhere else.

hammer.py runs in a process of its own: on the double of ComfyUI always, and on each checkout of COMFYUI_PATH.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("hammer.py")
REQUESTS = 3 * 3333


@pytest.fixture(scope="module")
def observed(comfyui_or_double: Path | None) -> dict:
    return played(SCRIPT, comfyui_or_double)


def test_a_release_between_two_unloads_leaves_the_worker_its_list(observed):
    seen = observed["between two unloads"]
    assert seen["pressed"] == 1 and seen["failure"] == "" and seen["died elsewhere"] == 0
    assert seen["in the end"] == "-/XYZ", "released, and given up at the end of the node"


def test_no_network_dies_on_another_thread_than_the_worker_s(observed):
    seen = observed["hammered"]
    assert sum(seen["requests"].values()) == REQUESTS and seen["prompts"] > 50 and seen["deaths"] > 50
    assert seen["died elsewhere"] == 0


def test_ten_thousand_requests_raise_nothing_and_lose_and_double_no_entry(observed):
    seen = observed["hammered"]
    assert (seen["failures"], seen["first"], seen["errors"]) == (0, [], [])
    assert (seen["doubled"], seen["half unloaded"], seen["lost"], seen["in the end"]) == (0, 0, 0, "-/-")
