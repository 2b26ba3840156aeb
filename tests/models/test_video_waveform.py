"""Sound given as samples: its length, its content, its rate, and what cannot be written."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from steadyvsr.models.video import ClipWriter, Waveform

AAC_FRAME_SAMPLES = 1024
FRAMES, FRAME_RATE = 20, 10
SECONDS = FRAMES / FRAME_RATE


def tone(rate: int, channels: int = 2, hertz: float = 440.0) -> Waveform:
    time = torch.arange(int(SECONDS * rate)) / rate
    return Waveform((0.5 * torch.sin(2 * math.pi * hertz * time)).repeat(channels, 1), rate)


def write(path: Path, sound: Waveform) -> list[str]:
    with ClipWriter(path, 32, 32, FRAME_RATE, audio=sound) as writer:
        for index in range(FRAMES):
            writer.write(torch.full((32, 32, 3), index / FRAMES))
    return writer.notes


def read(path: Path) -> tuple[np.ndarray, int]:
    """Samples as channels × time, and their rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
        return np.concatenate(frames, 1), stream.rate


def main_frequency(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples[0] * np.hanning(samples.shape[1])))
    return float(spectrum.argmax() * rate / samples.shape[1])


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (16_000, 1), (44_100, 6)])
def test_the_sound_keeps_its_length_channels_and_pitch(tmp_path, rate, channels):
    notes = write(tmp_path / "clip.mp4", tone(rate, channels))
    samples, written_rate = read(tmp_path / "clip.mp4")
    assert notes == [] and written_rate == rate and samples.shape[0] == channels
    assert abs(samples.shape[1] - SECONDS * rate) <= 2 * AAC_FRAME_SAMPLES
    assert main_frequency(samples, rate) == pytest.approx(440, abs=2)
    assert 0.3 < np.abs(samples[0]).max() < 0.8


def test_a_rate_that_aac_does_not_have_is_resampled_with_a_note(tmp_path):
    notes = write(tmp_path / "clip.mp4", tone(37_800))
    samples, rate = read(tmp_path / "clip.mp4")
    assert rate == 48_000 and "37800" in notes[0]
    assert abs(samples.shape[1] - SECONDS * rate) <= 2 * AAC_FRAME_SAMPLES
    assert main_frequency(samples, rate) == pytest.approx(440, abs=2)


def test_channels_without_a_loudspeaker_layout_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="expected 1, 2, 6 or 8 channels; got 5"):
        write(tmp_path / "clip.mp4", tone(48_000, 5))
    assert list(tmp_path.iterdir()) == []
