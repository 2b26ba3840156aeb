"""Sound given as samples instead of a file: encoded as AAC beside the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import OutputContainer
from torch import Tensor

BITS_PER_SECOND = 192_000
CHUNK_SAMPLES = 1 << 16
"""Samples passed to the encoder at a time, which bounds what it copies."""

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_OTHER_RATE = 48_000


@dataclass(frozen=True)
class Waveform:
    """Attributes:
    samples: float, channels × samples, nominally -1..1.
    rate: samples per second.
    """

    samples: Tensor
    rate: int


class WaveformEncoder:
    """Encodes a waveform into an output container; used like `audio.AudioCopy`.

    Attributes:
        notes: what a user should be told (a rate that AAC does not have).

    Raises:
        ValueError: there is no loudspeaker layout for the number of channels.
    """

    def __init__(self, waveform: Waveform, output: OutputContainer):
        channels, self._count = waveform.samples.shape
        if channels not in _LAYOUTS:
            raise ValueError(f"sound: expected 1, 2, 6 or 8 channels; got {channels}. Mix it down to stereo.")
        self.notes: list[str] = []
        self._waveform = waveform
        self._output = output
        self._written = 0
        self._layout = _LAYOUTS[channels]
        rate = waveform.rate if waveform.rate in _AAC_RATES else _OTHER_RATE
        if rate != waveform.rate:
            self.notes.append(f"sound resampled from {waveform.rate} to {rate} Hz: AAC has no such rate")
        self._stream = output.add_stream("aac", rate=rate, layout=self._layout)
        self._stream.bit_rate = BITS_PER_SECOND
        self._resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=rate)
        self._done = False

    def advance(self, until: Fraction | None) -> None:
        """Writes the samples before `until` seconds; None writes all that are left."""
        end = self._count if until is None else min(self._count, round(until * self._waveform.rate))
        while self._written < end:
            stop = min(end, self._written + CHUNK_SAMPLES)
            chunk = self._waveform.samples[:, self._written : stop].float().cpu().contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=self._layout)
            frame.sample_rate = self._waveform.rate
            frame.pts, frame.time_base = self._written, Fraction(1, self._waveform.rate)
            self._encode(frame)
            self._written = stop
        if until is None and not self._done:
            self._done = True
            self._encode(None)
            self._output.mux(self._stream.encode(None))

    def close(self) -> None:
        """Nothing to close: the samples belong to the caller."""

    def _encode(self, frame: av.AudioFrame | None) -> None:
        for resampled in self._resampler.resample(frame):
            self._output.mux(self._stream.encode(resampled))
