"""Writing clips: what goes in comes out, the sound goes along, and OUT is complete or not there at all."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from steadyvsr.models.video import ClipWriter, ImageSequenceWriter, VideoError, choose_encoding, open_clip
from steadyvsr.models.video.part_file import PartFile

WIDTH, HEIGHT = 64, 48
NTSC = Fraction(30000, 1001)


def ramp(index: int, count: int, width: int = WIDTH, height: int = HEIGHT) -> torch.Tensor:
    """A smooth coloured HWC frame whose blue tells which it is."""
    x, y = torch.meshgrid(torch.linspace(0.1, 0.9, width), torch.linspace(0.1, 0.9, height), indexing="xy")
    return torch.stack([x, y, torch.full_like(x, 0.1 + 0.8 * index / max(1, count - 1))], -1)


def write(path: Path, count: int = 8, width: int = WIDTH, height: int = HEIGHT, rate=25, times=None, **options) -> Path:
    with ClipWriter(path, width, height, rate, **options) as writer:
        for index in range(count):
            writer.write(ramp(index, count, width, height), times[index] if times else None)
    return path


def sounding(path: Path, seconds: float = 2.0, codec: str = "aac", picture: bool = True) -> Path:
    """A clip with a 440 Hz tone, by PyAV alone."""
    with av.open(str(path), "w") as output:
        if picture:
            stream = output.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = output.add_stream(codec, rate=48000)
        sound.bit_rate = 128_000
        if picture:
            for index in range(int(25 * seconds)):
                frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), index % 256, np.uint8), format="rgb24")
                frame.pts = index
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        sample_format = "fltp" if codec in ("aac", "wmav2") else "s16"
        for index in range(int(48000 * seconds) // 1024):
            wave = 0.3 * np.sin(2 * np.pi * 440 * (np.arange(1024) + 1024 * index) / 48000)[None].repeat(2, 0)
            if sample_format == "fltp":
                samples = wave.astype(np.float32)
            else:
                samples = (wave.T.reshape(1, -1) * 32767).astype(np.int16)
            chunk = av.AudioFrame.from_ndarray(samples, format=sample_format, layout="stereo")
            chunk.sample_rate, chunk.pts = 48000, index * 1024
            output.mux(sound.encode(chunk))
        output.mux(sound.encode(None))
    return path


def sound_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.size]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm"])
def test_frames_times_and_colours_come_back(tmp_path, name):
    clip = open_clip(write(tmp_path / name, rate=NTSC))
    frames = list(clip.frames_with_times())
    assert clip.frame_rate == NTSC and (clip.width, clip.height) == (WIDTH, HEIGHT)
    assert (clip.colour.matrix, clip.colour.primaries, clip.colour.transfer) == (1, 1, 1)
    assert len(frames) == 8
    for index, (frame, time) in enumerate(frames):
        assert (frame - ramp(index, 8)).abs().mean() * 255 < 2
        assert abs(time - index / NTSC) <= Fraction(1, 1000)


@pytest.mark.parametrize(("name", "options", "levels"), [
    ("a.mkv", {"codec": "ffv1"}, 0.51), ("a.mkv", {"codec": "ffv1", "ten_bit": True}, 0.13),
    ("a.mov", {"codec": "prores_ks"}, 4),
])  # fmt: skip
def test_codecs_for_editing_lose_no_more_than_their_rounding(tmp_path, name, options, levels):
    clip = open_clip(write(tmp_path / name, 3, **options))
    assert max((f - ramp(i, 3)).abs().max().item() * 255 for i, f in enumerate(clip.frames())) < levels


def test_ten_bits_are_told_apart_from_eight(tmp_path):
    """Steps of a quarter of an 8-bit level survive."""
    with ClipWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25, ten_bit=True, crf=0) as writer:
        for index in range(4):
            writer.write(torch.full((HEIGHT, WIDTH, 3), 0.5 + index / 1023))
    clip = open_clip(tmp_path / "a.mp4")
    levels = [frame.mean().item() for frame in clip.frames()]
    assert clip.bit_depth == 10
    assert all(0.5 / 1023 < b - a < 1.6 / 1023 for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("size", [(65, 48), (64, 49), (65, 49)])
def test_odd_sizes_are_written_whole_as_444(tmp_path, size):
    path = write(tmp_path / "a.mp4", 3, *size)
    clip = open_clip(path)
    assert (clip.width, clip.height) == size
    assert (next(clip.frames()) - ramp(0, 3, *size)).abs().mean() * 255 < 2
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == "yuv444p"


def test_a_codec_without_444_names_the_even_size_to_ask_for(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mp4: libsvtav1 .*65x49.* Ask for 66x50"):
        write(tmp_path / "a.mp4", 3, 65, 49, codec="libsvtav1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "options", "words"), [
    ("a.gif", {}, "expected an ending of"), ("a", {}, "got none"), ("a.mp4", {"codec": "h266"}, "expected an encoder"),
    ("a.mp4", {"codec": "aac"}, "expected a video codec"), ("a.mkv", {"codec": "ffv1", "crf": 3}, "expected no crf"),
    ("a.mp4", {"crf": 99}, "from 0"),
    ("a.webm", {"codec": "libx264"}, "webm with libx264"),
])  # fmt: skip
def test_impossible_encodings_are_refused_before_anything_is_left(tmp_path, name, options, words):
    with pytest.raises(ValueError, match=words) as error:
        write(tmp_path / name, **options)
    assert name in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_ten_bits_choose_h265_and_a_ten_bit_format():
    encoding = choose_encoding("a.mp4", 64, 48, ten_bit=True)
    assert (encoding.codec, encoding.pixel_format) == ("libx265", "yuv420p10le")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_times_are_written_as_they_were_read(tmp_path, name):
    times = [Fraction(t, 1000) for t in (0, 40, 200, 210, 500, 1000)]
    source = open_clip(write(tmp_path / f"in_{name}", 6, times=times, time_base=Fraction(1, 1000)))
    with ClipWriter(tmp_path / name, WIDTH, HEIGHT, source.frame_rate, time_base=source.time_base) as writer:
        for frame, time in source.frames_with_times():
            writer.write(frame, time)
    assert [time for _, time in open_clip(tmp_path / name).frames_with_times()] == times


def test_a_time_that_does_not_come_after_the_last_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mp4: expected frame 1 after"):
        write(tmp_path / "a.mp4", 2, times=[Fraction(1), Fraction(1)])


def test_the_pixel_aspect_is_kept(tmp_path):
    clip = open_clip(write(tmp_path / "a.mp4", sample_aspect_ratio=Fraction(4, 3)))
    assert clip.sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov"])
def test_sound_is_copied_packet_by_packet(tmp_path, ending):
    source = sounding(tmp_path / "in.mp4")
    clip = open_clip(source)
    out = tmp_path / f"out.{ending}"
    with ClipWriter(out, WIDTH, HEIGHT, clip.frame_rate, time_base=clip.time_base, audio=clip) as writer:
        for frame, time in clip.frames_with_times():
            writer.write(frame, time)
    before, after = sound_packets(source), sound_packets(out)
    assert [data for _, data in after] == [data for _, data in before]
    assert [time for time, _ in after] == pytest.approx([time for time, _ in before], abs=0.0251)
    assert not writer.notes


def test_sound_and_picture_lie_interleaved(tmp_path):
    clip = open_clip(sounding(tmp_path / "in.mp4", 16))  # beyond the 10 s that a muxer waits for sound
    with ClipWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, 25, audio=clip) as writer:
        for frame in clip.frames():
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        order = sorted((p.pos, p.stream.type, float(p.dts * p.time_base)) for p in container.demux() if p.size)
    apart = [abs(a[2] - b[2]) for a, b in zip(order, order[1:], strict=False) if a[1] != b[1]]
    assert max(apart) < 1.5


def test_a_window_takes_its_own_part_of_the_sound(tmp_path):
    clip = open_clip(sounding(tmp_path / "in.mp4", 4), start=1, duration=1)
    with ClipWriter(tmp_path / "out.mkv", WIDTH, HEIGHT, 25, audio=clip) as writer:
        for frame, time in clip.frames_with_times():
            writer.write(frame, time)
    times = [time for time, _ in sound_packets(tmp_path / "out.mkv")]
    assert writer.frames_written == 25
    assert 0 <= times[0] < 0.05 and 0.93 < times[-1] < 1


@pytest.mark.parametrize(("source", "out", "codec"), [("aac", "out.webm", "opus"), ("wmav2", "out.mp4", "aac")])
def test_sound_that_the_container_cannot_hold_is_reencoded_with_a_note(tmp_path, source, out, codec):
    clip = open_clip(sounding(tmp_path / ("in.asf" if source == "wmav2" else "in.mkv"), 2, source))
    with ClipWriter(tmp_path / out, WIDTH, HEIGHT, 25, audio=clip) as writer:
        for frame in clip.frames():
            writer.write(frame)
    assert any("audio re-encoded" in note for note in writer.notes)
    with av.open(str(tmp_path / out)) as container:
        assert container.streams.audio[0].codec_context.name == codec
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)]).astype(np.float64)
    spectrum = np.abs(np.fft.rfft(sound[4800:52800]))
    assert abs(int(spectrum.argmax()) - 440) <= 1 and len(sound) / 48000 == pytest.approx(2, abs=0.1)


def test_sound_of_a_transport_stream_goes_into_mp4(tmp_path):
    clip = open_clip(sounding(tmp_path / "in.ts", 2))
    with ClipWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, 25, audio=clip) as writer:
        for frame, time in clip.frames_with_times():
            writer.write(frame, time)
    with av.open(str(tmp_path / "out.mp4")) as container:
        sound = sum(f.samples for f in container.decode(audio=0))
    assert sound / 48000 == pytest.approx(2, abs=0.1)


def test_sound_of_a_clip_in_memory_goes_along(tmp_path):
    clip = open_clip(io.BytesIO(sounding(tmp_path / "in.mp4").read_bytes()))
    with ClipWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, 25, audio=clip) as writer:
        for frame in clip.frames():
            writer.write(frame)
    assert sound_packets(tmp_path / "out.mp4") == sound_packets(tmp_path / "in.mp4")


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ClipWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25) as writer:
        writer.write(ramp(0, 1))
        assert list(tmp_path.glob("a.mp4.*.part")) and not (tmp_path / "a.mp4").exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"a\.mp4: already exists"):
        ClipWriter(path, WIDTH, HEIGHT, 25)
    with pytest.raises(RuntimeError, match="stop"), ClipWriter(path, WIDTH, HEIGHT, 25, force=True) as writer:
        writer.write(ramp(0, 1))
        raise RuntimeError("stop")
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]
    write(path, 3, force=True)
    assert open_clip(path).frame_count == 3


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(FileExistsError), ClipWriter(path, WIDTH, HEIGHT, 25) as writer:
        writer.write(ramp(0, 1))
        path.write_bytes(b"precious")
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


def test_no_frames_make_no_file(tmp_path):
    with pytest.raises(VideoError, match="at least one frame"):
        write(tmp_path / "a.mp4", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write(tmp_path / "nowhere" / "a.mp4")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no user ids here")
def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root may write anywhere: the system call's answer is imitated

        def refuse(*arguments, **options):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"a\.mp4: could not be written: Permission denied"):
        ClipWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25)


class FullDisk(io.BytesIO):
    """A file on a disk with `room` bytes left."""

    room = 20_000

    def write(self, data) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, room):
    original = PartFile.__init__

    def on_a_full_disk(self, path, force=False):
        original(self, path, force)
        self.file.close()
        self.file = FullDisk()
        self.file.room = room

    monkeypatch.setattr(PartFile, "__init__", on_a_full_disk)
    noise = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(OSError, match=r"a\.mkv: could not be written: No space left on device") as error:  # noqa: SIM117
        with ClipWriter(tmp_path / "a.mkv", WIDTH, HEIGHT, 25, codec="ffv1") as writer:
            for _ in range(200):
                writer.write(noise)
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_only_the_part(tmp_path, package_environment):
    script = (
        "import os, signal, sys, torch\n"
        "from steadyvsr.models.video import ClipWriter\n"
        "writer = ClipWriter(sys.argv[1], 64, 48, 25, force=True)\n"
        "for _ in range(60): writer.write(torch.rand(48, 64, 3))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=package_environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"precious"
    left, part = sorted(tmp_path.iterdir())
    assert left == path and part.name.startswith("a.mp4.") and part.name.endswith(".part")
    write(path, 3, force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.parametrize("frame", [
    torch.rand(HEIGHT, WIDTH + 1, 3), torch.rand(HEIGHT, WIDTH, 4), torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8),
    torch.full((HEIGHT, WIDTH, 3), float("nan")),
])  # fmt: skip
def test_a_wrong_frame_is_refused_with_its_number(tmp_path, frame):
    with ClipWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 25) as writer:
        writer.write(ramp(0, 1))
        with pytest.raises(ValueError, match=r"a\.mp4: .*frame 1"):
            writer.write(frame)
        writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_images_appear_together_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"), ImageSequenceWriter(folder, WIDTH, HEIGHT) as writer:
        writer.write(ramp(0, 1))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with ImageSequenceWriter(folder, WIDTH, HEIGHT) as writer:
        for index in range(3):
            writer.write(ramp(index, 3))
    assert [frame.shape for frame in open_clip(folder).frames()] == [(HEIGHT, WIDTH, 3)] * 3
    assert (next(open_clip(folder).frames()) - ramp(0, 3)).abs().max() * 255 < 0.51
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        ImageSequenceWriter(folder, WIDTH, HEIGHT)
    with ImageSequenceWriter(folder, WIDTH, HEIGHT, force=True) as writer:
        writer.write(ramp(2, 3))
    assert (next(open_clip(folder).frames()) - ramp(2, 3)).abs().max() * 255 < 0.51
    assert (folder / "notes.txt").exists() and sorted(e.name for e in tmp_path.iterdir()) == ["out"]


def test_the_encoder_holds_few_frames(tmp_path):
    """Each takes 5 bytes per pixel; x264's own choice is 40, and more with more cores."""

    class Spy:
        def __init__(self, container) -> None:
            self.container, self.packets = container, 0

        def __getattr__(self, name: str):
            return getattr(self.container, name)

        def mux(self, packets) -> None:
            self.packets += len(packets)
            self.container.mux(packets)

    frames = 80 + 2 * (os.cpu_count() or 1)
    with ClipWriter(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25) as writer:
        writer._container = spy = Spy(writer._container)
        for index in range(frames):
            writer.write(ramp(index, frames))
        held = frames - spy.packets
    assert 20 <= held <= 26 + 2 * (os.cpu_count() or 1)
    assert spy.packets == frames
