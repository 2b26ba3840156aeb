"""What an attack ends in, and how one is run so that it can neither hang, fill the memory nor spoil the next one.

Every attacker is a module with `run(seed) -> Outcome`: the seed says everything about the attack, so a failing one is
kept by its number.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LIMIT_SECONDS, PATIENCE = 10.0, 12
"""Of the processor, for one attack in a process of its own; by the clock so many times as much, as the machine may have
other work."""
POLL_SECONDS = 0.2
ADDRESS_SPACE = 6 << 30
"""Bytes that an attack may ask the system for, so that a blow-up is an error here and not the end of the machine."""
MESSAGE_CHARACTERS, MESSAGE_LINES = 3000, 16
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Outcome:
    """How one attack ended.

    Attributes:
        case: what was attacked and how, in words; the same for the same seed.
        end: how it ended, in a word or two; failures of one cause have one end.
        good: whether it may end so.
        detail: the message or the traceback.
        seconds: of the processor where it had a process of its own, else by the clock.
        grown_bytes: peak resident memory above that before the attack; 0 where it is not measured.
        units: how many of the things that are counted it was: kills of a night, steps of a state machine.
    """

    case: str
    end: str
    good: bool
    detail: str = ""
    seconds: float = 0.0
    grown_bytes: int = 0
    units: int = 1


def failure_of(case: str, error: BaseException, end: str = "traceback") -> Outcome:
    """An error that no user should see, told by its type and the place in the package that it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/attack/" not in frame.filename]
    ours = [f for f in frames if "steadyvsr" in f.filename and "/tests/" not in f.filename] or frames[-1:]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
    return Outcome(case, f"{end}: {type(error).__name__} in {place}", False, f"{error!s:.300}")


def unclear(message: str) -> str:
    """What makes a message unfit for a terminal; "" if nothing does."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return "a lone surrogate in the message"
    if _UNPRINTABLE.search(message):
        return "control characters in the message"
    if len(message) > MESSAGE_CHARACTERS or message.count("\n") >= MESSAGE_LINES:
        return "an endless message"
    return "no message" if not message.strip() else ""


def status_bytes(field: str) -> int:
    """A line of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """Begins to measure the peak of this process again; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    """Highest resident memory of this process since `forget_peak`."""
    return status_bytes("VmHWM")


_announced: list[int] = []


def announce(case: str) -> None:
    """Tells `isolated` what is about to be attacked, for an attack that never comes to an end."""
    for pipe in _announced:
        os.write(pipe, pickle.dumps(case))


def isolated(attack: Callable[..., Outcome], *arguments: Any, limit: float = LIMIT_SECONDS) -> Outcome:
    """What `attack(*arguments)` returns in a child of this process, which is killed after `limit` seconds of work.

    What comes before `announce` does not count. The child is a fork: this process must have no other threads that hold
    locks, and torch must run on one thread.
    """
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        _answer(attack, arguments, writing)
    os.close(writing)
    received, prepared, over = b"", None, False
    while not over:
        if select.select([reading], [], [], POLL_SECONDS)[0]:
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                break
            received += chunk
            prepared = _worked_seconds(child) if prepared is None else prepared
        else:
            worked = _worked_seconds(child) - (prepared or 0)
            over = worked > limit or time.monotonic() - started > PATIENCE * limit
    os.close(reading)
    if over:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime - (prepared or 0)
    case, told = attack.__module__, io.BytesIO(received)
    while told.tell() < len(received):
        message = pickle.load(told)
        if isinstance(message, Outcome):
            return replace(message, seconds=seconds)
        case = message
    if over:
        return Outcome(case, "hangs", False, f"not done after {limit:g} s of work", seconds)
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    return Outcome(case, f"dies: {how}", False, "", seconds)


def _worked_seconds(process: int) -> float:
    """Seconds that a process has used of a processor."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _answer(attack: Callable[..., Outcome], arguments: tuple, writing: int) -> None:
    """The child's whole life."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _announced.append(writing)
    try:
        outcome = attack(*arguments)
    except BaseException as error:  # noqa: B036  an attack's own fault is told as well
        outcome = failure_of(attack.__module__, error, "attacker")
    data = pickle.dumps(outcome)
    while data:
        data = data[os.write(writing, data) :]
    os._exit(0)
