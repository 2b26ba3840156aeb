"""The frame of `steadyvsr doctor --full`: what it says without a card, and that one block's failure is its own."""

from __future__ import annotations

import json
import os

import pytest
import torch
from steadyvsr import cli
from steadyvsr.app import card as full
from steadyvsr.app.card import record as records
from steadyvsr.app.card.holding import two_workers

CPU = full.Setting(torch.device("cpu"), torch.float32)
REDUCED = full.Setting(torch.device("cpu"), torch.float32, reduced=True)


def fine(setting: full.Setting) -> full.Found:
    return full.Found({"size_bytes": 1}, ["one line"])


def test_without_a_card_each_block_says_so_in_one_sentence_and_the_rest_runs():
    blocks = {name: block for name, block in full.FULL.items() if block is not two_workers}
    found = full.measure(CPU, blocks)
    assert found["exit_code"] == 2 and found["machine"]["card"] is None
    said = {name: block["not_measured"] for name, block in found["blocks"].items() if "not_measured" in block}
    assert found["blocks"].keys() - said.keys() == {"attention"}
    for sentence in said.values():
        assert sentence.count(".") - sentence.count("(tests/data)") <= 1 and sentence.endswith(".")
    assert found["blocks"]["attention"]["figures"]["backends"]["gather"] == {"float32": None}


def test_a_block_that_fails_costs_no_more_than_itself_and_the_record_is_complete_after_each():
    def broken(setting: full.Setting) -> full.Found:
        raise RuntimeError("the driver is gone\nand more")

    seen = []
    found = full.measure(CPU, {"a": fine, "b": broken, "c": fine}, lambda record: seen.append(len(record["blocks"])))
    assert seen == [1, 2, 3] and found["exit_code"] == 1
    assert found["blocks"]["b"]["failed"] == "RuntimeError: the driver is gone"
    assert "FAILED: RuntimeError: the driver is gone" in full.page(found) and "one line" in full.page(found)


def test_a_promise_that_is_not_kept_is_the_exit_status():
    found = full.measure(CPU, {"a": lambda setting: full.Found(missed=["every frame"])})
    assert found["exit_code"] == 1 and "MISSED: every frame" in full.page(found)


def test_no_time_left_is_said():
    found = full.measure(CPU, {"a": fine}, limit_seconds=-1)
    assert "No time was left" in found["blocks"]["a"]["not_measured"]


def test_no_path_and_no_name_is_in_the_record(tmp_path):
    def telling(setting: full.Setting) -> full.Found:
        home = os.path.join(os.sep, "home", "somebody")
        raise OSError(f"{home}/models/x.safetensors: no such file; C:\\Users\\somebody\\x.bin; {tmp_path}")

    found = full.measure(CPU, {"a": telling})
    assert "somebody" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    assert "no such file" in found["blocks"]["a"]["failed"]


def test_the_command_writes_the_record_and_prints_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.card, "FULL", {"ceilings": full.FULL["ceilings"], "attention": full.FULL["attention"]})
    target = tmp_path / "card.json"
    assert cli.main(["doctor", "--full", "--reduced", "--device", "cpu", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["reduced"] and found["machine"]["torch"] == torch.__version__
    assert found["blocks"]["ceilings"]["figures"]["matmul_tflops"] > 0
    text = capsys.readouterr().out
    assert "A rehearsal" in text and "gather: exact in float32" in text
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize("name", ["ceilings", "attention", "speed at 768 × 1408", "200 frames three times"])
def test_the_rehearsal_measures_on_a_cpu(name):
    (block,) = full.measure(REDUCED, {name: full.FULL[name]})["blocks"].values()
    assert block["figures"] and block["lines"] and block["missed"] == [] and "failed" not in block


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "card.json"
    full.save({"a": 1}, target)
    monkeypatch.setattr(records.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        full.save({"a": 2}, target)
    assert json.loads(target.read_text()) == {"a": 1}


def test_the_card_run_writes_its_record_after_every_block(tmp_path, capsys):
    from steadyvsr.benchmarks.card import run

    names = ["ceilings", "speed at four sizes", "gpu marks"]
    assert run.main(["--out", str(tmp_path), "--device", "cpu", "--reduced", "--only", *names]) == 2
    found = json.loads((tmp_path / "card_run.json").read_text())
    assert list(found["blocks"]) == names
    (row,) = found["blocks"]["speed at four sizes"]["figures"]["runs"]
    assert row["attention"] == "gather" and row["frames_per_second"] > 0
    assert "nothing to run on" in found["blocks"]["gpu marks"]["not_measured"]
    assert "frames per second" in capsys.readouterr().out
