"""`steadyvsr doctor`: what it says on this machine, and that it notices memory that does not come back."""

from __future__ import annotations

import json

import pytest
import torch
from steadyvsr import cli
from steadyvsr.app import doctor
from steadyvsr.memory import offload, probe
from steadyvsr.memory.reading import WHOLE_DEVICE, Figure, OtherProcess, Reading, exact
from steadyvsr.models.flashvsr.checkpoint.load import load_flashvsr
from steadyvsr.tests.memory.doubles import GIB, FakeCardBooks

CPU = torch.device("cpu")


def load():
    return load_flashvsr(cli.NANO_FILE, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """The leak line needs twelve runs; what is tested here needs three. Only the command's test runs the engine."""
    monkeypatch.setattr(doctor, "RUNS", 3)
    monkeypatch.setattr(doctor, "LATENT_SIDE", 16)
    run = doctor._run
    monkeypatch.setattr(doctor, "_run", lambda *_: None)
    return run


def test_the_command_reports_and_ends_well(capsys, monkeypatch, little_work):
    monkeypatch.setattr(doctor, "_run", little_work)
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (cpu,) = [reading for reading in report["devices"] if reading["device"] == "cpu"]
    assert 0 < cpu["process"]["bytes"] < cpu["used"]["bytes"] < cpu["total"]["bytes"]
    assert report["offload"]["verdict"] == "CANNOT_OFFLOAD" and report["offload"]["asked"] > 6_000_000
    assert report["dropped"]["before"] > 6_000_000 and report["dropped"]["after"] == 0
    assert len(report["after_runs"]) == 3 and report["growth"]["slope"] == 0
    assert 1.8 < report["guidance"]["peaks"]["batched"] / report["guidance"]["peaks"]["off"] < 2.2
    assert (report["problems"], report["unmeasured"], report["exit_code"]) == ([], [], 0)
    assert report["machine"]["torch"] == torch.__version__ and report["seconds"] > 0


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
    assert bool(findings.problems) == bool(held) and findings.exit_code == bool(held)


def on_scripted_card(monkeypatch, books: FakeCardBooks, held: int = 0) -> None:
    """Lets the command find a card of these books, on which `held` bytes stay."""
    reader = probe.ScriptedProbe(books.read)
    monkeypatch.setattr(probe, "current", lambda: reader)
    monkeypatch.setattr(doctor, "_moved_by_torch", scripted(books, held))


def test_a_model_that_is_held_ends_the_command_with_one(monkeypatch, capsys):
    on_scripted_card(monkeypatch, FakeCardBooks(), held=GIB // 2)
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM: memory is held after an offload: asked 1.00 GiB" in said and "nothing is held" not in said


def test_without_nvml_the_pool_decides_and_the_readings_say_what_is_unknown(monkeypatch, capsys):
    books = FakeCardBooks()
    books.nvml = False
    on_scripted_card(monkeypatch, books)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "process: unknown: no NVML" in said and "other processes: unknown without NVML" in said
    assert "(mem_get_info, whole device)" in said and "offload on cuda:0: FREED · " in said


def test_readings_that_fail_end_the_command_with_two(monkeypatch, capsys):
    books = FakeCardBooks()
    books.broken = True
    on_scripted_card(monkeypatch, books)
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    said = capsys.readouterr().out
    assert "not readable: RuntimeError: CUDA error" in said and "nothing is held" not in said
    assert "NOT MEASURED: whether an offload gives memory back" in said


def test_a_network_that_never_came_onto_the_card_is_no_proof():
    def unmoved(model, device, reader):
        subject = offload.Subject("network", torch.device("cuda:0"), CPU, lambda: 0, lambda: None, list)
        return offload.offload(subject, lambda: None, reader=reader)

    findings = doctor.examine(load, CPU, reader=probe.ScriptedProbe(FakeCardBooks().read), move=unmoved)
    assert findings.exit_code == 2 and "nothing was loaded" in findings.unmeasured[0]


def test_tensors_that_nothing_counts_are_no_proof(monkeypatch):
    monkeypatch.setattr(doctor, "_runs", lambda *_: ((), None))
    findings = doctor.examine(load, CPU)
    assert findings.exit_code == 2
    assert "NOT MEASURED: whether memory grows from run to run: tensors cannot be counted" in findings.lines()


def test_a_problem_outweighs_what_could_not_be_measured(monkeypatch):
    monkeypatch.setattr(doctor, "_runs", lambda *_: ((), None))
    reader = probe.ScriptedProbe(FakeCardBooks().read)
    findings = doctor.examine(load, CPU, reader=reader, move=scripted(FakeCardBooks(), GIB))
    assert findings.unmeasured and findings.exit_code == 1


def test_other_processes_are_listed_by_name_and_bytes():
    others = (OtherProcess(4242, "blender", 2 * GIB), OtherProcess(77, "ffmpeg", None))

    def card(name: str) -> Reading:
        return Reading("cuda:0", used=Figure(4 * GIB, "NVML", WHOLE_DEVICE), process=exact(GIB, "NVML"), others=others)

    text = "\n".join(doctor.examine(load, CPU, reader=probe.ScriptedProbe(card)).lines())
    assert "another process: blender (4242) 2.00 GiB" in text
    assert "another process: ffmpeg (77) unknown" in text
    assert "process: 1.00 GiB (NVML, exact)" in text and "used: 4.00 GiB (NVML, whole device)" in text


def test_the_peak_of_a_card_is_counted_above_what_lay_there_before():
    books = FakeCardBooks()
    books.use(3 * GIB)
    reader = probe.ScriptedProbe(books.read)

    def work():
        assert reader.calls[-1] == "reset_peak cuda:0"
        books.use(GIB)
        books.allocated -= GIB

    figure = doctor.peak_of(work, torch.device("cuda:0"), reader)
    assert (figure.bytes, figure.source) == (GIB, "torch.cuda")
    assert reader.calls[-2:] == ["synchronise cuda:0", "sample cuda:0"]


def test_a_device_without_a_peak_counter_gives_no_guidance_figures():
    reader = probe.ScriptedProbe(lambda name: Reading("mps", allocated=exact(GIB, "torch.mps")))
    peaks = {mode: doctor.peak_of(lambda: None, torch.device("mps"), reader) for mode in ("off", "batched")}
    assert peaks["off"].bytes is None and doctor.guidance_of(peaks, "nothing") is None


def test_an_unknown_device_is_refused(capsys):
    assert cli.main(["doctor", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
