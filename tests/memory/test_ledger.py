"""The ledger: phases with before, peak and after, marks, warnings, growth, bounds, and the picture of it."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from steadyvsr.memory import ledger as ledger_room
from steadyvsr.memory import plot, probe
from steadyvsr.memory.ledger import Ledger, Levels
from steadyvsr.memory.probe import ScriptedProbe
from steadyvsr.memory.tracker import StorageTracker
from steadyvsr.tests.memory.doubles import GIB, MIB, FakeCardBooks


class ResettingProbe(ScriptedProbe):
    """A scripted card whose peak counter can be reset, as torch's."""

    def __init__(self, card: FakeCardBooks) -> None:
        super().__init__(card.read)
        self.card = card

    def reset_peak(self, device) -> None:
        super().reset_peak(device)
        self.card.peak = self.card.allocated


@pytest.fixture
def card() -> FakeCardBooks:
    return FakeCardBooks()


@pytest.fixture
def ledger(card: FakeCardBooks) -> Ledger:
    return Ledger(ResettingProbe(card), ["cuda:0"])


def test_a_phase_gives_before_peak_and_after(ledger: Ledger, card: FakeCardBooks) -> None:
    card.use(GIB)
    with ledger.phase("sample"):
        card.use(5 * GIB)
        card.use(-4 * GIB)
    (phase,) = ledger.phases
    assert [reading.allocated.bytes for reading in (*phase.before, *phase.after)] == [GIB, 2 * GIB]
    assert phase.peaks["cuda:0"].allocated.bytes == 6 * GIB
    assert str(phase).startswith("sample: cuda:0 allocated 1.00 GiB → peak 6.00 GiB → 2.00 GiB")


def test_a_phase_does_not_show_the_peak_of_the_one_before(ledger: Ledger, card: FakeCardBooks) -> None:
    with ledger.phase("first"):
        card.use(5 * GIB)
        card.use(-5 * GIB)
    with ledger.phase("second"):
        card.use(GIB)
    assert ledger.phases[1].peaks["cuda:0"].allocated.bytes == GIB


def test_an_outer_phase_keeps_its_peak_through_inner_ones(ledger: Ledger, card: FakeCardBooks) -> None:
    with ledger.phase("outer"):
        card.use(5 * GIB)
        card.use(-5 * GIB)
        with ledger.phase("inner"):
            card.use(GIB)
    assert [(p.name, p.peaks["cuda:0"].allocated.bytes) for p in ledger.phases] == [("inner", GIB), ("outer", 5 * GIB)]


def test_phases_of_a_workflow_follow_one_another(ledger: Ledger, card: FakeCardBooks) -> None:
    ledger.begin_sequence()
    card.use(3 * GIB)
    card.use(-2 * GIB)
    first = ledger.end_phase("load")
    card.use(4 * GIB)
    second = ledger.end_phase("encode")
    assert (first.peaks["cuda:0"].allocated.bytes, second.peaks["cuda:0"].allocated.bytes) == (3 * GIB, 5 * GIB)
    assert second.before == first.after and second.after[0].allocated.bytes == 5 * GIB


def test_a_phase_that_raises_is_kept_as_failed_and_does_not_count_as_a_run(ledger: Ledger) -> None:
    with pytest.raises(KeyboardInterrupt), ledger.phase("sample"):
        raise KeyboardInterrupt
    assert ledger.phases[0].failed and ledger.phases[0].growth == {}
    assert ledger.mark("x") and ledger.marks[-1].phase == ""


def test_a_mark_is_one_line_that_is_logged_and_returned(
    ledger: Ledger, card: FakeCardBooks, caplog: pytest.LogCaptureFixture
) -> None:
    card.use(2 * GIB)
    card.pool = GIB // 2
    with caplog.at_level(logging.INFO, "steadyvsr.memory"):
        line = ledger.mark("VAE encode")
    assert line == "after VAE encode · 2.00 GiB allocated · 2.50 reserved · 2.50 driver (NVML)"
    assert caplog.messages == [line]


def test_quiet_marks_of_steps_are_kept_and_not_logged(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "steadyvsr.memory"), ledger.phase("upscale"):
        ledger.mark("upscale", step=3, quiet=True)
    assert [(mark.kind, mark.index, mark.phase) for mark in ledger.marks] == [("step", 3, "upscale")]
    assert caplog.messages == []


def test_the_process_wide_mark_is_one_call(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "default_device", lambda: torch.device("cpu"))
    with caplog.at_level(logging.INFO, "steadyvsr.memory"):
        line = ledger_room.mark("load")
    assert caplog.messages == [line] and line.startswith("after load · ") and "process (" in line


def test_a_line_reaches_the_terminal_of_a_program_without_logging(tmp_path, package_environment) -> None:
    import subprocess
    import sys

    code = (
        "from steadyvsr.memory import ledger, probe\nfrom steadyvsr.memory.reading import Reading, exact\n"
        "ledger.current().reader = probe.ScriptedProbe(lambda d: Reading(d, allocated=exact(2**21, 'x')))\n"
        "ledger.mark('load')\nledger.mark('run')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=package_environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines() == ["after load · 2.00 MiB allocated", "after run · 2.00 MiB allocated"]


def test_the_rings_are_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(ledger_room.RING_MARKS + 10):
        ledger.mark("run", step=index, quiet=True)
    assert len(ledger.marks) == ledger_room.RING_MARKS and ledger.marks[0].index == 10
    for index in range(ledger_room.SERIES + 5):
        ledger.end_phase(f"phase {index}")
    assert len(ledger._series) == ledger_room.SERIES


@pytest.mark.parametrize(
    ("levels", "used", "expected"),
    [
        (Levels(), 19, "ok"),
        (Levels(), 20, "warn"),
        (Levels(), 22, "warn"),
        (Levels(), 23, "critical"),
    ],
)
def test_levels_are_shares_of_the_card(levels: Levels, used: int, expected: str) -> None:
    card = FakeCardBooks(total=24 * GIB)
    card.use(used * GIB)
    assert levels.of(card.read("cuda:0")) == expected


@pytest.mark.parametrize("field", [{"warn": 80}, {"critical": 0}])
def test_a_level_out_of_range_is_refused_by_name(field: dict) -> None:
    with pytest.raises(ValueError, match=f"Levels.{next(iter(field))}"):
        Levels(**field)


def test_a_full_card_is_told_once_until_it_empties(
    ledger: Ledger, card: FakeCardBooks, caplog: pytest.LogCaptureFixture
) -> None:
    for used in (10, 21, 21, 23, 23, 5, 21):
        card.allocated = used * GIB
        ledger.mark("x", quiet=True)
    assert [message.rpartition(", ")[2] for message in caplog.messages] == ["warn)", "critical)", "warn)"]


def test_a_planted_leak_is_told_once_with_its_slope(
    ledger: Ledger, card: FakeCardBooks, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(3).uniform(-4 * MIB, 4 * MIB, 16)
    for run in range(16):
        with ledger.phase("run"):
            card.allocated = int(GIB + run * MIB + noise[run])
    growth = ledger.phases[-1].growth["cuda:0"]
    assert growth.leaking and abs(growth.slope - MIB) < 3 * growth.uncertainty
    assert len(caplog.messages) == 1 and "run grows on cuda:0" in caplog.messages[0]


def test_runs_that_end_equal_are_no_growth(ledger: Ledger, card: FakeCardBooks) -> None:
    for _ in range(20):
        with ledger.phase("run"):
            card.use(GIB)
            card.use(-GIB)
    growth = ledger.phases[-1].growth["cuda:0"]
    assert growth.slope == 0 and growth.leaking is False


def test_peaks_since_the_last_report_start_anew(ledger: Ledger, card: FakeCardBooks) -> None:
    ledger.mark("x", quiet=True)
    card.use(5 * GIB)
    card.use(-5 * GIB)
    assert ledger.take_peaks()["cuda:0"].allocated.bytes == 5 * GIB
    card.use(GIB)
    assert ledger.take_peaks()["cuda:0"].allocated.bytes == GIB


def test_a_device_that_cannot_be_read_does_not_end_the_run(card: FakeCardBooks) -> None:
    ledger = Ledger(ScriptedProbe(card.read), ["cuda:0"])
    with ledger.phase("sample"):
        card.broken = True
    assert ledger.phases[0].after[0].allocated.bytes is None
    assert "allocated unknown" in ledger.mark("x", quiet=True)


def test_tracked_phases_on_the_cpu_show_the_true_peak() -> None:
    with StorageTracker() as tracker:
        ledger = Ledger(probe.DeviceProbe(tracker=tracker), ["cpu"])
        with ledger.phase("run"):
            kept = torch.zeros(MIB)
            torch.zeros(4 * MIB)
    assert ledger.phases[0].after[0].allocated.bytes == kept.numel() * 4
    assert ledger.phases[0].peaks["cpu"].allocated.bytes == 20 * MIB


def test_the_ledger_is_plain_json(ledger: Ledger, card: FakeCardBooks) -> None:
    for _ in range(3):
        with ledger.phase("run"):
            card.use(MIB)
            ledger.mark("half", step=1, quiet=True)
    data = json.loads(json.dumps(ledger.to_json()))
    assert data["phases"][2]["after"][0]["allocated"]["bytes"] == 3 * MIB
    assert data["phases"][2]["growth"]["cuda:0"]["slope"] == MIB
    assert data["marks"][0]["reading"]["device"] == "cuda:0" and len(data["marks"]) == 3


def test_the_plot_shows_what_was_read(ledger: Ledger, card: FakeCardBooks) -> None:
    for size in (GIB, 8 * GIB, 2 * GIB):
        with ledger.phase(f"phase of {size}"):
            card.allocated = size
    image = plot.draw(ledger)
    assert image.shape == (1, plot.HEIGHT, plot.WIDTH, 3) and image.min() >= 0 and image.max() <= 1
    pixels = (image[0] * 255).round().to(torch.uint8).numpy()
    inside = pixels[plot.TOP :, plot.LEFT :]
    rows = np.argwhere((inside == plot.LINES[2][1]).all(-1))[:, 0]  # drawn last: driver = allocated here
    assert rows.min() < 0.1 * len(inside) and rows.max() > 0.85 * len(inside)


def test_a_plot_of_nothing_says_so() -> None:
    assert plot.draw(Ledger(ScriptedProbe(FakeCardBooks().read), [])).shape[0] == 1
