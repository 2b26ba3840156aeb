"""Damaged, cut-off and joined videos: an error, a note, or every frame; never silence."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from steadyvsr.app.clip import OutputOptions, footage_of, open_video, write_footage
from steadyvsr.models.video import VideoError, open_clip

WIDTH, HEIGHT, RATE, FRAMES = 64, 48, 24, 24
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS = {
    "sound.flv": {"codec": "flv1", "sound": "mp3"},
    "mute.flv": {"codec": "flv1"},
    "sound.wmv": {"codec": "wmv2", "sound": "wmav2"},
    "mute.wmv": {"codec": "wmv2"},
    "fragments.mp4": {"options": FRAGMENTS, "sound": "aac"},
    "moving.gif": {"codec": "gif"},
    "sound.avi": {"codec": "mpeg4", "sound": "mp3"},
    "sound.mkv": {"sound": "aac"},
    "sound.ts": {"sound": "aac"},
    "mute.mpg": {"codec": "mpeg2video"},
}


def make(path: Path, codec: str = "libx264", sound: str = "", options: dict | None = None, title: str = "") -> Path:
    """A second of noise, with silence for sound."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as output:
        if title:
            output.metadata["title"] = title
        stream = output.add_stream(codec, rate=RATE)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size = 8
        audio = output.add_stream(sound, rate=44_100, layout="stereo") if sound else None
        if audio is not None:
            audio.bit_rate, audio.codec_context.format = 128_000, "fltp"
        samples = 0
        for index in range(FRAMES):
            picture = generator.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            output.mux(stream.encode(frame))
            while audio is not None and samples * RATE < 44_100 * (index + 1):
                chunk = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts, chunk.time_base = 44_100, samples, Fraction(1, 44_100)
                samples += 1024
                output.mux(audio.encode(chunk))
        output.mux(stream.encode(None))
        if audio is not None:
            output.mux(audio.encode(None))
    return path


def shifted(path: Path, target: Path, seconds: int) -> Path:
    """The same transport stream with a clock that is `seconds` ahead."""
    with av.open(str(path)) as source, av.open(str(target), "w", options={"output_ts_offset": str(seconds)}) as output:
        streams = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                output.mux(packet)
    return target


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: make(folder / name, **options) for name, options in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_video_has_all_its_frames_and_no_note(videos, name):
    footage = footage_of(open_clip(videos[name]))
    assert sum(1 for _ in footage.frames()) == FRAMES
    assert [note for note in footage.notes if note != "alpha dropped"] == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("percent", [99, 95, 90, 70, 50, 30, 10])
@pytest.mark.parametrize("damaged", ["raise", "keep"])
def test_a_cut_off_video_is_never_accepted_in_silence(tmp_path, videos, name, percent, damaged):
    data, path = videos[name].read_bytes(), tmp_path / name
    path.write_bytes(data[: len(data) * percent // 100])
    try:
        footage = footage_of(open_clip(path, damaged=damaged))
        frames = sum(1 for _ in footage.frames())
    except VideoError as error:
        assert name in str(error)
        return
    assert frames == FRAMES or [note for note in footage.notes if note != "alpha dropped"]


def test_a_title_that_is_not_utf_8_costs_no_frame(tmp_path):
    path = make(tmp_path / "a.avi", "mpeg4", title="Cafe!")
    path.write_bytes(path.read_bytes().replace(b"Cafe!", "Café!".encode("latin-1")))
    assert sum(1 for _ in footage_of(open_clip(path)).frames()) == FRAMES


@pytest.mark.parametrize("ahead", [None, 100, 30_000, 70_000])
def test_joined_transport_streams_keep_every_frame_and_their_sound(tmp_path, videos, ahead):
    first, path = videos["sound.ts"], tmp_path / "joined.ts"
    second = first if ahead is None else shifted(first, tmp_path / "later.ts", ahead)
    path.write_bytes(first.read_bytes() + second.read_bytes())
    footage = footage_of(open_clip(path))

    def unchanged(frames):
        yield from frames

    writer = open_video(footage, tmp_path / "out.mp4", 1.0, OutputOptions())
    out, damage = write_footage(footage, unchanged, writer)
    assert damage is None and any("clock" in note for note in footage.notes)
    with av.open(str(out)) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
        sound = container.streams.audio[0]
        heard = float(sound.duration * sound.time_base)
    assert len(times) == 2 * FRAMES and np.allclose(np.diff(times), 1 / RATE, atol=0.003)
    assert heard == pytest.approx(2 * FRAMES / RATE, abs=0.2)


@pytest.mark.parametrize("index", [0, 8])
def test_a_frame_that_the_decoder_filled_in_is_named(tmp_path, index):
    path = make(tmp_path / "a.avi", "mpeg4")
    with av.open(str(path)) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][index])
    half = len(packet) // 2
    path.write_bytes(path.read_bytes().replace(packet, packet[:half] + bytes(len(packet) - half)))
    footage = footage_of(open_clip(path))
    assert sum(1 for _ in footage.frames()) == FRAMES
    (note,) = footage.notes
    assert note == f"a.avi: damaged frames, filled in by the decoder: 1 (counted from 0: {index})"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nError: fake", "\u202egpj"])
def test_control_characters_in_a_name_are_escaped(tmp_path, text):
    path = tmp_path / f"{text}.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(VideoError) as error:
        open_clip(path)
    assert str(error.value).isprintable() and ".mp4: expected a video" in str(error.value)


@pytest.mark.parametrize("value", ["::", "x:y:z", "00:00:1e999999999", "9" * 400 + ":00:00", "1:2"])
def test_a_duration_that_is_no_duration_is_not_believed(tmp_path, value):
    path = make(tmp_path / "a.mkv", "mpeg4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        stream.metadata["DURATION-eng"] = value
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    assert sum(1 for _ in footage_of(open_clip(tmp_path / "b.mkv")).frames()) == FRAMES


@pytest.mark.parametrize("name", ["mute.flv", "sound.wmv", "sound.mkv", "sound.ts", "fragments.mp4"])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_a_hole_in_the_middle_is_never_accepted_in_silence(tmp_path, videos, name, place):
    data, path = bytearray(videos[name].read_bytes()), tmp_path / name
    start, length = int(place * len(data)), len(data) // 10
    data[start : start + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(data)
    try:
        footage = footage_of(open_clip(path))
        frames = sum(1 for _ in footage.frames())
    except VideoError as error:
        assert name in str(error)
        return
    assert frames == FRAMES or footage.notes


def test_frames_behind_the_end_of_a_file_are_mentioned(tmp_path, videos):
    path = tmp_path / "twice.flv"
    path.write_bytes(videos["mute.flv"].read_bytes() * 2)
    footage = footage_of(open_clip(path))
    frames = sum(1 for _ in footage.frames())
    assert frames == 2 * FRAMES or footage.notes


def test_sound_in_an_unknown_codec_is_left_out_with_a_note(tmp_path, videos):
    path = tmp_path / "a.mp4"
    make(path, sound="aac")
    path.write_bytes(path.read_bytes().replace(b"mp4a", b"zzzz").replace(b"esds", b"free"))
    footage = footage_of(open_clip(path))
    writer = open_video(footage, tmp_path / "out.mp4", 1.0, OutputOptions())
    out, damage = write_footage(footage, lambda frames: (frame for frame in frames), writer)
    assert damage is None and "an audio stream in an unknown codec was left out" in writer.notes
    assert sum(1 for _ in open_clip(out).frames()) == FRAMES
