"""Files and folders that get their names only when they are complete.

While NAME grows it is `NAME.steadyvsr-XXXXXXXX.part` beside it: a new name of its own for every run, made exclusively,
so whatever else is there, called `.part` or not, stays as it is. A killed process leaves its part behind; the next run
for NAME removes it. It knows that nobody writes it any more by the lock that a living process holds (on POSIX; Windows
leaves such parts to the user).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PART = re.compile(r"\.steadyvsr-[0-9a-f]{8}\.part")
_NAME_BYTES = 255 - len(".steadyvsr-01234567.part")
"""Of NAME that go into the part's name: file systems allow 255 in all."""


class PartFile:
    """A part open for writing as `file`: `commit` renames it to NAME, `discard` removes it.

        part = PartFile("report.json")
        part.file.write(b"{}")
        part.commit()

    Raises:
        FileExistsError: NAME exists, without `force`.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: str | Path, force: bool = False):
        self.path = Path(path)
        self.force = force
        refuse_existing(self.path, force)
        expect_folder(self.path)
        with explained(self.path):
            self.part = _new_name(self.path)
            # "x" follows no link and opens no existing file.
            self.file = open(self.part, "xb")  # noqa: SIM115 - closed by commit and discard
            while not _locked(self.file.fileno()):
                self.file.close()
                self.file = open(self.part, "xb")  # noqa: SIM115

    def commit(self, to: str | Path | None = None) -> Path:
        """Writes everything to the disk and renames it to NAME, or to the name `to`. Returns the final path."""
        target = self.path if to is None else Path(to)
        with explained(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        refuse_existing(target, self.force)
        with explained(target):
            os.replace(self.part, target)
        return target

    def discard(self) -> None:
        """Removes the part and leaves NAME as it was."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        self.part.unlink(missing_ok=True)


class PartFolder:
    """The same for a folder, to be filled by the caller under its path `part`.

    An existing folder NAME is refused without `force` unless it is empty; with `force`, files of the same names are
    replaced and others stay.
    """

    def __init__(self, path: str | Path, force: bool = False):
        self.path = Path(path)
        self.force = force
        self._refuse_existing(self.path)
        expect_folder(self.path)
        self._descriptor = None
        with explained(self.path):
            self.part = _new_name(self.path)
            self.part.mkdir()
            if sys.platform != "win32":
                self._descriptor = os.open(self.part, os.O_RDONLY)
                while not _locked(self._descriptor):
                    os.close(self._descriptor)
                    self.part.mkdir()
                    self._descriptor = os.open(self.part, os.O_RDONLY)

    def commit(self, to: str | Path | None = None) -> Path:
        """Gives the folder its name, or the name `to`. Returns the final path."""
        target = self.path if to is None else Path(to)
        self._refuse_existing(target)
        with explained(target):
            if target.is_dir():
                for file in sorted(self.part.iterdir()):
                    os.replace(file, target / file.name)
                self.part.rmdir()
            else:
                self.part.rename(target)
        self._unlock()
        return target

    def discard(self) -> None:
        """Removes the part and leaves NAME as it was."""
        shutil.rmtree(self.part, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _refuse_existing(self, path: Path) -> None:
        if not (path.is_dir() and (self.force or not any(path.iterdir()))):
            _refuse_name(path)


def refuse_existing(path: Path, force: bool) -> None:
    """Raises FileExistsError if there is something called `path`, with `force` only if it is a folder."""
    if path.is_dir():
        raise FileExistsError(f"{path}: expected a file name; got a folder.")
    if not force:
        _refuse_name(path)


def _refuse_name(path: Path) -> None:
    if os.path.lexists(path):  # a link to nowhere counts: it is somebody's
        raise FileExistsError(f"{path}: already exists. Choose another name, or ask for overwriting (--force).")


def expect_folder(path: Path) -> None:
    """Raises FileNotFoundError unless the folder that `path` is to be in exists."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder to write into; {path.parent} is none.")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises errors of the file system with the output's name, and says that nothing was changed."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno, f"{path}: could not be written: {reason}. Nothing under that name was changed."
        ) from error


def _new_name(path: Path) -> Path:
    """A name for a part of `path` that is not taken, after the parts of killed runs are gone."""
    start = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    with contextlib.suppress(OSError):  # a folder that cannot be listed may still be written to
        for entry in os.scandir(path.parent):
            if entry.name.startswith(start) and _PART.fullmatch(entry.name[len(start) :]):
                _remove_if_abandoned(Path(entry.path))
    return path.with_name(f"{start}.steadyvsr-{secrets.token_hex(4)}.part")


def _locked(descriptor: int) -> bool:
    """Locks a new part; False if another run took it for an abandoned one before that and removed it."""
    if sys.platform == "win32":
        return True
    with contextlib.suppress(OSError):  # a file system without locks: its abandoned parts stay
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_nlink > 0


def _remove_if_abandoned(part: Path) -> None:
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        finally:
            os.close(descriptor)
