"""Sound of every codec, from every container into every other: no clip is computed and then refused."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pytest
import torch
from av.error import FFmpegError
from steadyvsr.models.video import ClipWriter, open_clip

CODECS = (
    "aac", "mp2", "libmp3lame", "ac3", "eac3", "flac", "alac", "libopus", "libvorbis", "pcm_s16le", "pcm_s16be",
    "pcm_s24le", "pcm_f32le", "pcm_u8", "pcm_alaw", "wmav2",
)  # fmt: skip
SOURCES = ("avi", "matroska", "mov", "mp4")
RATE, SAMPLES, FRAMES = 48_000, 1920, 5


@cache
def source(codec: str, container: str, layout: str) -> bytes | None:
    """A clip with such sound, or None where FFmpeg does not write it."""
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=container) as output:
            pictures = output.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
            sound = output.add_stream(codec, rate=RATE, layout=layout)
            for index in range(FRAMES):
                picture = av.VideoFrame(64, 48, "yuv420p")
                picture.pts = index
                output.mux(pictures.encode(picture))
                wave = np.random.default_rng(index).normal(0, 3000, (1, SAMPLES * sound.layout.nb_channels))
                samples = av.AudioFrame.from_ndarray(wave.astype(np.int16), "s16", layout)
                samples.sample_rate, samples.pts = RATE, index * SAMPLES
                output.mux(sound.encode(samples))
            output.mux(pictures.encode(None))
            output.mux(sound.encode(None))
    except (FFmpegError, ValueError):
        return None
    return file.getvalue()


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv", "out.webm"])
def test_every_sound_goes_into_every_container(tmp_path, name, layout):
    preset = None if name.endswith("webm") else "ultrafast"
    tried, wrong = 0, []
    for codec in CODECS:
        for container in SOURCES:
            data = source(codec, container, layout)
            if data is None:
                continue
            tried += 1
            clip = open_clip(io.BytesIO(data))
            try:
                with ClipWriter(tmp_path / name, 64, 48, 25, audio=clip, crf=50, preset=preset, force=True) as writer:
                    for index in range(FRAMES):
                        writer.write(torch.zeros(48, 64, 3), Fraction(index, 25))
                with av.open(str(tmp_path / name)) as made:
                    heard = sum(frame.samples for frame in made.decode(audio=0))
                # Encoders pad the beginning and the end.
                if not 0.7 * FRAMES * SAMPLES <= heard <= FRAMES * SAMPLES + 3000:
                    wrong.append((codec, container, f"{heard} samples"))
            except Exception as error:
                wrong.append((codec, container, str(error)))
    assert wrong == [] and tried >= 30
