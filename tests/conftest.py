"""Test set-up: the package name, the thread count, and the two kinds of tests that need more than a CPU.

`from steadyvsr.models…` works in an environment where the project is not installed: the repository root is then
registered as the package `steadyvsr` without being put on `sys.path` (there, our `nodes/` would shadow ComfyUI's).
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import types
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMFYUI_PATH = "COMFYUI_PATH"
SLOW = [line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if line and line[0] != "#"]
"""Beginnings of the ids of the tests that `--fast` leaves out."""


def installed_from_here() -> bool:
    """Whether `import steadyvsr` finds this checkout (an installed copy of another one must not be tested)."""
    if getattr(sys.modules.get("steadyvsr"), "__spec__", True) is None:  # the stand-in registered below
        return False
    spec = importlib.util.find_spec("steadyvsr")
    return bool(spec and spec.origin and Path(spec.origin).resolve() == ROOT / "__init__.py")


if "steadyvsr" not in sys.modules and not installed_from_here():
    package = types.ModuleType("steadyvsr")
    package.__path__ = [str(ROOT)]
    sys.modules["steadyvsr"] = package

# A busy machine is no failure of the code under test.
hypothesis.settings.register_profile("steadyvsr", deadline=None)
hypothesis.settings.load_profile("steadyvsr")

# Tiny networks lose more to thread hand-over than they gain. Alone, the tests take the two cores that a CI machine has;
# of several workers (pytest-xdist) each takes one, and so does what they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS") or 2)))


def comfyui_checkouts() -> list[Path]:
    """The checkouts named by COMFYUI_PATH: one folder, or several joined by the system's path separator."""
    return [Path(part) for part in os.environ.get(COMFYUI_PATH, "").split(os.pathsep) if part]


def pytest_configure() -> None:
    # A program that a shell starts in the background ignores Ctrl-C, and so does all that it starts. The tests of
    # Ctrl-C need a program that hears it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what tests/slow.txt names: a minute for every save")


def is_slow(test: str) -> bool:
    """Whether a test's id (tests/models/test_x.py::test_y[z]) is named in slow.txt, or its file or folder is."""
    return any(test.startswith(name) and test[len(name) :][:1] in ("", "/", ":", "[") for name in SLOW)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if is_slow(item.nodeid)]
    for item in slow:
        item.add_marker("slow")
    if config.getoption("--fast") and slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not is_slow(item.nodeid)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("comfy") and not comfyui_checkouts():
        pytest.skip(f"needs a ComfyUI checkout: set {COMFYUI_PATH}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `comfyui_path` runs once per checkout; `comfyui_or_double` is the double (None), then each."""
    if "comfyui_path" in metafunc.fixturenames:
        checkouts = comfyui_checkouts() or [None]
        metafunc.parametrize("comfyui_path", checkouts, ids=[path.name if path else "none" for path in checkouts])
    if "comfyui_or_double" in metafunc.fixturenames:
        places = [None, *comfyui_checkouts()]
        ids = [path.name if path else "double" for path in places]
        metafunc.parametrize("comfyui_or_double", places, ids=ids, scope="module")


@pytest.fixture(scope="session")
def package_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which a subprocess can run `python -m steadyvsr`, installed or not."""
    environment = dict(os.environ)
    if not installed_from_here():
        folder = tmp_path_factory.mktemp("package")
        (folder / "steadyvsr").symlink_to(ROOT, target_is_directory=True)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return environment
