"""What grows under a name of its own: nothing that somebody else put there is read, changed or removed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from steadyvsr.models.video import ClipWriter, ImageSequenceWriter
from steadyvsr.models.video.part_file import PartFile, PartFolder

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a right that users lack there")
needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="parts of killed runs are told by a lock of POSIX")


def write_clip(path: Path, frames: int = 3, force: bool = False) -> Path:
    with ClipWriter(path, 64, 48, 25, force=force) as writer:
        for _ in range(frames):
            writer.write(torch.rand(48, 64, 3))
    return path


def test_a_file_called_part_is_somebody_elses(tmp_path):
    theirs = tmp_path / "o.mp4.part"
    theirs.write_bytes(b"precious")
    write_clip(tmp_path / "o.mp4")
    with pytest.raises(RuntimeError), ClipWriter(tmp_path / "o.mp4", 64, 48, 25, force=True):
        raise RuntimeError("stop")
    assert theirs.read_bytes() == b"precious"


def test_a_folder_called_part_is_somebody_elses(tmp_path):
    theirs = tmp_path / "frames.part" / "deep" / "a.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    with ImageSequenceWriter(tmp_path / "frames", 64, 48) as writer:
        writer.write(torch.rand(48, 64, 3))
    with pytest.raises(RuntimeError), ImageSequenceWriter(tmp_path / "frames", 64, 48, force=True):
        raise RuntimeError("stop")
    assert theirs.read_text() == "precious" and (tmp_path / "frames" / "frame_000000.png").is_file()


@needs_links
@pytest.mark.parametrize("name", ["o.mp4.part", "o.mp4.steadyvsr-0123abcd.part"])
def test_a_link_called_part_is_not_followed(tmp_path, name):
    theirs = tmp_path / "precious.txt"
    theirs.write_text("precious")
    (tmp_path / name).symlink_to(theirs)
    write_clip(tmp_path / "o.mp4")
    assert theirs.read_text() == "precious" and (tmp_path / name).is_symlink()


@needs_links
def test_a_link_to_nowhere_under_the_final_name_is_not_replaced(tmp_path):
    (tmp_path / "o.mp4").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError, match="already exists"):
        PartFile(tmp_path / "o.mp4")


def test_two_writers_of_one_name_do_not_touch_each_others_part(tmp_path):
    first = PartFile(tmp_path / "o.txt", force=True)
    first.file.write(b"first")
    second = PartFile(tmp_path / "o.txt", force=True)
    second.file.write(b"second, longer")
    assert first.commit().read_bytes() == b"first"
    assert second.commit().read_bytes() == b"second, longer"
    assert list(tmp_path.iterdir()) == [tmp_path / "o.txt"]


@needs_locks
@pytest.mark.parametrize("kind", [PartFile, PartFolder])
def test_a_part_that_nobody_holds_is_removed_by_the_next_run_for_its_name(tmp_path, kind):
    child = os.fork()  # its end releases the lock, as a kill does
    if child == 0:
        kind(tmp_path / "o")
        os._exit(0)
    os.waitpid(child, 0)
    held = kind(tmp_path / "other")
    assert len(list(tmp_path.iterdir())) == 2
    kind(tmp_path / "o").discard()
    assert list(tmp_path.iterdir()) == [held.part]
    held.discard()


def test_a_name_of_the_greatest_length_gets_a_part(tmp_path):
    path = tmp_path / ("ü" * 120 + ".txt")
    PartFile(path).commit()
    assert list(tmp_path.iterdir()) == [path]
