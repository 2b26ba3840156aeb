"""Encoders: those of a card where they work, what the user asks of them, and their pixel formats."""

from __future__ import annotations

import pytest
import torch
from steadyvsr.models.video import ClipWriter, choose_encoding, encoding
from steadyvsr.models.video.pixels import frame_to_rgb, rgb_to_frame

SIZE = (256, 144)


def hardware(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(encoding, "_HARDWARE", {False: names, True: names})


def test_auto_takes_the_first_encoder_that_passes_and_says_so(monkeypatch):
    hardware(monkeypatch, "no_such_encoder", "mpeg4", "libx265")
    chosen = choose_encoding("a.mp4", *SIZE, codec="auto")
    assert chosen.codec == "mpeg4" and chosen.note == "Encoded on the card by mpeg4."


def test_auto_without_an_encoder_that_works_takes_the_cpu_s_and_says_why(monkeypatch):
    hardware(monkeypatch, "no_such_encoder", "mpeg4")
    monkeypatch.setattr(encoding, "refusal", lambda *_: "no card")
    for name, ten_bit, codec in (
        ("a.mp4", False, "libx264"),
        ("a.mkv", True, "libx265"),
        ("a.webm", False, "libvpx-vp9"),
    ):
        chosen = choose_encoding(name, *SIZE, codec="auto", ten_bit=ten_bit)
        assert chosen.codec == codec
        assert chosen.note is not None and chosen.note.startswith(f"Encoded on the CPU by {codec}, as no encoder of a")


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4"])
def test_a_good_encoder_passes_the_check(codec):
    assert encoding.refusal(choose_encoding("a.mkv", *SIZE, codec=codec), *SIZE) is None


def test_an_encoder_that_cannot_start_or_gives_other_pictures_does_not_pass(monkeypatch):
    chosen = choose_encoding("a.mkv", *SIZE, codec="libx264")
    assert encoding.refusal(choose_encoding("a.mkv", *SIZE, codec="libx264", preset="no such"), *SIZE)
    black = rgb_to_frame(torch.zeros(SIZE[1], SIZE[0], 3), chosen.pixel_format)
    monkeypatch.setattr(encoding, "packed_to_frame", lambda *_: black)
    assert "of 255 levels off" in (encoding.refusal(chosen, *SIZE) or "")


def test_the_choice_of_the_encoder_is_told_in_the_notes(tmp_path, monkeypatch):
    hardware(monkeypatch, "mpeg4")
    with ClipWriter(tmp_path / "a.mp4", *SIZE, 25, codec="auto") as writer:
        writer.write(torch.zeros(SIZE[1], SIZE[0], 3))
    assert writer.notes == ["Encoded on the card by mpeg4."]


def test_preset_and_threads_reach_the_encoder(tmp_path):
    with ClipWriter(tmp_path / "a.mp4", *SIZE, 25, preset="ultrafast", threads=1) as writer:
        writer.write(torch.rand(SIZE[1], SIZE[0], 3))
    told = (tmp_path / "a.mp4").read_bytes()  # x264 writes its settings into the stream
    assert b"subme=0" in told and b" threads=1 " in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "mpeg4", "preset": "slow"}, "expected no preset for mpeg4"),
        ({"preset": "no such"}, "was refused by the encoder"),
    ],
)
def test_a_preset_that_cannot_be_is_refused_in_words(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        ClipWriter(tmp_path / "a.mp4", *SIZE, 25, **options)
    assert list(tmp_path.iterdir()) == []


def test_ten_bits_as_nvenc_takes_them_are_those_of_the_planar_form():
    picture = torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(0))
    planar, semi_planar = (rgb_to_frame(picture, name) for name in ("yuv420p10le", "p010le"))
    assert semi_planar.format.name == "p010le"
    assert torch.equal(frame_to_rgb(planar), frame_to_rgb(semi_planar))
    assert choose_encoding("a.mp4", 64, 48, codec="hevc_nvenc", ten_bit=True).pixel_format == "p010le"
