"""A night alone: nothing of the user's is replaced, one odd clip ends nothing, a hung or dying worker costs its clip's
second try, and whatever is killed leaves neither half files nor processes behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from steadyvsr import cli
from steadyvsr.app import folder as batch
from steadyvsr.app.clip import OutputOptions
from steadyvsr.app.folder import worker
from steadyvsr.models.flashvsr import StreamOptions
from steadyvsr.models.video import open_clip, timeline
from steadyvsr.tests.app.folder_runs import FRAMES, HEIGHT, WIDTH, files, run, settings, write_clip

GIB = 1 << 30
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are POSIX")


def lossy(crf: int) -> worker.WorkerSettings:
    """Other settings, so that everything is done again."""
    return settings(options=StreamOptions(scale=2.0, seed=crf))


# Nothing of the user's is replaced


def test_a_file_that_no_run_made_is_replaced_with_force_alone(tmp_path, in_threads):
    write_clip(tmp_path / "lib" / "shots" / "a.mp4")
    original = tmp_path / "lib" / "a.mp4"
    original.write_bytes(b"an original")
    report = run(tmp_path / "lib" / "shots", tmp_path / "lib")
    (result,) = report.failed
    assert str(original) in result.error and "--force" in result.error and original.read_bytes() == b"an original"
    assert run(tmp_path / "lib" / "shots", tmp_path / "lib", force=True).failed == []
    assert open_clip(original).frame_count == FRAMES


def test_an_older_result_is_replaced_unless_somebody_has_changed_it(tmp_path, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    out = tmp_path / "out" / "a.mp4"
    run(tmp_path / "in", tmp_path / "out")
    first = out.stat().st_mtime_ns
    assert run(tmp_path / "in", tmp_path / "out", chosen=lossy(1)).failed == [] and out.stat().st_mtime_ns > first
    out.write_bytes(out.read_bytes() + b"edited")
    (result,) = run(tmp_path / "in", tmp_path / "out", chosen=lossy(2)).failed
    assert "changed since" in result.error and out.read_bytes().endswith(b"edited")


def test_a_link_under_the_name_of_a_result_is_somebody_elses(tmp_path, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    assert len(run(tmp_path / "in", tmp_path / "out").failed) == 1
    assert (tmp_path / "out" / "a.mp4").is_symlink() and not (tmp_path / "elsewhere.mp4").exists()


def test_a_result_whose_naming_was_interrupted_is_made_again(tmp_path, in_threads, monkeypatch):
    """Killed between the record and the name: neither the old result nor the new one is taken for a stranger's."""
    write_clip(tmp_path / "in" / "a.mp4")
    run(tmp_path / "in", tmp_path / "out")

    def killed(source, target, rename=os.replace):
        if target == tmp_path / "out" / "a.mp4":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch.scheduler.os, "replace", killed)
        run(tmp_path / "in", tmp_path / "out", chosen=lossy(1))
    report = run(tmp_path / "in", tmp_path / "out", chosen=lossy(1))
    assert len(report.done) == 1 and report.failed == []


def test_two_results_never_share_a_name(tmp_path):
    for name in ("clip.avi", "clip.mp4", "clip_avi.mp4", "CLIP.MP4", "a.MP4", "a.mp4"):
        (tmp_path / name).touch()
    results = [str(job.output).lower() for job in batch.find_jobs(tmp_path, tmp_path / "out")]
    assert len(set(results)) == len(results) == 6


# One run per folder


def test_two_runs_into_one_folder_do_not_meet(tmp_path, in_threads):
    write_clip(tmp_path / "in" / "a.mp4", frames=25)
    words = []

    def second(*_):
        if not words:
            words.append("")
            with pytest.raises(ValueError, match=f"process {os.getpid()} is at work") as caught:
                run(tmp_path / "in", tmp_path / "out")
            words.append(str(caught.value))

    assert len(run(tmp_path / "in", tmp_path / "out", progress=second).done) == 1
    assert len(words) == 2 and files(tmp_path / "out") == [".steadyvsr.json", "a.mp4"]


def test_the_lock_of_a_killed_run_is_taken_over_and_what_it_left_is_removed(tmp_path):
    code = "import os, sys; from pathlib import Path; from steadyvsr.app.folder.lock import FolderLock\n"
    code += "place = FolderLock(Path(sys.argv[1])).make_place(Path(sys.argv[1]))\n"
    code += "(place / 'a.mp4').write_bytes(b'half'); print(place); sys.stdout.flush(); os._exit(9)"
    left = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    place = Path(left.stdout.strip())
    assert place.is_dir(), left.stderr
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / ".steadyvsr-link").symlink_to(precious)
    with (tmp_path / ".steadyvsr.lock").open("a") as list_of_places:
        for named in ("precious", ".steadyvsr-link", "../.steadyvsr-x", "/etc", "no hex"):
            list_of_places.write(f"{os.fsencode(named).hex() if named != 'no hex' else named}\n")
    with batch.FolderLock(tmp_path):
        assert not place.exists() and precious.is_dir()
    assert not (tmp_path / ".steadyvsr.lock").exists()


# One odd clip ends nothing


def write_with_gap(path: Path) -> None:
    """An MPEG transport stream with a gap of seventeen hours: 5.5e9 ticks, more than an MP4 can say."""
    with av.open(str(path), "w", format="mpegts") as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "1", "bf": "0", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(24):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 9 * index, np.uint8), format="rgb24")
            frame.pts = index if index < 20 else index + 25 * 3600 * 17
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


@posix
def test_odd_clips_are_errors_and_the_rest_is_done(tmp_path, in_threads):
    source = tmp_path / "in"
    write_clip(source / "z.mp4")
    (source / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    (source / "round.mp4").symlink_to(source / "round.mp4")
    os.mkfifo(source / "pipe.mp4")
    report = run(source, tmp_path / "out")
    assert [result.name for result in report.done] == ["z.mp4"]
    errors = {result.name: result.error for result in report.failed}
    assert "a link that leads nowhere" in errors["dangling.mp4"] and "no file" in errors["pipe.mp4"]
    assert "round.mp4" in errors and len(errors) == 3
    again = run(source, tmp_path / "out")
    assert again.skipped == ["z.mp4"] and len(again.failed) == 3


@posix
def test_a_name_that_is_no_text_is_done_like_any_other(tmp_path, in_threads, capsys):
    name = os.fsdecode(b"caf\xe9.mp4")
    write_clip(tmp_path / "in" / "a.mp4").rename(tmp_path / "in" / name)
    arguments = ["upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--scale", "2", "--workers", "1",
                 "--device", "cpu", "--log", str(tmp_path / "log.txt")]  # fmt: skip
    assert cli.main(arguments) == 0
    assert open_clip(tmp_path / "out" / name).frame_count == FRAMES
    assert r"caf\udce9.mp4: done" in (tmp_path / "log.txt").read_text() and r"caf\udce9.mp4" in capsys.readouterr().out
    assert cli.main(arguments) == 0 and "1 finished before" in capsys.readouterr().out


def test_a_gap_that_the_container_cannot_hold_keeps_the_frames_before_it(tmp_path, in_threads, monkeypatch):
    monkeypatch.setattr(timeline, "JUMP_SECONDS", 1e9)  # or the reader closes it, as it is a transport stream's
    (tmp_path / "in").mkdir()
    write_with_gap(tmp_path / "in" / "a.ts")
    write_clip(tmp_path / "in" / "b.mp4")
    chosen = settings(output=OutputOptions())
    report = run(tmp_path / "in", tmp_path / "out", chosen=chosen)
    assert [result.name for result in report.done] == ["b.mp4"]
    (result,) = report.failed
    assert str(tmp_path / "out" / "a.partial.mp4") in result.error
    assert len(list(open_clip(tmp_path / "out" / "a.partial.mp4").frames())) == 20
    again = run(tmp_path / "in", tmp_path / "out", chosen=chosen)
    assert again.skipped == ["b.mp4"] and len(again.failed) == 1
    assert files(tmp_path / "out") == [".steadyvsr.json", "a.partial.mp4", "b.mp4"]


def test_an_error_of_any_kind_is_recorded_and_the_night_goes_on(tmp_path, in_threads, monkeypatch):
    for index in range(3):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    upscale = worker._upscale

    def odd(owner, name, *arguments):
        if name == "1.mp4":
            raise KeyError("nobody expected this")
        return upscale(owner, name, *arguments)

    monkeypatch.setattr(worker, "_upscale", odd)
    report = run(tmp_path / "in", tmp_path / "out")
    assert [result.name for result in report.done] == ["0.mp4", "2.mp4"]
    assert [result.error for result in report.failed] == ["KeyError: 'nobody expected this'"]
    recorded = json.loads((tmp_path / "out" / ".steadyvsr.json").read_text())["clips"]["1.mp4"]
    assert recorded["state"] == "failed" and "KeyError" in recorded["error"]


# Workers that hang, die, or have no memory


def test_a_hung_worker_is_ended_and_its_clip_done_again_alone(tmp_path, in_threads, monkeypatch):
    for index in range(2):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    upscale, calls = worker._upscale, []

    def hangs_once(owner, name, source, output, plan):
        calls.append((name, plan))
        if len(calls) == 1:
            owner.pipe.send(worker.Progress(1, FRAMES, 0.01, None))
            time.sleep(20)
        return upscale(owner, name, source, output, plan)

    monkeypatch.setattr(worker, "_upscale", hangs_once)
    said = []
    jobs = tuple(batch.find_jobs(tmp_path / "in", tmp_path / "out"))
    manifest = batch.Manifest(tmp_path / "out", {})
    report = batch.run_folder(batch.FolderRun(jobs, (settings(),), 1, silence=2.0), manifest, said.append)
    assert report.redone == ["0.mp4"] and len(report.done) == 2 and calls[-1] == ("0.mp4", worker.SMALL)
    assert any("0.mp4: its worker hung: no step was finished for" in line for line in said)


def test_a_worker_may_be_silent_for_twenty_steps_of_the_kind_that_it_is_at(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(batch.process.time, "monotonic", lambda: clock[0])
    one = batch.process.WorkerProcess(0, settings(), silence=120.0)
    one._listen(worker.READY)
    for usual, patience in ((None, 1200.0), (0.1, 120.0), (10.0, 200.0)):
        one._listen(worker.Progress(1, 9, usual, None))
        clock[0] += patience - 1
        assert not one.hangs()
        clock[0] += 2
        assert one.hangs()
        one.excuse(10.0)  # the whole machine stood still
        assert not one.hangs()
    one._listen(worker.Progress(9, 9, 0.1, None))  # the file is completed now
    clock[0] += 1199
    assert not one.hangs()


def test_a_worker_tells_of_a_step_that_may_take_longer_than_the_parent_knows(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
    watch, told = worker._StepWatch(), []
    for phase, seconds in [("project", 0.2), ("transform", 30.0), ("decode", 0.1)] * 2 + [("project", 0.2)] * 4:
        if watch.begin(phase):
            told.append((phase, watch.progress(1, 9, torch.device("cpu")).usual))
        clock[0] += seconds
    rounded = [(phase, usual and round(usual, 1)) for phase, usual in told]
    assert rounded == [
        ("project", None), ("transform", None), ("decode", None), ("transform", 30.0), ("decode", 0.1), ("project", 0.2)
    ]  # fmt: skip


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
], ids=["allocator", "Python", "system"])  # fmt: skip
def test_a_clip_for_which_the_machine_has_no_memory_is_done_again_alone(tmp_path, in_threads, monkeypatch, error):
    write_clip(tmp_path / "in" / "a.mp4")
    upscale, plans = worker._upscale, []

    def short_once(owner, name, source, output, plan):
        plans.append(plan)
        if len(plans) == 1:
            raise error
        return upscale(owner, name, source, output, plan)

    monkeypatch.setattr(worker, "_upscale", short_once)
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.redone == ["a.mp4"] and len(report.done) == 1 and plans[1] == worker.SMALL


@pytest.mark.parametrize("error", [KeyError("odd"), MemoryError("no room"), SystemExit()])
def test_a_model_that_cannot_be_loaded_is_said_once(tmp_path, in_threads, monkeypatch, error):
    for index in range(3):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(worker, "load_flashvsr", fail)
    report = run(tmp_path / "in", tmp_path / "out")
    assert "could not be loaded" in report.stopped and report.results == [] and report.redone == []
    assert type(error).__name__ in report.stopped or "its worker died while loading it" in report.stopped


def test_a_full_disk_at_the_record_ends_the_run_in_words(tmp_path, in_threads, monkeypatch):
    for index in range(2):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    (tmp_path / "out").mkdir()

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batch.manifest.os, "fsync", full)
    report = run(tmp_path / "in", tmp_path / "out")
    assert "No space left" in report.stopped and "Make room on the disk" in report.stopped
    assert len(report.results) == 1


# What is searched, and what a record may look like


def test_results_of_earlier_runs_and_linked_folders_are_noted_and_not_searched(tmp_path):
    write_clip(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "older").mkdir()
    (tmp_path / "in" / "older" / ".steadyvsr.json").write_text('{"clips": {}}')
    (tmp_path / "in" / "older" / "a.mp4").touch()
    (tmp_path / "in" / "new").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path)
    notes = []
    jobs = batch.find_jobs(tmp_path / "in", tmp_path / "in" / "new", notes.append)
    assert [job.name for job in jobs] == ["a.mp4"]
    assert len(notes) == 2 and "a linked folder" in notes[0] and "results of an earlier run" in notes[1]


@pytest.mark.parametrize("arguments", [("", "out"), ("in", ""), ("in", "out", "--model", "")])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "in" / "a.mp4")
    assert cli.main(["upscale", *arguments]) == 2
    assert "expected a path; got an empty one" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [
    "[]", "3", "null", '{"clips": 3}', '{"clips": [1]}', '{"clips": {"a.mp4": {}}}', '{"clips": {"a.mp4": [1]}}',
    '{"clips": {"a.mp4": {"state": "done", "settings": 3, "output": "a.mp4"}}}', "[" * 100_000, "\xff",
    '{"clips": {"a.mp4": {"state": "done", "settings": "x", "output": "a.mp4", "size": 1, "mtime_ns": 1,'
    ' "output_size": 1, "made": [[1], ["x", 2], 7], "partial": ["../in/a.mp4", 1]}}}',
], ids=range(11))  # fmt: skip
def test_a_record_of_any_shape_is_an_error_in_words_or_no_record(tmp_path, text):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"clip")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".steadyvsr.json").write_text(text, encoding="latin-1")
    (job,) = batch.find_jobs(tmp_path / "in", tmp_path / "out")
    try:
        manifest = batch.Manifest(tmp_path / "out", {})
    except ValueError as error:
        assert "Delete it to start anew" in str(error)
        return
    assert not manifest.finished(job) and manifest.may_write(job)
    manifest.drop_partial(job)
    manifest.record(job, "failed")
    assert job.source.read_bytes() == b"clip"


# Ends


@posix
def test_a_worker_ends_when_its_pipe_closes_whatever_it_is_doing():
    code = "import sys, threading, queue, time; from multiprocessing.connection import Connection\n"
    code += "from steadyvsr.app import leash; assert 'torch' not in sys.modules; stop = threading.Event()\n"
    code += "pipe, orders = Connection(int(sys.argv[1])), queue.SimpleQueue()\n"
    code += "threading.Thread(target=leash.listen, args=(pipe, orders, stop), daemon=True).start()\n"
    code += "pipe.send(orders.get()); assert stop.wait(10); pipe.send('stopped')\ntime.sleep(600)"
    ours, theirs = Pipe()
    process = subprocess.Popen([sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.send("order")
    assert ours.recv() == "order"
    ours.send(None)
    assert ours.recv() == "stopped" and process.poll() is None
    ours.close()
    assert process.wait(5) == 1


DIES_WHILE_IT_TELLS = """
import os, signal, sys
from multiprocessing.connection import Connection
from pathlib import Path
MARK, SENDS = Path({mark!r}), {sends}
if "--multiprocessing-fork" in sys.orig_argv and not MARK.exists():
    send = Connection._send_bytes
    def dying(self, data):
        global SENDS
        SENDS -= 1
        if not SENDS:
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        send(self, data)
    Connection._send_bytes = dying
"""
"""A sitecustomize.py: the first worker is killed as it sends, with any lock that this takes in its hand."""


@posix
@pytest.mark.parametrize("sends", [1, 2], ids=["that it is ready", "its progress"])
def test_a_worker_that_is_killed_while_it_tells_something_holds_up_no_other(tmp_path, monkeypatch, sends):
    for index in range(2):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    (tmp_path / "code").mkdir()
    text = DIES_WHILE_IT_TELLS.format(mark=str(tmp_path / "died"), sends=sends)
    (tmp_path / "code" / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"), prepend=os.pathsep)
    report = run(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "died").exists() and len(report.done) == 2


def start_night(folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """`steadyvsr upscale` of long clips, in a process group of its own."""
    arguments = ["upscale", "in", "out", "--scale", "2", "--workers", "1", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "steadyvsr", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def workers_of(process: subprocess.Popen, seconds: float = 60) -> list[psutil.Process]:
    """Its worker processes, once there are any."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        found = [c for c in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in str(c.cmdline())]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@posix
@pytest.mark.parametrize("moment", ["loading", "working"])
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path, package_environment, moment):
    write_clip(tmp_path / "in" / "0.mp4")
    write_clip(tmp_path / "in" / "1.mp4", frames=1200)
    process = start_night(tmp_path, package_environment)
    workers = workers_of(process)
    while moment == "working" and not (tmp_path / "out" / "0.mp4").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_worker_hangs_ends_within_five_seconds_and_says_what_is_true(tmp_path, package_environment, number):
    write_clip(tmp_path / "in" / "0.mp4")
    write_clip(tmp_path / "in" / "1.mp4", frames=1200)
    process = start_night(tmp_path, package_environment)
    (one,) = workers_of(process)
    while not (tmp_path / "out" / "0.mp4").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    one.suspend()
    started = time.monotonic()
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.3)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - started < 5 and process.returncode == 130 and "Traceback" not in error
    assert "Stopped. 1 of 2 clips are done" in error.splitlines()[-1] and not one.is_running()
    assert files(tmp_path / "out") == [".steadyvsr.json", "0.mp4"]


# What is told


def test_the_table_says_how_memory_grew_and_how_full_the_device_was():
    results = [worker.ClipResult(f"{n}.mp4", "done", frames=9, seconds=1, after=GIB, in_use=0.5) for n in range(6)]
    report = batch.FolderReport(results, growth=batch.report.growth_of(results))
    table = report.table()
    assert "50.0%" in table and "worker 0, memory after its clips: 0.00 MiB per run" in table


def test_the_log_gets_all_that_is_said_and_never_goes_into_another_file(tmp_path, capsys, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "bad.mp4").write_bytes(b"")
    log = tmp_path / "night.log"
    log.write_text("an older night\n")
    arguments = ["upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--scale", "2", "--device", "cpu", "--log"]
    assert cli.main([*arguments, str(log)]) == 1
    text = log.read_text()
    assert text.startswith("an older night\n") and "a.mp4: done" in text and "bad.mp4: failed" in text
    assert "1 done, 1 failed, 0 finished before" in text
    clip = (tmp_path / "in" / "a.mp4").read_bytes()
    assert cli.main([*arguments, str(tmp_path / "in" / "a.mp4")]) == 2
    assert "--log" in capsys.readouterr().err and (tmp_path / "in" / "a.mp4").read_bytes() == clip
