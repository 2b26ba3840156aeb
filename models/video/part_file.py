"""A file that gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class PartFile:
    """`NAME.part` beside NAME, open for writing: `commit` renames it to NAME, `discard` removes it.

    A killed process leaves the .part behind and NAME as it was; the next run for NAME overwrites the .part.

    Raises:
        FileExistsError: NAME exists, without `force`.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: str | Path, force: bool = False):
        self.path = Path(path)
        self.force = force
        refuse_existing(self.path, force)
        expect_folder(self.path)
        self.part = self.path.with_name(self.path.name + ".part")
        with explained(self.path):
            self.file = open(self.part, "wb")  # noqa: SIM115 - closed by commit and discard

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
        """Removes the .part and leaves NAME as it was."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self.file.close()
        self.part.unlink(missing_ok=True)


def refuse_existing(path: Path, force: bool) -> None:
    if path.is_dir():
        raise FileExistsError(f"{path}: expected a file name; got a folder.")
    if path.exists() and not force:
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
