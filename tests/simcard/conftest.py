"""Fixtures of the simulated card. Without a C++ compiler or ninja these tests are skipped, and say so."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from steadyvsr.memory import probe
from steadyvsr.memory.process import STATE_MODULE
from steadyvsr.tests.simcard.toolchain import missing


@pytest.fixture(scope="session")
def simcard() -> ModuleType:
    """The module, compiled and registered."""
    if absent := missing():
        pytest.skip(f"the simulated card needs {absent} to be built; found none")
    from steadyvsr.tests.simcard import simcard

    return simcard


@pytest.fixture
def card(simcard: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Card 0, empty, of 8 GiB, read by the probe of the process."""
    gc.collect()
    simcard.empty_cache()
    for index in range(simcard.CARDS):
        simcard.set_up(index, 8 << 30)
        simcard.reset_peak(index)
        assert simcard.statistics(index)["live"] == 0, "a test before this one left tensors on the card"
    reader = simcard.CardProbe(probe.current())
    monkeypatch.setattr(sys.modules[STATE_MODULE], "probe", reader)
    yield torch.device(simcard.NAME, 0)
