"""The networks and the engine against numbers of the released code."""

from __future__ import annotations

from pathlib import Path

import pytest
from steadyvsr.app.card import golden

FOLDER = golden.Folder(Path(__file__).parents[1] / "data" / "golden")


@pytest.mark.parametrize("entry", FOLDER.entries)
def test_every_vector_is_within_its_tolerance(entry: str) -> None:
    checks = golden.check_entry(FOLDER, entry)
    assert len(checks) >= 2
    assert [check for check in checks if not check.passed] == []


def test_a_wrong_weight_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = golden.Folder.tensors

    def shifted(folder: golden.Folder, file: str) -> dict:
        found = tensors(folder, file)
        return {k: v + 0.01 if k == "decoder.26.bias" else v for k, v in found.items()}

    monkeypatch.setattr(golden.Folder, "tensors", shifted)
    assert any(not check.passed for check in golden.check_entry(FOLDER, "tcdecoder"))
