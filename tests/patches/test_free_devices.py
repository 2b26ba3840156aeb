"""After both buttons the bytes of what is not kept are back, those of what is kept are not, and caches are empty.

free_devices.py measures in processes of its own: on the double of ComfyUI always, and on each checkout of COMFYUI_PATH.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from steadyvsr.tests.session.observed import played

SCRIPT = Path(__file__).with_name("free_devices.py")
MIB = 1 << 20
A, B, C = 96 * MIB, 64 * MIB, 80 * MIB

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library has no malloc_trim")


@pytest.fixture(scope="module")
def measured(comfyui_or_double: Path | None) -> dict:
    return played(SCRIPT, comfyui_or_double)


@pytest.mark.parametrize("column", ["keep", "pin"])
def test_the_process_gives_back_what_is_not_kept_and_nothing_else(measured, column):
    seen = measured[column]["process"]
    assert seen["loaded"] - seen["nothing"] >= 0.95 * (A + B + C)
    fallen = seen["loaded"] - seen["pressed"]
    assert 0.9 * A <= fallen <= 1.1 * A, f"{fallen / MIB:.1f} MiB of A's 96"
    assert seen["pressed"] - seen["nothing"] >= 0.95 * (B + C)
    assert (seen["listed"], seen["left"]) == ("ABC/ABC", "BC/BC")
    assert seen["after"] == {name: seen["before"][name] for name in "BC"}, "kept weights moved or changed"


def test_without_keeping_the_process_gives_back_all(measured):
    seen = measured["stock"]["process"]
    assert seen["left"] == "-/-" and seen["loaded"] - seen["pressed"] >= 0.95 * (A + B + C)


@pytest.fixture(scope="module")
def devices_left_out(comfyui_or_double: Path | None) -> int:
    """Of two accelerators, how many a press of ComfyUI alone does not reach: one until 0.3.64."""
    if comfyui_or_double is None:
        return 0
    _, _, press = (comfyui_or_double / "comfy" / "model_management.py").read_text().partition("def unload_all_models")
    return 0 if "for device in get_all_torch_devices" in press[:200] else 1


@pytest.mark.parametrize("column", ["keep", "pin"])
def test_of_two_accelerators_the_cache_of_each_is_emptied_once(measured, column, devices_left_out):
    mixed, all_kept = measured[column]["mixed"], measured[column]["all kept"]
    assert mixed["end"] == all_kept["end"] == "BC/BC"
    assert mixed["reserved_mib"] == {"cpu:0": [4, 1], "cpu:1": [6, 2]}
    assert mixed["emptied"] == {"cpu:0": 1, "cpu:1": 1}
    own = measured["stock"]["mixed"]["calls"] + devices_left_out
    assert mixed["calls"] <= own, "more calls than ComfyUI makes by itself, and one for a device that it leaves out"
    assert all_kept["calls"] == 1 and all_kept["reserved_mib"] == {"cpu:0": [1, 1], "cpu:1": [2, 2]}
