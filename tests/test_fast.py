"""The list of slow tests: `--fast` leaves out what it names, and it names nothing that is not there."""

from __future__ import annotations

import pytest
from steadyvsr.tests.conftest import SLOW, is_slow
from steadyvsr.tests.source_tree import ROOT


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_test_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    assert (ROOT / file).exists()
    assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("test", "slow"),
    [
        ("tests/comfy/test_vae.py::test_a[double]", True), ("tests/comfy", True),
        ("tests/comfyui/test_vae.py::test_a", False), ("tests/test_fast.py::test_a_slow_test_is_there", False),
    ],
)  # fmt: skip
def test_a_name_means_the_whole_of_a_folder_a_file_or_a_test(test: str, slow: bool) -> None:
    assert is_slow(test) is slow


def test_fast_leaves_out_what_is_slow(request: pytest.FixtureRequest) -> None:
    chosen = [item.nodeid for item in request.session.items]
    assert chosen and (not request.config.getoption("--fast") or not any(map(is_slow, chosen)))
