"""One ComfyUI process for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.comfy.server import Server, base_folder
from steadyvsr.tests.session.observed import ran

SEEN: dict[tuple[Path, tuple[str, ...], str], dict[str, Any]] = {}
BOOKS = "books"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that names CARDS has its sessions run on each of them, unless a test chooses its own."""
    cards = getattr(metafunc.module, "CARDS", ())
    chosen = any("card" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if cards and not chosen and "card" in metafunc.fixturenames:
        metafunc.parametrize("card", cards)


@pytest.fixture
def card() -> str:
    """What a session's accelerator is: "books", "simcard", or "simcard:2" for two cards (phases_host.py)."""
    return BOOKS


@pytest.fixture
def device(card: str) -> str:
    """The name of a session's first accelerator."""
    return "cpu:0" if card == BOOKS else f"{card.partition(':')[0]}:0"


@pytest.fixture
def observed(
    request: pytest.FixtureRequest, comfyui_path: Path, card: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the scripts that the test's module names in SESSIONS saw in this ComfyUI, each run once for all tests.

    A script lies beside its tests and is given the folder of the pack, in ComfyUI's custom nodes, and the base folder.
    """
    scripts = request.module.SESSIONS
    if (comfyui_path, scripts, card) not in SEEN:
        base = base_folder(tmp_path_factory.mktemp(scripts[0].removesuffix(".py")))
        seen: dict[str, Any] = {}
        for name in scripts:
            script = Path(__file__).with_name(name)
            pack = base / "custom_nodes" / "steadyvsr"
            seen |= ran(script, pack, base, place=comfyui_path, STEADYVSR_CARD=card)
        SEEN[comfyui_path, scripts, card] = seen
    seen = SEEN[comfyui_path, scripts, card]
    if "skip" in seen:
        pytest.skip(seen["skip"])
    return seen


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[Path, Server]]:
    """The servers that `server` started for the tests of a module."""
    started: dict[Path, Server] = {}
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture
def server(
    request: pytest.FixtureRequest,
    comfyui_path: Path,
    servers: dict[Path, Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    """One server for all tests of a version: a `Server`, or what the test's module calls SERVER."""
    if comfyui_path not in servers:
        kind = getattr(request.module, "SERVER", Server)
        servers[comfyui_path] = kind(comfyui_path, base_folder(tmp_path_factory.mktemp("server")))
        servers[comfyui_path].wait()
    return servers[comfyui_path]
