"""A folder of clips: what is found, how many workers are admitted, what is recorded, and what survives a bad night."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from steadyvsr import cli
from steadyvsr.app import folder as batch
from steadyvsr.app.folder import worker
from steadyvsr.memory.reading import Reading
from steadyvsr.models.video import open_clip
from steadyvsr.tests.app.folder_runs import files, run, settings, write_clip

GIB = 1 << 30
LENGTHS = (9, 25, 9)
"""Of three clips: the second is long enough that a signal finds it half done."""


# Which clips, and where to


def test_the_tree_is_kept_and_other_files_are_left_alone(tmp_path):
    for name in ("b.mp4", "sub/deep/a.mkv", "with space/-dash ü.mov", "notes.txt", "clip.avi"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    jobs = batch.find_jobs(tmp_path / "in", tmp_path / "out")
    results = [job.output.relative_to(tmp_path / "out").as_posix() for job in jobs]
    assert results == ["b.mp4", "clip.mp4", "sub/deep/a.mkv", "with space/-dash ü.mov"]


def test_two_clips_never_have_one_result(tmp_path):
    for name in ("clip.mp4", "clip.avi", "clip.MPG"):
        (tmp_path / name).touch()
    results = [job.output.name for job in batch.find_jobs(tmp_path, tmp_path / "out")]
    assert sorted(results) == ["clip.mp4", "clip_avi.mp4", "clip_mpg.mp4"]


def test_an_output_folder_inside_the_input_is_not_searched(tmp_path):
    for name in ("a.mp4", "out/a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [job.name for job in batch.find_jobs(tmp_path, tmp_path / "out")] == ["a.mp4"]


def test_a_folder_that_cannot_be_done_is_refused_in_words(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "file").touch()
    for source, output, words in (
        ("in", "out", "expected videos"),
        ("in", "in", "a folder other than IN"),
        ("file", "out", "got a file"),
        ("gone", "out", "got nothing"),
        ("in", "file", "expected a folder for the results"),
    ):
        with pytest.raises(ValueError, match=words):
            batch.find_jobs(tmp_path / source, tmp_path / output)


# How many workers


@pytest.mark.parametrize(("card", "count"), [(16, 1), (24, 1), (32, 2), (48, 3)])
def test_a_footprint_of_eleven_gib_gets_so_many_workers(card, count):
    assert batch.admit(11 * GIB, card * GIB).count == count


def test_too_many_workers_are_lowered_and_the_sum_is_said():
    found = batch.admit(11 * GIB, 16 * GIB, asked=2)
    assert found.count == 1
    assert "2 × 11.00 GiB = 22.00 GiB is more than 12.80 GiB" in found.reason and "1 used instead of 2" in found.reason


def test_force_takes_what_was_asked():
    found = batch.admit(11 * GIB, 16 * GIB, asked=2, force=True)
    assert found.count == 2 and "forced" in found.reason


def test_fewer_workers_than_fit_are_fewer_workers():
    assert batch.admit(GIB, 48 * GIB, asked=2).count == 2


def test_on_the_cpu_there_are_no_more_workers_than_cores():
    assert batch.admit(GIB, 64 * GIB, cores=2).count == 2
    with pytest.raises(ValueError, match="number from 1"):
        batch.admit(GIB, 64 * GIB, asked=0)


# The record


def test_a_finished_clip_is_known_by_its_file_its_settings_and_its_result(tmp_path):
    source = write_clip(tmp_path / "in" / "a.mp4")
    (job,) = batch.find_jobs(tmp_path / "in", tmp_path / "out")
    manifest = batch.Manifest(tmp_path / "out", {"scale": 2})
    assert not manifest.finished(job)
    job.output.write_bytes(b"result")
    manifest.record(job, "done")
    assert batch.Manifest(tmp_path / "out", {"scale": 2}).finished(job)
    assert not batch.Manifest(tmp_path / "out", {"scale": 4}).finished(job)
    job.output.write_bytes(b"another result")
    assert not manifest.finished(job)
    job.output.write_bytes(b"result")
    os.utime(source, ns=(1, 1))
    (changed,) = batch.find_jobs(tmp_path / "in", tmp_path / "out")
    assert manifest.finished(job) and not manifest.finished(changed)


def test_a_record_that_cannot_be_read_is_no_reason_to_start_anew_silently(tmp_path):
    (tmp_path / ".steadyvsr.json").write_text("{")
    with pytest.raises(ValueError, match="Delete it to start anew"):
        batch.Manifest(tmp_path, {})


# The run


def test_a_corrupt_clip_is_reported_and_the_rest_is_done_and_not_done_again(tmp_path, in_threads):
    for index in range(3):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video")
    first = run(tmp_path / "in", tmp_path / "out")
    assert [result.name for result in first.done] == ["0.mp4", "1.mp4", "2.mp4"]
    assert [result.error.partition(":")[0] for result in first.failed] == ["bad.mp4"]
    assert files(tmp_path / "out") == [".steadyvsr.json", "0.mp4", "1.mp4", "2.mp4"]
    assert all(result.after > 0 and result.footprint >= result.after for result in first.done)
    (tmp_path / "in" / "bad.mp4").unlink()
    write_clip(tmp_path / "in" / "bad.mp4", 9)
    again = run(tmp_path / "in", tmp_path / "out")
    assert [result.name for result in again.results] == ["bad.mp4"] and len(again.skipped) == 3


def test_a_clip_whose_worker_is_killed_is_done_again_alone_with_the_same_frames(tmp_path):
    for index, frames in enumerate(LENGTHS):
        write_clip(tmp_path / "in" / f"{index}.mp4", index, frames)
    alone = run(tmp_path / "in", tmp_path / "alone")
    killed = []

    def kill(number, name, done, total):
        if not killed and name == "1.mp4":
            killed.append(name)
            for child in psutil.Process().children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    report = run(tmp_path / "in", tmp_path / "out", progress=kill)
    assert killed == ["1.mp4"] and report.redone == ["1.mp4"]
    assert [result.state for result in report.results] == ["done"] * 3 and len(alone.done) == 3
    for index, frames in enumerate(LENGTHS):
        ours, single = (list(open_clip(tmp_path / folder / f"{index}.mp4").frames()) for folder in ("out", "alone"))
        assert len(ours) == frames and torch.equal(torch.stack(ours), torch.stack(single))
    assert files(tmp_path / "out") == [".steadyvsr.json", "0.mp4", "1.mp4", "2.mp4"]


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path, monkeypatch, in_threads):
    for index in range(4):
        write_clip(tmp_path / "in" / f"{index}.mp4", index)
    upscale, count = worker._upscale, []

    def full(*arguments):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return upscale(*arguments)

    monkeypatch.setattr(worker, "_upscale", full)
    report = run(tmp_path / "in", tmp_path / "out")
    assert "Make room on the disk" in report.stopped and "No space left" in report.stopped
    assert len(report.done) == 2 and len(count) == 3
    monkeypatch.setattr(worker, "_upscale", upscale)
    assert [result.name for result in run(tmp_path / "in", tmp_path / "out").results] == ["2.mp4", "3.mp4"]


def test_a_clip_that_does_not_fit_is_tried_once_more_alone_with_the_smallest_plan(tmp_path, monkeypatch, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    plans = []

    def too_large(_worker, _name, _source, _output, plan):
        plans.append(plan)
        raise torch.OutOfMemoryError("the card is full")

    monkeypatch.setattr(worker, "_upscale", too_large)
    report = run(tmp_path / "in", tmp_path / "out")
    assert [str(plan) for plan in plans] == [str(worker.MemoryPlan()), str(worker.SMALL)]
    (result,) = report.failed
    assert "out of memory even alone" in result.error and files(tmp_path / "out") == [".steadyvsr.json"]


def test_weights_that_cannot_be_read_end_the_run_at_once(tmp_path, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    write_clip(tmp_path / "in" / "b.mp4")
    chosen = settings(model=str(tmp_path / "gone.safetensors"))
    jobs = tuple(batch.find_jobs(tmp_path / "in", tmp_path / "out"))
    manifest = batch.Manifest(tmp_path / "out", {})
    report = batch.run_folder(batch.FolderRun(jobs, (chosen,), 1), manifest, lambda line: None)
    assert "could not be loaded" in report.stopped and "gone.safetensors" in report.stopped
    assert report.results == [] and not manifest.path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of this kind are POSIX")
def test_ctrl_c_ends_clean_and_a_rerun_does_the_rest(tmp_path, package_environment, capsys, in_threads):
    for index, frames in enumerate(LENGTHS):
        write_clip(tmp_path / "in" / f"{index}.mp4", index, frames)
    arguments = ["upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--scale", "2", "--workers", "1", "--json",
                 "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "steadyvsr", *arguments], cwd=tmp_path, env=package_environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "0.mp4").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    left = files(tmp_path / "out")
    assert [name for name in left if name.endswith(".part") or ".part" in name] == []
    finished = json.loads((tmp_path / "out" / ".steadyvsr.json").read_text())["clips"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["skipped"]) == len(finished) < 3
    assert files(tmp_path / "out") == [".steadyvsr.json", "0.mp4", "1.mp4", "2.mp4"]


def test_the_command_line_prints_a_table_and_ends_with_one_where_a_clip_failed(tmp_path, capsys, in_threads):
    write_clip(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "bad.mp4").write_bytes(b"")
    arguments = [
        "upscale",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--scale",
        "2",
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "a.mp4" in printed and "1 done, 1 failed, 0 finished before" in printed


def test_workers_make_no_sense_for_a_single_clip(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4")
    assert cli.main(["upscale", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--workers", "2"]) == 2
    assert "expected a folder of videos" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "cpu"])
def test_after_a_clip_the_allocator_of_its_device_gives_its_unused_memory_back(monkeypatch, kind):
    emptied = []
    for name in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(worker.torch, name), "empty_cache", lambda name=name: emptied.append(name))
    monkeypatch.setattr(worker.probe, "read", lambda *_, **__: Reading(kind))
    worker._returned(worker.torch.device(kind))
    assert emptied == ([] if kind == "cpu" else [kind])
