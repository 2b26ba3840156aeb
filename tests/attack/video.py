"""Attacks the way of a video through the pack with damaged files: all frames, a note or an error; never silence.

A clip goes from file to file as in a run, with nothing in the place of the engine, in a process of its own.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Generator
from functools import cache
from pathlib import Path

import av
import torch
from steadyvsr.app.clip import OutputOptions, footage_of, open_writer, write_footage
from steadyvsr.models.video import open_clip
from steadyvsr.tests.attack.clips import DAMAGES, FORMS, FRAMES, Damaged, good
from steadyvsr.tests.attack.outcome import Outcome, announce, failure_of, forget_peak, isolated, peak_bytes, unclear
from torch import Tensor

FACTOR = 2
"""A damaged clip may take so many times the memory of a good one."""
OUTPUT_BYTES = 4 << 20
"""Of the file that is written; a good one has 20 to 60 kB."""


class Said(logging.Handler):
    """What the pack logs: a warning is a note as well."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def through(path: Path, damaged: str) -> tuple[int, int, list[str]]:
    """Frames written, frames in the output file, and all that was said about the clip."""
    said = Said()
    logging.getLogger("steadyvsr").addHandler(said)
    footage = footage_of(open_clip(path, damaged=damaged))
    with tempfile.TemporaryDirectory() as folder:
        writer = open_writer(footage, Path(folder) / "out.mp4", 1.0, OutputOptions())
        output, damage = write_footage(footage, _as_they_are, writer)
        size = output.stat().st_size
        assert size <= OUTPUT_BYTES, f"an output of {size} bytes"
        with av.open(str(output)) as container:
            packets = sum(1 for packet in container.demux(video=0) if packet.size)
        notes = [*footage.notes, *getattr(writer, "notes", ()), *said.lines]
        return writer.frames_written, packets, [*notes, str(damage)] if damage else notes


def _as_they_are(frames: Generator[Tensor, None, None]) -> Generator[Tensor, None, None]:
    yield from frames


@cache
def customary(form: str) -> tuple[tuple[str, ...], int]:
    """Notes that a good clip of this form gets, and the memory that it takes."""
    found = isolated(_good, form)
    assert found.good, found
    return tuple(found.detail.split("\n")), found.grown_bytes


def _good(form: str) -> Outcome:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{FORMS[form].suffix}"
        path.write_bytes(good(form))
        before = forget_peak()
        written, packets, notes = through(path, "raise")
        grown = peak_bytes() - before
        return Outcome(form, "all frames", written == packets == FRAMES, "\n".join(notes), grown_bytes=grown)


def run(seed: int) -> Outcome:
    """One damaged clip."""
    rng = random.Random(seed)
    form = rng.choice(list(FORMS))
    damage = rng.choice(DAMAGES)(form, rng)
    return isolated(attack, form, damage, rng.choice(["raise", "raise", "raise", "keep"]), *customary(form))


def attack(form: str, damage: Damaged, damaged: str, usual_notes: tuple[str, ...], growth: int) -> Outcome:
    torch.set_num_threads(1)
    case = f"{form} ({damaged}): {damage.how}"
    announce(case)
    with tempfile.TemporaryDirectory() as folder:
        name = f"clip{FORMS[form].suffix}" if damage.name is None else os.fsdecode(damage.name)
        path = Path(folder) / name
        path.write_bytes(damage.content)
        before = forget_peak()
        end = ended(path, damage, damaged, usual_notes, case)
        grown = peak_bytes() - before
        if end.good and grown > FACTOR * (growth + len(damage.content)):
            figures = f"{grown >> 20} MiB; a good one takes {growth >> 20} MiB"
            end = Outcome(case, "too much memory", False, figures)
        return Outcome(end.case, end.end, end.good, end.detail, grown_bytes=grown)


def ended(path: Path, damage: Damaged, damaged: str, usual_notes: tuple[str, ...], case: str) -> Outcome:
    try:
        written, packets, notes = through(path, damaged)
    except AssertionError as error:
        return Outcome(case, "blow-up", False, str(error)) if "an output" in str(error) else failure_of(case, error)
    except (ValueError, OSError) as error:
        # FFmpeg's own errors are of these classes as well; ours are those that say what was expected.
        message = str(error)
        if "expected" not in message:
            return failure_of(case, error)
        problem = unclear(message) or ("refuses a whole clip" if damage.whole else "")
        return Outcome(case, problem or "error", not problem, message[:300])
    except BaseException as error:  # noqa: B036  whatever it is, it is the finding
        return failure_of(case, error)
    fresh = [note for note in notes if note not in usual_notes]
    if problem := next((unclear(note) for note in fresh if unclear(note)), ""):
        return Outcome(case, problem, False, repr(fresh[0])[:300])
    if written != packets:
        return Outcome(case, "frames lost in the file", False, f"{written} written, {packets} in the file")
    if written >= damage.frames:
        return Outcome(case, "all frames", True)
    detail = f"{written} of {damage.frames} frames"
    return Outcome(case, "note", True, detail) if fresh else Outcome(case, "silence", False, detail)
