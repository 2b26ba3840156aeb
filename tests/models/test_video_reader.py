"""Reading clips: every frame, upright, with its time; and what bad input gets."""

from __future__ import annotations

import gc
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from steadyvsr.models.video import DamagedVideoError, ImageSequenceWriter, VideoError, encode_png, open_clip
from steadyvsr.models.video.orientation import upright
from steadyvsr.models.video.pixels import rgb_to_frame

WIDTH, HEIGHT, RATE = 64, 48, 25
REORDERED = 4
"""Good frames that an H.264 decoder may hold back when damage is met."""

TOLERANCE = 0.03


def grey(index: int, count: int) -> float:
    """The brightness by which a test knows a frame again."""
    return 0.1 + 0.8 * index / max(1, count - 1)


def make_video(
    path: Path, count: int = 10, times: list[int] | None = None, container: str | None = None, audio: bool = False,
    picture: torch.Tensor | None = None, codec: str = "libx264", options: dict | None = None,
    codec_options: dict | None = None, noise: float = 0.0,
) -> Path:  # fmt: skip
    """A small clip by PyAV alone: frame i is grey(i), at times[i] / 1000 s (default 25 per second)."""
    generator = torch.Generator().manual_seed(0)
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=RATE, options=codec_options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        tick = Fraction(1, 1000) if times else Fraction(1, RATE)
        stream.codec_context.time_base = tick
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        sound = output.add_stream("aac", rate=48000) if audio else None
        for index in range(count):
            rgb = picture if picture is not None else torch.full((HEIGHT, WIDTH, 3), grey(index, count))
            rgb = rgb + noise * torch.randn(rgb.shape, generator=generator)
            frame = rgb_to_frame(rgb, "yuv420p")
            frame.pts, frame.time_base = times[index] if times else index, tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            for index in range(count * 48000 // RATE // 1024):
                samples = np.sin(2 * np.pi * 440 * (np.arange(1024) + 1024 * index) / 48000)[None].repeat(2, 0)
                chunk = av.AudioFrame.from_ndarray(samples.astype(np.float32) * 0.3, format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts = 48000, index * 1024
                output.mux(sound.encode(chunk))
            output.mux(sound.encode(None))
    return path


def brightness(clip) -> list[float]:
    return [frame.mean().item() for frame in clip.frames()]


def test_every_frame_is_read_once_and_in_order(tmp_path):
    clip = open_clip(make_video(tmp_path / "a.mp4", 30))
    assert (clip.width, clip.height, clip.frame_rate, clip.frame_count) == (WIDTH, HEIGHT, RATE, 30)
    assert brightness(clip) == pytest.approx([grey(i, 30) for i in range(30)], abs=TOLERANCE)


def test_a_file_object_is_read_like_a_path_and_twice(tmp_path):
    data = io.BytesIO(make_video(tmp_path / "a.mp4", audio=True).read_bytes())
    clip = open_clip(data)
    readers = [clip.frames(), clip.frames()]
    first, second = zip(*zip(*readers, strict=True), strict=True)
    assert clip.has_audio and len(first) == 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_frame_rate_keeps_its_times(tmp_path, ending):
    times = [0, 40, 200, 210, 500, 1000]
    clip = open_clip(make_video(tmp_path / f"a.{ending}", 6, times))
    assert [round(time * 1000) for _, time in clip.frames_with_times()] == times


def test_a_transport_stream_starts_at_zero(tmp_path):
    clip = open_clip(make_video(tmp_path / "a.ts", 10, audio=True))
    times = [time for _, time in clip.frames_with_times()]
    assert len(times) == 10 and times[0] < Fraction(1, 10)


@pytest.mark.parametrize(("start", "duration", "expected"), [
    (0, 0.2, range(0, 5)), (0.4, None, range(10, 30)), (0.48, 0.2, range(12, 17)), (1.16, 5, range(29, 30)),
])  # fmt: skip
def test_a_window_gives_exactly_its_frames_and_starts_at_zero(tmp_path, start, duration, expected):
    clip = open_clip(make_video(tmp_path / "a.mp4", 30), start=start, duration=duration)
    frames = list(clip.frames_with_times())
    assert [f.mean().item() for f, _ in frames] == pytest.approx([grey(i, 30) for i in expected], abs=TOLERANCE)
    assert [time for _, time in frames] == [Fraction(i, RATE) for i in range(len(expected))]
    assert clip.frame_count == len(expected)
    clip.verify()


def test_leaving_early_closes_the_source(tmp_path):
    path = make_video(tmp_path / "a.mp4", 30)
    frames = open_clip(path).frames()
    next(frames)
    frames.close()
    opened = Path("/proc/self/fd")
    if opened.is_dir():
        assert not [fd for fd in opened.iterdir() if fd.exists() and fd.resolve() == path.resolve()]


# x' = a·x + c·y, y' = b·x + d·y with y downwards: where the picture's top left corner goes.
@pytest.mark.parametrize(("matrix", "corner", "degrees"), [
    ((1, 0, 0, 1), (0, 0), 0), ((0, 1, -1, 0), (0, -1), 90), ((-1, 0, 0, -1), (-1, -1), 180),
    ((0, -1, 1, 0), (-1, 0), 270), ((-1, 0, 0, 1), (0, -1), 180), ((1, 0, 0, -1), (-1, 0), 0),
])  # fmt: skip
def test_the_display_matrix_turns_the_frame_upright(matrix, corner, degrees):
    picture = torch.zeros(HEIGHT, WIDTH, 1)
    picture[0, 0] = 1
    turned = upright(picture, np.array(matrix, dtype=float).reshape(2, 2))
    assert turned[corner] == 1
    assert turned.shape[:2] == ((WIDTH, HEIGHT) if degrees in (90, 270) else (HEIGHT, WIDTH))


def test_a_turned_video_is_read_upright(tmp_path):
    picture = torch.zeros(HEIGHT, WIDTH, 3)
    picture[: HEIGHT // 2, : WIDTH // 2] = 1
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=RATE)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display rotation")
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.set_display_rotation(-90)  # counter-clockwise in PyAV: shown a quarter turn clockwise
        for index in range(3):
            frame = rgb_to_frame(picture, "yuv420p")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    clip = open_clip(path)
    first = next(clip.frames())
    assert (clip.width, clip.height) == (HEIGHT, WIDTH)
    assert first.shape == (WIDTH, HEIGHT, 3)
    assert first[4, -4].min() > 0.9 and first[4, 4].max() < 0.1 and first[-4, -4].max() < 0.1


def test_images_of_a_folder_come_in_natural_order(tmp_path):
    for index in (0, 1, 2, 10):
        (tmp_path / f"shot{index}.png").write_bytes(encode_png(torch.full((8, 8, 3), index / 255)))
    clip = open_clip(tmp_path, frame_rate=Fraction(10))
    assert [round(frame.mean().item() * 255) for frame in clip.frames()] == [0, 1, 2, 10]
    assert [time for _, time in clip.frames_with_times()] == [Fraction(i, 10) for i in range(4)]


def test_a_pattern_with_a_gap_names_the_missing_number(tmp_path):
    for index in (3, 4, 6):
        (tmp_path / f"shot_{index:04d}.png").write_bytes(encode_png(torch.zeros(8, 8, 3)))
    with pytest.raises(VideoError, match="number 5 is missing"):
        open_clip(tmp_path / "shot_%04d.png")
    (tmp_path / "shot_0005.png").write_bytes(encode_png(torch.zeros(8, 8, 3)))
    assert open_clip(tmp_path / "shot_%04d.png").frame_count == 4


def test_sixteen_bit_images_keep_their_bits(tmp_path):
    rgb = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    with ImageSequenceWriter(tmp_path / "out", WIDTH, HEIGHT, sixteen_bit=True) as writer:
        writer.write(rgb)
    clip = open_clip(tmp_path / "out")
    assert clip.bit_depth == 16
    assert (next(clip.frames()) - rgb).abs().max() * 65535 < 0.51


def test_a_broken_image_is_named(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encode_png(torch.rand(32, 32, 3)))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    clip = open_clip(tmp_path)
    with pytest.raises(DamagedVideoError, match=r"1\.png"):
        list(clip.frames())
    assert len(list(open_clip(tmp_path, damaged="keep").frames())) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        open_clip(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize(("content", "words"), [
    (b"", "empty file"), (b"Dear diary,\nnot a video.\n", "text"), (bytes(range(256)) * 8, "no known video format"),
    (b"#EXTM3U\n#EXTINF:10,\nhttp://example.invalid/a.ts\n", "a.mp4"),
])  # fmt: skip
def test_what_is_no_video_is_named_with_what_it_is(tmp_path, content, words):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=words) as error:
        open_clip(path)
    assert "a.mp4" in str(error.value)
    with pytest.raises(VideoError):
        open_clip(io.BytesIO(content))


def test_sound_without_pictures_is_told_apart(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"song\.m4a: expected a video stream; got audio only"):
        open_clip(path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Noisy clips of 50 frames, so that bytes are spread evenly over time."""
    folder = tmp_path_factory.mktemp("intact")
    options = {"mp4": {"movflags": "faststart"}}
    return {
        ending: make_video(folder / f"a.{ending}", 50, audio=True, options=options.get(ending), noise=0.1)
        for ending in ("mp4", "mkv", "avi", "ts")
    }


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts"])
def test_an_intact_file_is_not_called_damaged(intact, ending):
    clip = open_clip(intact[ending])
    clip.verify()
    assert len(brightness(clip)) == 50


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("part", [0.3, 0.55, 0.8])
def test_a_cut_off_file_says_so_behind_its_good_frames(tmp_path, intact, ending, part):
    path = tmp_path / f"cut.{ending}"
    data = intact[ending].read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    clip = open_clip(path)
    with pytest.raises(DamagedVideoError, match=rf"cut\.{ending}: expected .* frames; got"):
        clip.verify()
    read = []
    with pytest.raises(DamagedVideoError) as error:
        for frame in clip.frames():
            read.append(frame)
    assert 5 < len(read) < 45 and error.value.frames_read == len(read)
    assert 0 <= len(brightness(open_clip(path, damaged="keep"))) - len(read) <= REORDERED


def test_a_file_without_its_index_says_that_it_was_cut_off(tmp_path):
    path = make_video(tmp_path / "a.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="cut off"):
        open_clip(path)


def test_an_unreadable_packet_in_the_middle_ends_the_clip_or_is_left_out(tmp_path):
    path = make_video(tmp_path / "a.mkv", 20, codec_options={"g": "1", "bf": "0"}, noise=0.1)
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][10]
        position, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    start = data.index(bytes(packet)[:32], position)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    read = []
    with pytest.raises(DamagedVideoError, match="cannot be decoded"):
        for frame in open_clip(path).frames():
            read.append(frame)
    assert 10 - REORDERED <= len(read) <= 10
    assert brightness(open_clip(path, damaged="keep"))[-1] == pytest.approx(grey(19, 20), abs=TOLERANCE)


@pytest.mark.parametrize("bad", [{"start": -1}, {"duration": -1}, {"damaged": "ignore"}])
def test_options_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"a\.mp4"):
        open_clip(tmp_path / "a.mp4", **bad)


def test_a_window_behind_the_end_is_refused(tmp_path):
    clip = open_clip(make_video(tmp_path / "a.mp4"), start=60)
    with pytest.raises(VideoError, match=r"a\.mp4: expected frames from 60 s on"):
        list(clip.frames())


@pytest.mark.parametrize("kind", ["video", "images"])
def test_no_decoded_frame_waits_for_the_garbage_collector(tmp_path, kind):
    if kind == "video":
        source = make_video(tmp_path / "a.mp4", 40)
    else:
        source = tmp_path
        for index in range(40):
            (tmp_path / f"{index}.png").write_bytes(encode_png(torch.zeros(8, 8, 3)))
    clip = open_clip(source)
    gc.collect()
    gc.disable()
    try:
        for _ in clip.frames():
            pass
        waiting = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert waiting <= 2
