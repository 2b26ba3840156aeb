"""One run from file to file: what is left when it cannot be written to the end."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from av.error import PatchWelcomeError
from steadyvsr.app.clip import Footage, write_footage
from steadyvsr.models.video import ClipWriter, VideoError, open_clip


def footage(times: list[Fraction]) -> Footage:
    frames = [(torch.rand(48, 64, 3), time) for time in times]
    return Footage(lambda: iter(frames), 64, 48, len(frames), Fraction(25), Fraction(1, 90_000))


def as_it_is(frames):
    yield from frames


@pytest.mark.parametrize("crf", [None, 0])  # FFmpeg refuses the gap of the first, and shortens that of the second
def test_what_the_container_cannot_hold_keeps_the_frames_before_it_and_says_so(tmp_path, crf):
    times = [Fraction(index, 25) for index in range(30)] + [Fraction(60_000)]  # over 2**31 ticks later
    clip = footage(times)
    writer = ClipWriter(tmp_path / "o.mp4", 64, 48, 25, time_base=clip.time_base, crf=crf)
    with pytest.raises(VideoError, match=r"o\.mp4: .*frame.*\. The frames before it are in .*o\.partial\.mp4") as error:
        write_footage(clip, as_it_is, writer)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial.mp4"]
    assert [time for _, time in open_clip(tmp_path / "o.partial.mp4").frames_with_times()] == times[:30]


@pytest.mark.parametrize("at", ["frame", "end"])
def test_a_failing_muxer_keeps_the_partial_file(tmp_path, monkeypatch, at):
    clip = footage([Fraction(index, 25) for index in range(30)])
    writer = ClipWriter(tmp_path / "o.mkv", 64, 48, 25, codec="ffv1", time_base=clip.time_base)

    class Failing:
        def __init__(self, audio):
            self.notes = []

        def advance(self, until):
            if until is None if at == "end" else until is not None and until > 1:
                raise PatchWelcomeError(1, "Not yet implemented")

        def close(self):
            pass

    monkeypatch.setattr(writer, "_audio", Failing(None))
    with pytest.raises(VideoError, match=r"o\.partial\.mkv"):
        write_footage(clip, as_it_is, writer)
    frames = len(list(open_clip(tmp_path / "o.partial.mkv", damaged="keep").frames()))
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial.mkv"] and frames >= 26
