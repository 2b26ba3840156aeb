"""`steadyvsr upscale`: file to file, exit codes, one-line errors, and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from steadyvsr import cli
from steadyvsr.app import clip as upscale
from steadyvsr.models.flashvsr import StreamOptions, output_size
from steadyvsr.models.video import ClipWriter, encode_png, open_clip
from steadyvsr.models.video.pixels import rgb_to_frame

WIDTH, HEIGHT, RATE = 48, 32, 25


def make_clip(path: Path, count: int = 12, sound: bool = False, noise: float = 0.0) -> Path:
    """Frame i is grey 0.2 + 0.6 · i / count, H.264 without reordering, optionally with a tone."""
    generator = torch.Generator().manual_seed(0)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as output:
        stream = output.add_stream("libx264", rate=RATE, options={"g": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track = output.add_stream("aac", rate=48000) if sound else None
        for index in range(count):
            rgb = torch.full((HEIGHT, WIDTH, 3), 0.2 + 0.6 * index / count)
            rgb = rgb + noise * torch.randn(rgb.shape, generator=generator)
            frame = rgb_to_frame(rgb, "yuv420p")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        for index in range(count * 48000 // RATE // 1024 if track else 0):
            wave = 0.3 * np.sin(2 * np.pi * 440 * (np.arange(1024) + 1024 * index) / 48000)[None].repeat(2, 0)
            chunk = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout="stereo")
            chunk.sample_rate, chunk.pts = 48000, index * 1024
            output.mux(track.encode(chunk))
        if track:
            output.mux(track.encode(None))
    return path


def sound_bytes(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.fixture
def engine(monkeypatch):
    """The engine replaced by nearest-neighbour enlargement; `engine.calls` are its arguments."""

    class Engine:
        calls: list[dict] = []
        interrupt_at: int | None = None
        error: BaseException | None = None

        def __call__(self, model, frames, options, *, vae, device, dtype, on_step, on_memory_error, plan, finish):
            self.calls.append({"model": model, "options": options, "vae": vae, "device": device, "dtype": dtype})
            for index, frame in enumerate(frames):
                on_step("transform", index, None)
                if index == self.interrupt_at:
                    raise self.error
                width, height = output_size(frame.shape[1], frame.shape[0], options.scale)
                rows = torch.arange(height) * frame.shape[0] // height
                columns = torch.arange(width) * frame.shape[1] // width
                yield frame[rows][:, columns]

    replacement = Engine()
    replacement.calls = []
    monkeypatch.setattr(upscale, "upscale_frames", replacement)
    monkeypatch.setattr(cli, "load_flashvsr", lambda path, *a, **k: type("Model", (), {"family": "x", "version": "v1"}))
    return replacement


def test_the_embedded_network_upscales_a_video_with_its_sound(tmp_path, capsys):
    source, out = make_clip(tmp_path / "in.mp4", sound=True), tmp_path / "out.mp4"
    assert cli.main(["upscale", str(source), str(out), "--scale", "2", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "embedded nano" in printed.err
    assert (report["frames"], report["width"], report["height"], report["complete"]) == (12, 96, 64, True)
    assert report["family"] == "nano" and report["peak_rss_bytes"] > 50 << 20 and report["seconds"] > 0
    clip = open_clip(out)
    frames = list(clip.frames_with_times())
    assert [time for _, time in frames] == [Fraction(i, RATE) for i in range(12)]
    levels = [frame.mean().item() for frame, _ in frames]
    assert levels == pytest.approx([0.2 + 0.6 * i / 12 for i in range(12)], abs=0.02)
    assert sound_bytes(out) == sound_bytes(source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_every_option_reaches_the_engine(tmp_path, engine):
    source = make_clip(tmp_path / "in.mp4", 3)
    arguments = (
        "--scale 1.5 --seed 7 --sparse-ratio 1.5 --kv-ratio 2 --local-range 9 --colour wavelet --attention gather"
        " --tile 512 --device cpu --precision bf16"
    )
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mkv"), *arguments.split()]) == 0
    (call,) = engine.calls
    assert call["options"] == StreamOptions(
        scale=1.5, seed=7, sparse_ratio=1.5, kv_ratio=2.0, local_range=9, colour="wavelet", attention="gather", tile=512
    )
    assert (call["device"], call["dtype"]) == (torch.device("cpu"), torch.bfloat16)


def test_the_defaults_are_those_of_the_engine_in_fp32_on_the_cpu(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["upscale", str(make_clip(tmp_path / "in.mp4", 3)), str(tmp_path / "out.mp4")]) == 0
    assert engine.calls[0]["options"] == StreamOptions()
    assert (engine.calls[0]["device"], engine.calls[0]["dtype"]) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_the_precision_on_cuda_follows_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert upscale.choose_dtype("auto", torch.device("cuda")) == dtype


def test_variable_frame_rate_is_kept(tmp_path, engine):
    times = [Fraction(t, 1000) for t in (0, 40, 200, 210, 500, 1000)]
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    with ClipWriter(source, WIDTH, HEIGHT, RATE, time_base=Fraction(1, 1000)) as writer:
        for when in times:
            writer.write(torch.rand(HEIGHT, WIDTH, 3), when)
    assert cli.main(["upscale", str(source), str(out)]) == 0
    assert [when for _, when in open_clip(out).frames_with_times()] == times


@pytest.mark.parametrize(("extra", "words"), [
    (["--scale", "0"], "scale"), (["--kv-ratio", "1"], "kv_ratio"), (["--device", "abacus"], "--device"),
    (["--decoder", "vae"], "--vae"), (["--vae", "x"], "--vae"), (["--download"], "--model"), (["--crf", "99"], "crf"),
    (["--codec", "h266"], "h266"), (["--image-sequence", "--crf", "3"], "--crf"),
])  # fmt: skip
def test_a_bad_option_is_one_line_and_leaves_nothing(tmp_path, capsys, engine, extra, words):
    source = make_clip(tmp_path / "in.mp4", 2)
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4"), *extra]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and "Traceback" not in error
    assert not engine.calls and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("content", "words"), [
    (None, "there is no such file"), (b"", "empty file"), (b"Dear diary,\n", "got text"),
])  # fmt: skip
def test_a_bad_input_is_one_line(tmp_path, capsys, engine, content, words):
    source = tmp_path / "in.mp4"
    if content is not None:
        source.write_bytes(content)
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == 2
    error = capsys.readouterr().err
    assert words in error and "in.mp4" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["out.gif", "nowhere/out.mp4", "out"])
def test_an_impossible_output_is_refused_before_the_work(tmp_path, capsys, engine, name):
    source = make_clip(tmp_path / "in.mp4", 2)
    assert cli.main(["upscale", str(source), str(tmp_path / name)]) == 2
    assert name.split("/")[-1] in capsys.readouterr().err
    assert not engine.calls and list(tmp_path.iterdir()) == [source]


def test_a_bad_checkpoint_is_refused_and_leaves_nothing(tmp_path, capsys):
    source = make_clip(tmp_path / "in.mp4", 2)
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"no weights")
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4"), "--model", str(weights)]) == 2
    assert "w.safetensors" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "w.safetensors"]


def test_an_existing_output_needs_force(tmp_path, capsys, engine):
    source, out = make_clip(tmp_path / "in.mp4", 3), tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    assert cli.main(["upscale", str(source), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err and not engine.calls
    assert out.read_bytes() == b"precious"
    assert cli.main(["upscale", str(source), str(out), "--force"]) == 0
    assert open_clip(out).frame_count == 3


CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 103079215104 bytes. Error code 12"


@pytest.mark.parametrize(("error", "code", "words"), [
    (KeyboardInterrupt(), 130, "Stopped"), (torch.OutOfMemoryError("CUDA out of memory."), 1, "--tile"),
    (RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {CPU_ALLOCATOR}"), 1, "out of memory: "),
    (MemoryError(), 1, "no more"), (ValueError("frame 3: NaN"), 2, "frame 3: NaN"),
    (ValueError("a\x1b[2Jb\u202ec"), 2, r"a\x1b[2Jb\u202ec"),
    (OSError(28, "No space left on device"), 2, "No space left"),
])  # fmt: skip
def test_whatever_ends_the_run_leaves_nothing_behind(tmp_path, capsys, engine, error, code, words):
    source = make_clip(tmp_path / "in.mp4", 8, sound=True)
    engine.interrupt_at, engine.error = 3, error
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == code
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [source]


def test_sigterm_is_heard_as_ctrl_c(tmp_path, capsys, engine, monkeypatch):
    source = make_clip(tmp_path / "in.mp4", 8)
    monkeypatch.setattr(upscale, "trim", lambda: signal.raise_signal(signal.SIGTERM))  # called as frames are pulled
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == 130
    assert capsys.readouterr().err.endswith("Stopped. Nothing was left behind.\n") and list(tmp_path.iterdir()) == [
        source
    ]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT goes to a whole console there")
def test_ctrl_c_ends_a_running_process_cleanly(tmp_path, package_environment):
    source, out = make_clip(tmp_path / "in.mp4", 400), tmp_path / "out.mp4"
    command = [sys.executable, "-m", "steadyvsr", "upscale", str(source), str(out), "--device", "cpu"]
    process = subprocess.Popen(command, env=package_environment, stderr=subprocess.PIPE, text=True)

    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.mp4.*.part")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().endswith("Stopped. Nothing was left behind.") and "Traceback" not in error
    assert list(tmp_path.iterdir()) == [source]


def test_weights_are_fetched_only_when_asked_for_and_before_they_are_loaded(tmp_path, capsys, engine, monkeypatch):
    source, folder = make_clip(tmp_path / "in.mp4", 2), tmp_path / "weights"
    events = []

    def fetch(version, where, *, progress):
        progress("part", 1, 2)
        events.append(("fetch", version, where))

    monkeypatch.setattr(cli, "download_flashvsr", fetch)
    load = cli.load_flashvsr
    monkeypatch.setattr(cli, "load_flashvsr", lambda path, *a, **k: events.append(("load", path)) or load(path))
    arguments = ["upscale", str(source), str(tmp_path / "out.mp4"), "--force", "--model", str(folder)]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--download"]) == 0
    assert cli.main([*arguments, "--download", "--version", "v1"]) == 0
    load_event = ("load", str(folder))
    assert events == [
        load_event, ("fetch", "v1.1", str(folder)), load_event, ("fetch", "v1", str(folder)), load_event
    ]  # fmt: skip

    def fail(version, where, *, progress):
        raise cli.DownloadError("no connection")

    monkeypatch.setattr(cli, "download_flashvsr", fail)
    (tmp_path / "out.mp4").unlink()
    assert cli.main([*arguments, "--download"]) == 1
    assert "no connection" in capsys.readouterr().err and list(tmp_path.iterdir()) == [source]


def test_the_full_decoder_gets_the_vae_that_was_named(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(cli, "load_wan_vae", lambda path, dtype, device: ("vae", path))
    source = make_clip(tmp_path / "in.mp4", 2)
    extra = ["--decoder", "vae", "--vae", "wan.safetensors"]
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4"), *extra]) == 0
    assert engine.calls[0]["vae"].vae == ("vae", "wan.safetensors")


def test_a_cut_off_video_is_refused_before_the_work_and_kept_on_request(tmp_path, capsys, engine):
    source = make_clip(tmp_path / "in.mp4", 40, noise=0.1)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == 2
    assert "--keep-damaged" in capsys.readouterr().err and not engine.calls
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4"), "--keep-damaged"]) == 0
    assert 10 < len(list(open_clip(tmp_path / "out.mp4").frames())) < 30


def spoil(path: Path, index: int) -> Path:
    """Writes zeros over one packet: the file stays whole, so that only decoding finds the damage."""
    with av.open(str(path)) as container:
        packet = bytes([packet for packet in container.demux(video=0) if packet.size][index])
    path.write_bytes(path.read_bytes().replace(packet, bytes(len(packet))))
    return path


def test_damage_met_on_the_way_stores_what_was_read(tmp_path, capsys, engine):
    source = spoil(make_clip(tmp_path / "in.mkv", 20, noise=0.1), 10)
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == 2
    assert "out.partial.mp4" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", "out.partial.mp4"]
    assert 5 <= len(list(open_clip(tmp_path / "out.partial.mp4").frames())) <= 10


def test_damage_before_the_first_frame_is_what_the_error_says(tmp_path, capsys):
    source = spoil(make_clip(tmp_path / "in.mkv", 5, noise=0.1), 0)
    assert cli.main(["upscale", str(source), str(tmp_path / "out.mp4")]) == 2
    assert "in.mkv: expected 5 frames; got 0 frames" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("spelling", ["in.mp4", "folder/../in.mp4", "link.mp4"])
def test_the_source_is_never_replaced_by_its_own_result(tmp_path, capsys, engine, spelling):
    source = make_clip(tmp_path / "in.mp4", 3)
    before = source.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.mp4").symlink_to(source)
    assert cli.main(["upscale", str(source), str(tmp_path / spelling), "--force"]) == 2
    assert "OUT: expected another file than IN" in capsys.readouterr().err
    assert source.read_bytes() == before and engine.calls == []


def test_a_part_of_the_clip_is_taken_by_its_times(tmp_path, engine):
    source = make_clip(tmp_path / "in.mp4", 30)  # 25 a second
    assert cli.main(["upscale", str(source), str(tmp_path / "o.mp4"), "--start", "0.4", "--duration", "0.2"]) == 0
    assert open_clip(tmp_path / "o.mp4").frame_count == 5


def test_freed_heap_pages_go_back_to_the_system_once_in_eight_frames(tmp_path, monkeypatch):
    trims = []
    monkeypatch.setattr(upscale, "trim", lambda: trims.append(1))
    footage = upscale.footage_of(open_clip(make_clip(tmp_path / "in.mp4", 20)))
    writer = upscale.open_writer(footage, tmp_path / "out.mp4", 1.0, upscale.OutputOptions())
    assert upscale.write_footage(footage, lambda frames: frames, writer) == (tmp_path / "out.mp4", None)
    assert len(trims) == 3 and open_clip(tmp_path / "out.mp4").frame_count == 20


def test_a_run_that_fails_closes_its_source_while_the_error_is_still_held(tmp_path):
    source = make_clip(tmp_path / "in.mp4", 20)
    footage = upscale.footage_of(open_clip(source))
    writer = upscale.open_writer(footage, tmp_path / "out.mp4", 2.0, upscale.OutputOptions())
    with pytest.raises(ValueError, match="expected frame 0") as caught:
        upscale.write_footage(footage, lambda frames: frames, writer)
    assert caught.value.__traceback__ is not None
    assert str(source) not in [file.path for file in psutil.Process().open_files()]


def test_images_go_in_and_come_out(tmp_path, engine):
    frames = [torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for index, frame in enumerate(frames):
        (tmp_path / f"shot_{index:02d}.png").write_bytes(encode_png(frame, "rgb48be"))
    out = tmp_path / "out"
    pattern = str(tmp_path / "shot_%02d.png")
    assert cli.main(["upscale", pattern, str(out), "--scale", "1", "--image-sequence", "--ten-bit"]) == 0
    clip = open_clip(out)
    assert clip.bit_depth == 16
    for got, frame in zip(clip.frames(), frames, strict=True):
        assert (got - frame).abs().max() * 65535 < 1.01
    video = tmp_path / "out.mp4"
    assert cli.main(["upscale", pattern, str(video), "--scale", "1", "--frame-rate", "30000/1001"]) == 0
    assert open_clip(video).frame_rate == Fraction(30000, 1001)


@pytest.mark.parametrize(("arguments", "pixel_format"), [
    ([], "yuv420p"), (["--scale", "1.375"], "yuv420p"), (["--scale", "1.03"], "yuv444p"),
    (["--ten-bit"], "yuv420p10le"), (["--codec", "ffv1"], "bgr0"),
    (["--codec", "libx264", "--ten-bit", "--crf", "20"], "yuv420p10le"),
])  # fmt: skip
def test_the_output_has_the_exact_size_and_the_format_asked_for(tmp_path, engine, arguments, pixel_format):
    out = tmp_path / "out.mkv"
    assert cli.main(["upscale", str(make_clip(tmp_path / "in.mp4", 2)), str(out), *arguments]) == 0
    scale = float(arguments[1]) if arguments[:1] == ["--scale"] else 4.0
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == output_size(WIDTH, HEIGHT, scale)
        assert stream.pix_fmt == pixel_format


def test_a_report_is_plain_data(tmp_path, engine):
    clip = open_clip(make_clip(tmp_path / "in.mp4", 2))
    with contextlib.closing(open_clip(tmp_path / "in.mp4").frames()) as frames:
        assert next(frames).shape == (HEIGHT, WIDTH, 3)
    footage = upscale.footage_of(clip)
    writer = upscale.open_writer(footage, tmp_path / "out.mp4", 2.0, upscale.OutputOptions())
    assert isinstance(writer, ClipWriter)
    report = upscale.upscale_clip(
        None, footage, writer, StreamOptions(scale=2.0), device=torch.device("cpu"), dtype=torch.float32
    )
    assert json.loads(json.dumps(dataclasses.asdict(report)))["frames"] == 2
