"""Threads beside the engine: order, errors, bounds, and that they end."""

from __future__ import annotations

import threading
import time
from fractions import Fraction
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steadyvsr.app.clip import WAITING_FRAMES, Footage, OutputOptions, footage_of, open_video, write_footage
from steadyvsr.app.pipeline import read_ahead, written_behind
from steadyvsr.models.video import ClipWriter, Waveform, open_clip

SOON = 20
"""Seconds after which something that should happen is taken not to."""


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("steadyvsr ")]


def numbers(count: int, closed: list | None = None):
    try:
        yield from range(count)
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


@given(sizes=st.lists(st.integers(0, 9), max_size=30), limit=st.integers(1, 20))
def test_values_come_in_order_and_no_more_wait_than_allowed(sizes, limit):
    pulled, written, most = [], [], 0

    def source():
        for index, size in enumerate(sizes):
            pulled.append(size)
            yield index

    with written_behind(written.append, lambda index: sizes[index], limit) as put:
        for taken, index in enumerate(read_ahead(source(), lambda index: sizes[index], limit), 1):
            # Beside what waits: the value taken here, and the one that the thread is about to hand over.
            most = max(most, sum(pulled[taken : len(pulled) - 1]))
            put(index)
    assert written == list(range(len(sizes))) and most <= max([limit, *sizes])
    assert threads() == []


def test_an_error_of_the_source_comes_after_the_values_before_it():
    def failing():
        yield from range(3)
        raise KeyError("lost")

    taken = []
    with pytest.raises(KeyError, match="lost"):
        for value in read_ahead(failing(), lambda value: 1, 10):
            taken.append(value)
    assert taken == [0, 1, 2] and threads() == []


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_closes_the_source_in_its_own_thread_and_ends_that(taken):
    closed = []
    values = read_ahead(numbers(1000, closed), lambda value: 1, 3)
    for _ in range(taken):
        next(values)
    values.close()
    assert closed == ["steadyvsr reader"] * bool(taken) and threads() == []


def test_an_error_while_writing_reaches_the_next_call_or_the_end():
    def write(value):
        if value == 2:
            raise OSError("disk full")
        written.append(value)

    for count in (3, 100):
        written = []
        with pytest.raises(OSError, match="disk full"), written_behind(write, lambda value: 1, 1) as put:
            for value in range(count):
                put(value)
        assert written == [0, 1] and threads() == []


def test_an_exception_drops_what_waits_to_be_written():
    begun, go, written = threading.Event(), threading.Event(), []

    def write(value):
        begun.set()
        assert go.wait(SOON)
        written.append(value)

    with pytest.raises(KeyboardInterrupt), written_behind(write, lambda value: 1, 100) as put:
        for value in range(50):
            put(value)
        assert begun.wait(SOON)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert written == [0] and threads() == []


def test_frames_are_read_and_written_while_the_engine_works(tmp_path):
    """One after the other, this engine would wait for ever: for frames read ahead and for its own to be written."""
    read, written = threading.Semaphore(0), threading.Event()

    def frames():
        for index in range(8):
            read.release()
            yield torch.full((48, 64, 3), index / 8), Fraction(index, 25)

    def engine(pulled):
        yield next(pulled)
        assert written.wait(SOON)
        for _ in range(4):
            assert read.acquire(timeout=SOON)
        yield from pulled

    clip = Footage(frames, 64, 48, 8, Fraction(25), Fraction(1, 25), decoded=True)
    with ClipWriter(tmp_path / "o.mkv", 64, 48, 25) as writer:
        encode = writer.write

        def write(frame, moment):
            encode(frame, moment)
            written.set()

        writer.write = write
        write_footage(clip, engine, writer)
    assert open_clip(tmp_path / "o.mkv").frame_count == 8 and threads() == []


@pytest.mark.parametrize("side", ["reader", "writer"])
def test_few_frames_wait_however_small_they_are(tmp_path, side):
    """Else the whole of a small clip is read before the first step: 74 MiB more for 400 frames of 128x128."""
    count, read, most = 100, 0, 0
    go = threading.Event()

    def frames():
        nonlocal read
        for index in range(count):
            read += 1
            yield torch.zeros(48, 64, 3), Fraction(index, 25)

    def engine(pulled):
        nonlocal most
        for taken, frame in enumerate(pulled, 1):
            if side == "reader" and taken == 1:
                time.sleep(0.3)
            most = max(most, read - taken)
            yield frame

    clip = Footage(frames, 64, 48, count, Fraction(25), Fraction(1, 25), decoded=True)
    with ClipWriter(tmp_path / "o.mkv", 64, 48, 25) as writer:
        encode, waiting = writer.write, []

        def write(frame, moment):
            assert go.wait(SOON)
            encode(frame, moment)

        def handed(frame):
            waiting.append(len(waiting) - writer.frames_written)
            if len(waiting) == WAITING_FRAMES:
                go.set()

        writer.write = write
        write_footage(clip, engine, writer, handed)
    # Beside those that wait, each thread has one in its hands.
    assert most <= WAITING_FRAMES + 2 and max(waiting) <= WAITING_FRAMES + 2


def test_tensors_of_a_caller_are_pulled_on_the_caller_s_thread(tmp_path):
    """Their checks may empty ComfyUI's caches, which is for its worker alone."""
    seen = set()

    def frames():
        for index in range(3):
            seen.add(threading.current_thread())
            yield torch.zeros(48, 64, 3), Fraction(index, 25)

    with ClipWriter(tmp_path / "o.mkv", 64, 48, 25) as writer:
        write_footage(Footage(frames, 64, 48, 3, Fraction(25), Fraction(1, 25)), lambda pulled: pulled, writer)
    assert seen == {threading.current_thread()}


def test_packed_frames_make_the_same_file_as_rgb(tmp_path):
    pictures = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    files = []
    for name in ("rgb.mp4", "packed.mp4"):
        with ClipWriter(tmp_path / name, 64, 48, 25) as writer:
            for frame in pictures if name == "rgb.mp4" else writer.pack(pictures):
                writer.write(frame)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_a_video_in_memory_is_read_by_two_threads_without_mixing_them_up(tmp_path):
    """Its pictures are decoded while its sound is copied, both from one file object."""
    path = tmp_path / "in.mkv"
    sound = Waveform(torch.rand(2, 48_000 * 2, generator=torch.Generator().manual_seed(1)) - 0.5, 48_000)
    with ClipWriter(path, 64, 48, 25, audio=sound) as writer:
        for index in range(50):
            writer.write(torch.rand(48, 64, 3, generator=torch.Generator().manual_seed(index)))
    outputs = []
    for number, source in enumerate([path, BytesIO(path.read_bytes())]):
        footage = footage_of(open_clip(source))
        writer = open_video(footage, tmp_path / f"out{number}.mp4", 1.0, OutputOptions())

        def engine(frames):
            for frame in frames:
                time.sleep(0.001)
                yield frame

        write_footage(footage, engine, writer)
        outputs.append((tmp_path / f"out{number}.mp4").read_bytes())
    assert outputs[0] == outputs[1]
