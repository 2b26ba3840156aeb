"""One run per output folder, and the places where its clips grow until they are complete."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

from .jobs import PLACE

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FILE = ".steadyvsr.lock"


class FolderLock:
    """Held by the one run that writes into a folder. The system drops it when the process ends, however that happens.

        with FolderLock(output) as lock:
            place = lock.make_place(output / "clips")

    The file of the lock lists the places in which clips grow, one path a line, so that the next run removes what a
    killed one left. It removes nothing else.

    Raises:
        ValueError: another run holds the lock; the message names its process.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / FILE
        self._file = self._acquire()
        self._remove_places()
        os.ftruncate(self._file, 0)
        self._write(f"{os.getpid()}\n")

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def make_place(self, folder: Path) -> Path:
        """A new, empty folder inside `folder`, which no other process uses; on the same disk, so that what grows in it
        can be renamed to its final name."""
        while True:
            place = folder / f"{PLACE}{os.urandom(6).hex()}"
            # Listed before it exists: a run that is killed in between leaves a line too many, never a folder too many.
            self._write(f"{os.fsencode(os.path.relpath(place, self.folder)).hex()}\n")
            with suppress(FileExistsError):
                place.mkdir()
                return place

    def remove_place(self, place: Path) -> None:
        """Removes a place and what grew in it."""
        shutil.rmtree(place, ignore_errors=True)

    def release(self) -> None:
        """Removes the places and the lock's file, and lets the next run in."""
        self._remove_places()
        # Removed while it is held: whoever opened it before finds, once it holds the lock, that the name is gone.
        with suppress(OSError):  # Windows removes no open file; an empty one stays, and does no harm
            self.path.unlink()
        os.close(self._file)

    def _acquire(self) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            file = os.open(self.path, flags, 0o644)
            try:
                _lock(file)
                if _same(self.path, file):
                    return file
            except BlockingIOError:
                holder = _read(file).split("\n", 1)[0]
                os.close(file)
                raise ValueError(
                    f"{self.folder}: expected a folder that no other run writes into; got one in which process"
                    f" {holder or 'unknown'} is at work. Wait for it to end, or choose another OUT."
                ) from None
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _write(self, line: str) -> None:
        os.lseek(self._file, 0, os.SEEK_END)
        os.write(self._file, line.encode())

    def _remove_places(self) -> None:
        for line in _read(self._file).splitlines()[1:]:
            with suppress(ValueError, OSError):
                place = Path(os.fsdecode(bytes.fromhex(line)))
                # The list is only a file: whatever it names, nothing is removed but what this program makes.
                inside = not place.is_absolute() and ".." not in place.parts and place.name.startswith(PLACE)
                if inside and stat.S_ISDIR((self.folder / place).lstat().st_mode):
                    shutil.rmtree(self.folder / place, ignore_errors=True)


def _lock(file: int) -> None:
    """Raises BlockingIOError if another process holds it."""
    if sys.platform == "win32":
        try:
            # One byte far behind the text: a locked byte could not be read by the run that is refused.
            os.lseek(file, 1 << 30, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # a file system without locks: two runs at once are then the user's care, as docs/folders.md says


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _read(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, os.fstat(file).st_size).decode(errors="replace")
