"""A ComfyUI in which a function has another name or other arguments costs that function's promise, and no node.

changed_comfyui.py makes the change before the pack is imported: on the double of ComfyUI, and on each checkout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import ROOT, ran, scenario

SESSION = Path(__file__).with_name("session.py")
NETWORKS = ["CausalLQ4xProjection", "TCDecoder", "Transformer"]
NODES = 17
STAY, USABLE = "stay through Unload Models", "stay usable when a copy of them is gone"
ROOM = "stay on their device when others need little room"


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, comfyui_or_double: Path | None) -> Callable[[str], Any]:
    """What the products saw in a ComfyUI that was changed in one way."""

    def of(case: str) -> Any:
        base = tmp_path_factory.mktemp("changed")
        (base / "input").mkdir()
        kind = "double" if comfyui_or_double is None else "comfyui"
        wanted = {"STEADYVSR_SCENARIOS": "changed", "STEADYVSR_CHANGED": case}
        return scenario(ran(SESSION, ROOT, kind, base, place=comfyui_or_double, **wanted), "changed products")

    return of


def works(seen: dict) -> None:
    assert seen["nodes"] == NODES
    assert seen["healed"] == ["replaced", "on top"] or set(seen["status"].values()) == {"off"}
    assert (seen["frames"], seen["picture"]) == ([9, 64, 96, 3], [1, 128, 128, 3])


def left_out(seen: dict) -> dict[str, str]:
    return {name: status for name, status in seen["status"].items() if status != "on top"}


@pytest.mark.parametrize("case", ["keep_loaded renamed", "arguments swapped"])
def test_a_function_with_other_arguments_is_left_alone_with_one_warning(changed, case):
    seen = changed(case)
    works(seen)
    assert left_out(seen) == {"free_memory": "does not fit"}
    (off,), (warning,) = seen["off"], seen["warnings"]
    assert ROOM in off and off in warning
    assert "expected free_memory(memory_required, device, keep_loaded, …); got free_memory(" in warning
    assert seen["kept on the device"] == NETWORKS, "the other promises hold"


def test_functions_with_other_names_cost_their_promises_and_no_node(changed):
    """Also without the question which node executes, which has no promise of its own."""
    seen = changed("names renamed")
    works(seen)
    assert left_out(seen) == {"unload_all_models": "missing", "soft_empty_cache": "missing"}
    assert [STAY in seen["off"][0], USABLE in seen["off"][1]] == [True, True] and len(seen["warnings"]) == 2


def test_a_setting_leaves_comfyui_as_it_is(changed):
    seen = changed("setting off")
    works(seen)
    assert set(seen["status"].values()) == {"off"} and len(seen["off"]) == len(seen["status"])
    assert seen["warnings"] == [] and seen["kept on the device"] == []
