"""Downloading the released FlashVSR weights, only when asked to.

Where from: the authors' Hugging Face repositories (transformer, LQ projection, TC decoder; addresses and stated hashes
come from `huggingface_hub`, so HF_ENDPOINT is honoured), and the authors' GitHub repository for the prompt context
(4 MB), which their Hugging Face repositories lack. There are copies of it on Hugging Face in other forms, but only the
hash of the GitHub file is published.

The transfer is our own, because recent versions of `huggingface_hub` discard what has arrived when they are
interrupted: here a file grows as NAME.part, and the next call continues it. Downloads into one folder take turns.

What is trusted: a file is accepted when its size and sha256 are right. Those of v1.1 and of the prompt are in
`known_files.KNOWN_FILES`. No hashes of v1 are published: its files are compared with those that the hub states (git
LFS), which reveals damage on the way but not a changed repository. No token is sent. `.ckpt` and `.pth` files are
pickles; `load_flashvsr` reads them with weights_only=True, which runs no code in them.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib
import logging
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...known_files import KNOWN_FILES
from ...weight_file import file_sha256
from .parts import VERSIONS
from .sources import PROMPT_URL

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

REPOSITORIES = {"v1": "JunhaoZhuang/FlashVSR", "v1.1": "JunhaoZhuang/FlashVSR-v1.1"}
WEIGHTS = ("diffusion_pytorch_model_streaming_dmd.safetensors", "LQ_proj_in.ckpt", "TCDecoder.ckpt")
PROMPT = "posi_prompt.pth"

LOCK_NAME = ".steadyvsr-download.lock"
_WAIT_SECONDS = 0.2
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_PROMPT_REPOSITORY = "OpenImagingLab/FlashVSR"
_CONNECTIONS = 5
"""Attempts per file before giving up; each continues where the last one stopped."""
_PAUSE_SECONDS = 2
_TRANSIENT_STATUS = (408, 425, 429)
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO,
    errno.ELOOP,
)  # fmt: skip
_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20
_RESERVE_BYTES = 64 << 20
"""Space to leave free on the disk."""

log = logging.getLogger("steadyvsr.download")

Progress = Callable[[str, int, int], None]
"""(file name, bytes of the set that have arrived, bytes of the set). Called for every MiB; raise in it to cancel."""


class DownloadError(RuntimeError):
    """A file could not be fetched, or is not what it should be. The message says what to do about it."""


@dataclass(frozen=True)
class Wanted:
    """One file of the set.

    Attributes:
        sha256: None where nobody states one; then only the size is checked.
    """

    name: str
    url: str
    size_bytes: int
    sha256: str | None


def download_flashvsr(
    version: str,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    hub: Any = None,
    urlopen: Callable[..., Any] = urllib.request.urlopen,
) -> Path:
    """Makes `folder` a complete official checkpoint folder: transformer, projection, decoder and prompt (6.4 GB).

    Files that are already right are kept, wrong ones are replaced once the new ones are complete and right, and an
    interrupted call is continued by the next one.

    Args:
        version: v1 | v1.1.
        folder: created if needed. Files of the two versions have the same names: use a folder for each.
        hub: the `huggingface_hub` module (imported when needed) or a stand-in for it.
        urlopen: opens a `urllib.request.Request`.

    Returns:
        The folder, for `load_flashvsr(folder, version=version)`.

    Raises:
        ValueError: the version is unknown.
        DownloadError: no connection, a full disk, no `huggingface_hub`, a file that arrived damaged twice, or a folder
            that holds the other version.
    """
    if version not in VERSIONS:
        raise ValueError(f"download_flashvsr: expected version {' or '.join(VERSIONS)}; got {version!r}.")
    folder = Path(folder)
    hub = hub or _import_hub()
    (prompt,) = (known for known in KNOWN_FILES if known.name == f"{_PROMPT_REPOSITORY} {PROMPT}")
    wanted = [Wanted(PROMPT, PROMPT_URL, prompt.size_bytes, prompt.sha256), *_weights(hub, version)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            missing = [file for file in wanted if not _is_there(folder, file, hub, version)]
            _check_space(folder, missing)
            total = sum(file.size_bytes for file in wanted)
            done = total - sum(file.size_bytes for file in missing)
            for file in missing:

                def report(name: str, size: int, before: int = done) -> None:
                    if progress:
                        progress(name, before + size, total)

                _fetch(folder, file, urlopen, report)
                done += file.size_bytes
    except OSError as error:
        raise DownloadError(
            f"{folder}: expected a folder to write {version} to; {error}. Free space or choose another."
        ) from error
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other download into the folder is under way, and keeps others waiting. Can be interrupted."""
    path, said = folder / LOCK_NAME, False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o666)
        try:
            _lock(descriptor)
            # Whoever had it removed the file at the end: then this lock is that of a name that is gone.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except (BlockingIOError, PermissionError):
            if not said:
                log.info("%s: another download into this folder is under way; waiting for it.", folder)
            said = True
            time.sleep(_WAIT_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Locks an open file until it is closed or the process ends. Raises BlockingIOError or PermissionError if it is."""
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            log.warning("this file system has no locks (%s): start no second download into the folder.", error)


def _import_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise DownloadError(
            "download_flashvsr: expected the package huggingface_hub; it is not installed. Run "
            "`pip install huggingface_hub`, or fetch the files by hand from https://huggingface.co/JunhaoZhuang."
        ) from error


def _weights(hub: Any, version: str) -> list[Wanted]:
    repository = REPOSITORIES[version]
    known = {file.name: file for file in KNOWN_FILES}
    stated = {}
    if any(f"{repository} {name}" not in known for name in WEIGHTS):
        stated = _stated_by_hub(hub, repository)
    wanted = []
    for name in WEIGHTS:
        size_bytes, sha256 = stated.get(name, (0, None))
        if file := known.get(f"{repository} {name}"):
            size_bytes, sha256 = file.size_bytes, file.sha256
        if sha256 is None:
            log.warning(
                "%s: %s has no published sha256 and the hub states none: only its size is checked.", repository, name
            )
        wanted.append(Wanted(name, hub.hf_hub_url(repository, name), size_bytes, sha256))
    return wanted


def _stated_by_hub(hub: Any, repository: str) -> dict[str, tuple[int, str | None]]:
    """File name → size and LFS sha256, as the hub states them."""
    try:
        infos = hub.HfApi().get_paths_info(repository, list(WEIGHTS), token=False)
    except Exception as error:  # depending on its version, the client passes on errors of requests or httpx
        raise DownloadError(
            f"{repository}: expected the sizes and hashes of its files from the hub; {type(error).__name__}: {error}. "
            f"Try again later."
        ) from error
    stated = {info.path: (info.size, info.lfs.sha256 if info.lfs else None) for info in infos}
    absent = [name for name in WEIGHTS if name not in stated]
    if absent:
        raise DownloadError(f"{repository}: expected the files {', '.join(WEIGHTS)}; it has no {', '.join(absent)}.")
    return stated


def _is_there(folder: Path, file: Wanted, hub: Any, version: str) -> bool:
    """Whether the file is whole and right.

    Raises:
        DownloadError: it is the file of the other version.
    """
    path = folder / file.name
    if not path.is_file():
        return False
    if _is_file(path, file):
        return True
    (other,) = set(VERSIONS) - {version}
    if file.name in WEIGHTS and any(_is_file(path, of_other) for of_other in _weights(hub, other) if of_other.sha256):
        raise DownloadError(
            f"{path}: expected the file of {version}; it is that of {other}. Choose another folder for {version}."
        )
    log.warning("%s: incomplete, damaged or another file; it will be replaced.", path)
    return False


def _is_file(path: Path, file: Wanted) -> bool:
    return path.stat().st_size == file.size_bytes and file.sha256 in (None, file_sha256(path))


def _check_space(folder: Path, missing: list[Wanted]) -> None:
    arrived = [part.stat().st_size for file in missing if (part := _part_path(folder / file.name)).is_file()]
    needed = sum(file.size_bytes for file in missing) - sum(arrived)
    free = shutil.disk_usage(folder).free
    if missing and needed + _RESERVE_BYTES > free:
        raise DownloadError(
            f"{folder}: expected {needed / 1e9:.2f} GB of free space; got {free / 1e9:.2f} GB. Free space or choose "
            f"another folder."
        )


def _part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _fetch(folder: Path, file: Wanted, urlopen: Callable[..., Any], report: Callable[[str, int], object]) -> None:
    """Fetches one file, from where an earlier attempt stopped, and once more from the start if it arrives damaged."""
    path = folder / file.name
    part = _part_path(path)
    digest = None
    for _ in range(2):
        _transfer(file, part, urlopen, report)
        digest = file_sha256(part)
        if digest == (file.sha256 or digest):
            os.replace(part, path)
            return
        log.warning("%s: arrived with sha256 %s instead of %s; fetched again.", path, digest, file.sha256)
        part.unlink()
    raise DownloadError(
        f"{path}: expected sha256 {file.sha256}; got {digest}, twice. {file.url} holds another file, or something on "
        f"the way changes it. Try another network, or fetch it by hand."
    )


def _transfer(file: Wanted, part: Path, urlopen: Callable[..., Any], report: Callable[[str, int], object]) -> None:
    """Appends to `part` until it has the right size."""
    error: Exception | None = None
    for _ in range(_CONNECTIONS):
        error = None
        size_bytes = part.stat().st_size if part.is_file() else 0
        if size_bytes > file.size_bytes:
            part.unlink()
            size_bytes = 0
        if size_bytes == file.size_bytes:
            return
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={size_bytes}-"} if size_bytes else {})
        try:
            with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                # 200 instead of 206: a server that cannot continue sends the whole file.
                continued = response.status == 206 and size_bytes > 0
                _append(response, part, file, size_bytes if continued else 0, report)
        except urllib.error.HTTPError as caught:
            error = caught
            if caught.code < 500 and caught.code not in _TRANSIENT_STATUS:
                break
        except (OSError, http.client.HTTPException) as caught:
            if isinstance(caught, OSError) and caught.errno in _DISK_ERRORS:
                raise
            error = caught
        if error:
            log.warning("%s: the connection broke (%s).", file.url, error)
            time.sleep(_PAUSE_SECONDS)
    if not part.is_file() or part.stat().st_size != file.size_bytes:
        raise DownloadError(
            f"{file.url}: expected {file.size_bytes} bytes; got {part.stat().st_size if part.is_file() else 0}"
            f"{f' ({error})' if error else ''}. Try again: what has arrived is kept and continued."
        ) from error


def _append(response: Any, part: Path, file: Wanted, start: int, report: Callable[[str, int], object]) -> None:
    # A link called .part is somebody else's: it is not written through.
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINKS, 0o666), "ab") as out:
        out.truncate(start)
        size_bytes = start
        while size_bytes <= file.size_bytes and (chunk := response.read(_CHUNK_BYTES)):
            out.write(chunk)
            size_bytes += len(chunk)
            report(file.name, min(size_bytes, file.size_bytes))
