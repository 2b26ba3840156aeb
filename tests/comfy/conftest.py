"""One ComfyUI process for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.comfy.server import Server, base_folder
from steadyvsr.tests.session.observed import ran

SEEN: dict[tuple[Path, tuple[str, ...]], dict[str, Any]] = {}


@pytest.fixture
def observed(
    request: pytest.FixtureRequest, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the scripts that the test's module names in SESSIONS saw in this ComfyUI, each run once for all tests.

    A script lies beside its tests and is given the folder of the pack, in ComfyUI's custom nodes, and the base folder.
    """
    scripts = request.module.SESSIONS
    if (comfyui_path, scripts) not in SEEN:
        base = base_folder(tmp_path_factory.mktemp(scripts[0].removesuffix(".py")))
        seen: dict[str, Any] = {}
        for name in scripts:
            script = Path(__file__).with_name(name)
            seen |= ran(script, base / "custom_nodes" / "steadyvsr", base, place=comfyui_path)
        SEEN[comfyui_path, scripts] = seen
    return SEEN[comfyui_path, scripts]


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
