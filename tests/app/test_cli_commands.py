"""`steadyvsr inspect`, `steadyvsr demo` and the entry point."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from steadyvsr import cli
from steadyvsr.app import demo
from steadyvsr.app.drawn_clips import degrade, enlarge, make_clip
from steadyvsr.app.metrics import psnr
from steadyvsr.models.video import open_clip


def test_inspect_tells_what_the_embedded_network_is(capsys):
    assert cli.main(["inspect", str(cli.NANO_FILE)]) == 0
    text = capsys.readouterr().out
    assert "family nano" in text and "sha256" in text and "transformer" in text and "missing" not in text


def test_inspect_as_json_lists_the_parts(capsys):
    assert cli.main(["inspect", str(cli.NANO_FILE), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert {part["part"] for part in report["parts"]} == {"transformer", "lq_projection", "decoder", "prompt"}
    assert report["files"][0]["bytes"] == cli.NANO_FILE.stat().st_size


def test_inspect_goes_on_behind_a_file_it_cannot_read(tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    assert cli.main(["inspect", str(bad), str(cli.NANO_FILE)]) == 2
    printed = capsys.readouterr()
    assert "bad.safetensors" in printed.err and "family nano" in printed.out


def test_the_demo_writes_a_video_and_a_comparison_and_measures_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "HEIGHT", 128)
    monkeypatch.setattr(demo, "WIDTH", 128)
    assert cli.main(["demo", "--out", str(tmp_path), "--seconds", "0.2", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    truth = make_clip(report["seed"], 5, demo.HEIGHT, demo.WIDTH)
    read = torch.stack(list(open_clip(tmp_path / "input.mkv").frames()))
    assert (read - degrade(truth)).abs().max() < 1e-6
    assert report["bicubic_psnr"] == pytest.approx(psnr(enlarge(degrade(truth)), truth), abs=1e-6)
    video = torch.stack(list(open_clip(tmp_path / "output.mp4").frames()))
    assert video.shape == truth.shape
    # The file is lossy; the frames that were measured are not.
    assert psnr(video, truth) == pytest.approx(report["output_psnr"], abs=1.0)
    sheet = next(open_clip(tmp_path / "comparison.png").frames())
    top = sheet.shape[0] - demo.GAP - demo.HEIGHT
    panels = sheet[top : top + demo.HEIGHT, demo.GAP :].split(demo.WIDTH + demo.GAP, dim=1)
    small, bicubic, output, whole = (panel[:, : demo.WIDTH] for panel in panels)
    assert (small[::4, ::4] - degrade(truth)[2]).abs().max() < 1e-6
    assert (bicubic - enlarge(degrade(truth))[2]).abs().max() * 255 < 0.51
    assert (output - video[2]).abs().mean() * 255 < 3
    assert (whole - truth[2]).abs().max() < 1e-6


def test_every_letter_of_a_label_is_drawn():
    text = "INPUT BICUBIC OUTPUT GROUND TRUTH"
    sheet = demo.side_by_side([(text, torch.zeros(8, 6 * 2 * len(text), 3))])
    letters = sheet[demo.GAP : demo.GAP + 14, demo.GAP : -demo.GAP, 0] > 0.5
    drawn = [column.any().item() for column in letters.split(12, dim=1)]
    assert drawn == [letter != " " for letter in text]


@pytest.mark.parametrize(
    "arguments", [[], ["upscale"], ["upscale", "a", "b", "--version", "v9"], ["demo", "--seconds", "0"]]
)
def test_arguments_that_do_not_parse_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_inspect_escapes_what_the_file_says(tmp_path, capsys):
    path = tmp_path / "a\x1b[2J.safetensors"
    tensors = {
        "linear_layers.0.weight": torch.zeros(2, 2),
        "norm1.gamma": torch.zeros(2),
        "norm2.gamma": torch.zeros(2),
    }
    save_file(tensors | {"x\nversion v1.1 (certified)": torch.zeros(1)}, path, {"family": "\x07bell"})
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\nversion v1.1" not in out
    assert r"a\x1b[2J.safetensors" in out and r"\x07bell" in out
