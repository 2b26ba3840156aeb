"""`steadyvsr doctor`: what it says on this machine, and that it notices memory that does not come back."""

from __future__ import annotations

import json

import pytest
import torch
from steadyvsr import cli, doctor
from steadyvsr.memory import offload, probe
from steadyvsr.models.flashvsr.checkpoint import load_flashvsr
from steadyvsr.tests.memory_doubles import GIB, FakeCardBooks

CPU = torch.device("cpu")


def load():
    return load_flashvsr(cli.NANO, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    """The leak line needs twelve runs; what is tested here needs three."""
    monkeypatch.setattr(doctor, "RUNS", 3)


def test_the_command_reports_and_ends_well(capsys):
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (cpu,) = [reading for reading in report["devices"] if reading["device"] == "cpu"]
    assert 0 < cpu["process"]["bytes"] < cpu["used"]["bytes"] < cpu["total"]["bytes"]
    assert report["offload"]["verdict"] == "CANNOT_OFFLOAD" and report["offload"]["asked"] > 6_000_000
    assert report["dropped"]["before"] > 6_000_000 and report["dropped"]["after"] == 0
    assert len(report["after_runs"]) == 3 and report["growth"]["slope"] == 0
    assert 1.8 < report["guidance"]["double"] / report["guidance"]["single"] < 2.2
    assert report["problems"] == []


def test_the_text_has_a_line_for_each_finding():
    text = "\n".join(doctor.examine(load, CPU).lines())
    wanted = ("cpu: ", "allocated: unknown", "offload on cpu: CANNOT_OFFLOAD", "alive afterwards", "3 runs", "guidance")
    assert [words for words in wanted if words not in text] == []
    assert text.endswith("nothing is held, nothing grows")


def test_weights_that_stay_alive_are_a_problem():
    kept = []

    def loaded():
        kept.append(load())
        return kept[0]

    findings = doctor.examine(loaded, CPU)
    assert findings.dropped[1] == findings.dropped[0] > 0
    assert any("stay alive" in problem for problem in findings.problems)


def test_tensors_that_pile_up_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "RUNS", 12)
    pile = []
    monkeypatch.setattr(doctor, "_run", lambda *_: pile.append(torch.zeros(1 << 18)))
    findings = doctor.examine(load, CPU)
    assert findings.growth is not None and findings.growth.slope == pytest.approx(1 << 20)
    assert any("grows from run to run" in problem for problem in findings.problems)


def scripted(books: FakeCardBooks, held: int):
    """A move on a card whose books a test writes: `held` bytes stay on it."""

    def move(model, device, reader):
        books.use(GIB)
        loaded = [GIB]

        def leave():
            books.allocated, loaded[0] = held, 0

        subject = offload.Subject("network", torch.device("cuda:0"), CPU, lambda: loaded[0], leave, list)
        return offload.offload(subject, lambda: None, reader=reader)

    return move


@pytest.mark.parametrize(("held", "verdict"), [(0, "FREED"), (GIB // 2, "STILL_HELD")])
def test_the_verdict_decides(held, verdict):
    books = FakeCardBooks()
    reader = probe.ScriptedProbe(books.read)
    findings = doctor.examine(load, CPU, reader=reader, move=scripted(books, held))
    assert findings.receipt.verdict.value == verdict
    assert bool(findings.problems) == bool(held)


def test_a_probe_that_dies_gives_marked_readings():
    books = FakeCardBooks()
    books.broken = True
    findings = doctor.examine(load, CPU, reader=probe.ScriptedProbe(books.read))
    assert "not readable" in "\n".join(findings.lines())


def test_an_unknown_device_is_refused(capsys):
    assert cli.main(["doctor", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
