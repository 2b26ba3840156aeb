"""One process of session.py for all tests of a module, on the double and in each ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.session.observed import ROOT, ran


@pytest.fixture(scope="module")
def observe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path | None], dict[str, Any]]:
    """What the scenarios of the module's SUBJECT saw in a place; each place is asked once."""
    subject, seen = request.module.SUBJECT, {}

    def of(place: Path | None) -> dict[str, Any]:
        if place not in seen:
            base = tmp_path_factory.mktemp(subject)
            (base / "input").mkdir()
            session, kind = Path(__file__).with_name("session.py"), "double" if place is None else "comfyui"
            seen[place] = ran(session, ROOT, kind, base, place=place, STEADYVSR_SCENARIOS=subject)
        return seen[place]

    return of


@pytest.fixture(scope="module")
def observed(observe: Callable[[Path | None], dict[str, Any]], comfyui_or_double: Path | None) -> dict[str, Any]:
    return observe(comfyui_or_double)
