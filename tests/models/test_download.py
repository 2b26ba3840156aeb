"""Downloads: complete, continued, checked, and never more than asked for. No test touches a network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from steadyvsr.models import known_files
from steadyvsr.models.flashvsr.checkpoint import download
from steadyvsr.models.flashvsr.checkpoint.download import (
    PROMPT,
    REPOSITORIES,
    WEIGHTS,
    DownloadError,
    download_flashvsr,
)
from steadyvsr.models.flashvsr.checkpoint.sources import PROMPT_URL
from steadyvsr.models.known_files import KnownFile
from steadyvsr.models.weight_file import CheckpointError, WeightFile

CHUNK = 64


def content(name: str, version: str) -> bytes:
    return hashlib.shake_256(f"{name} {version}".encode()).digest(300 + len(name))


class Web:
    """The hub and GitHub in memory: serves ranges, and misbehaves on request."""

    def __init__(self) -> None:
        self.files = {
            self.hf_hub_url(repo, name): content(name, v) for v, repo in REPOSITORIES.items() for name in WEIGHTS
        }
        self.files[PROMPT_URL] = content(PROMPT, "any")
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        self.ranges = True
        self.corrupt = 0
        self.stated = True

    def hf_hub_url(self, repository: str, name: str) -> str:
        return f"https://hub.test/{repository}/resolve/main/{name}"

    def HfApi(self):  # noqa: N802 (huggingface_hub's name)
        return self

    def get_paths_info(self, repository: str, paths: list[str], *, token: bool):
        assert token is False
        found = []
        for name in paths:
            data = self.files.get(self.hf_hub_url(repository, name))
            if data is not None:
                lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if self.stated else None
                found.append(SimpleNamespace(path=name, size=len(data), lfs=lfs))
        return found

    def urlopen(self, request, timeout):
        start = request.get_header("Range")
        self.requests.append((request.full_url, start))
        data = self.files.get(request.full_url)
        if data is None:
            raise urllib.error.HTTPError(request.full_url, 404, "Not Found", {}, None)
        offset = int(start.removeprefix("bytes=").removesuffix("-")) if start and self.ranges else 0
        body = bytearray(data[offset:])
        if self.corrupt:
            self.corrupt -= 1
            body[-1] ^= 1
        return Response(bytes(body), 206 if offset else 200, self)


class Response(io.BytesIO):
    def __init__(self, body: bytes, status: int, web: Web) -> None:
        super().__init__(body)
        self.status, self.web = status, web

    def read(self, size: int = -1) -> bytes:
        if self.web.break_after is not None and self.tell() >= self.web.break_after:
            raise ConnectionResetError("reset")
        return super().read(size)


@pytest.fixture
def web(monkeypatch) -> Web:
    web = Web()
    known = [
        KnownFile(
            f"{REPOSITORIES['v1.1']} {name}", hashlib.sha256(content(name, "v1.1")).hexdigest(), 300 + len(name), "v1.1"
        )
        for name in WEIGHTS
    ]
    prompt = hashlib.sha256(content(PROMPT, "any")).hexdigest()
    known.append(KnownFile(f"OpenImagingLab/FlashVSR {PROMPT}", prompt, 300 + len(PROMPT), None))
    monkeypatch.setattr(download, "KNOWN_FILES", tuple(known))
    monkeypatch.setattr(download, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(download, "_RESERVE_BYTES", 0)
    return web


def run(web: Web, version: str, folder: Path, **more) -> Path:
    return download_flashvsr(version, folder, hub=web, urlopen=web.urlopen, **more)


def assert_complete(folder: Path, version: str) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted([*WEIGHTS, PROMPT])
    for name in WEIGHTS:
        assert (folder / name).read_bytes() == content(name, version)
    assert (folder / PROMPT).read_bytes() == content(PROMPT, "any")


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_a_new_folder_becomes_complete(web, tmp_path, version):
    assert_complete(run(web, version, tmp_path / "new" / "folder"), version)


def test_what_is_there_is_not_fetched_again(web, tmp_path):
    run(web, "v1.1", tmp_path)
    web.requests.clear()
    run(web, "v1.1", tmp_path)
    assert web.requests == []


def test_an_interrupted_file_is_continued_where_it_stopped(web, tmp_path):
    def cancel(name, done, total):
        if name == WEIGHTS[0] and done >= 300 + len(PROMPT) + 2 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(web, "v1.1", tmp_path, progress=cancel)
    assert (tmp_path / f"{WEIGHTS[0]}.part").stat().st_size == 2 * CHUNK and not (tmp_path / WEIGHTS[0]).exists()
    web.requests.clear()
    assert_complete(run(web, "v1.1", tmp_path), "v1.1")
    assert web.requests[0] == (web.hf_hub_url(REPOSITORIES["v1.1"], WEIGHTS[0]), f"bytes={2 * CHUNK}-")


def test_broken_connections_are_continued_within_one_call(web, tmp_path):
    web.break_after = 2 * CHUNK
    assert_complete(run(web, "v1.1", tmp_path), "v1.1")
    assert sum(start is not None for _, start in web.requests) > len(WEIGHTS)


def test_a_connection_that_never_works_keeps_what_arrived(web, tmp_path):
    web.break_after = 0
    with pytest.raises(DownloadError, match=r"posi_prompt\.pth: expected 315 bytes; got 0 \(reset\).*Try again"):
        run(web, "v1.1", tmp_path)


def test_a_server_without_ranges_sends_the_file_from_the_start(web, tmp_path):
    (tmp_path / f"{WEIGHTS[0]}.part").write_bytes(content(WEIGHTS[0], "v1.1")[:100])
    web.ranges = False
    assert_complete(run(web, "v1.1", tmp_path), "v1.1")
    assert len(web.requests) == len(WEIGHTS) + 1


@pytest.mark.parametrize("spoilt", [b"", b"short", b"x" * 1000, "flipped"])
@pytest.mark.parametrize("where", ["file", "part"])
def test_spoilt_files_are_replaced(web, tmp_path, where, spoilt):
    name = WEIGHTS[1]
    if spoilt == "flipped":
        good = content(name, "v1.1")
        spoilt = good[:-1] + bytes([good[-1] ^ 1])
    (tmp_path / (name if where == "file" else f"{name}.part")).write_bytes(spoilt)
    assert_complete(run(web, "v1.1", tmp_path), "v1.1")


def test_a_file_that_arrives_damaged_is_fetched_once_more(web, tmp_path):
    web.corrupt = 1
    assert_complete(run(web, "v1.1", tmp_path), "v1.1")
    assert [url for url, _ in web.requests].count(PROMPT_URL) == 2


def test_a_file_that_stays_wrong_is_an_error_and_is_not_left_there(web, tmp_path):
    web.files[PROMPT_URL] = content(PROMPT, "another")
    with pytest.raises(DownloadError, match=r"posi_prompt\.pth: expected sha256 .*; got .*, twice"):
        run(web, "v1.1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_stays_until_the_right_one_is_complete(web, tmp_path):
    (tmp_path / WEIGHTS[0]).write_bytes(b"mine")
    del web.files[web.hf_hub_url(REPOSITORIES["v1.1"], WEIGHTS[0])]
    with pytest.raises(DownloadError, match="404"):
        run(web, "v1.1", tmp_path)
    assert (tmp_path / WEIGHTS[0]).read_bytes() == b"mine"


@pytest.mark.parametrize(("there", "wanted"), [("v1", "v1.1"), ("v1.1", "v1")])
def test_the_other_version_is_never_overwritten(web, tmp_path, there, wanted):
    run(web, there, tmp_path)
    with pytest.raises(DownloadError, match=f"expected the file of {wanted}; it is that of {there}"):
        run(web, wanted, tmp_path)
    assert_complete(tmp_path, there)


def test_v1_is_checked_against_what_the_hub_states(web, tmp_path):
    stated = web.get_paths_info
    web.get_paths_info = lambda *args, **more: [
        SimpleNamespace(path=info.path, size=info.size, lfs=SimpleNamespace(sha256="0" * 64))
        for info in stated(*args, **more)
    ]
    with pytest.raises(DownloadError, match=f"expected sha256 {'0' * 64}"):
        run(web, "v1", tmp_path)


def test_an_unchecked_file_is_warned_of(web, tmp_path, caplog):
    web.stated = False
    assert_complete(run(web, "v1", tmp_path), "v1")
    assert "only its size is checked" in caplog.text


def test_progress_grows_to_the_total_and_counts_what_is_there(web, tmp_path):
    run(web, "v1.1", tmp_path)
    (tmp_path / WEIGHTS[2]).unlink()
    calls = []
    run(web, "v1.1", tmp_path, progress=lambda *call: calls.append(call))
    total = sum(300 + len(name) for name in (*WEIGHTS, PROMPT))
    assert {name for name, _, _ in calls} == {WEIGHTS[2]} and {call[2] for call in calls} == {total}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls) and calls[-1][1] == total
    assert calls[0][1] == total - 300 - len(WEIGHTS[2]) + CHUNK


def test_a_full_disk_is_said_before_anything_is_fetched(web, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DownloadError, match="free space"):
        run(web, "v1.1", tmp_path)
    assert web.requests == []


def test_a_folder_that_cannot_be_made_is_named(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="file.*expected a folder"):
        run(web, "v1.1", tmp_path / "file" / "sub")


def test_a_hub_out_of_reach_is_one_clear_error(web, tmp_path):
    def unreachable(*args, **more):
        raise ConnectionError("no route")

    web.get_paths_info = unreachable
    with pytest.raises(DownloadError, match=r"JunhaoZhuang/FlashVSR: .*no route"):
        run(web, "v1", tmp_path)


def test_without_huggingface_hub_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="pip install huggingface_hub"):
        download_flashvsr("v1.1", tmp_path)


def test_an_unknown_version_is_refused(web, tmp_path):
    with pytest.raises(ValueError, match="v1 or v1.1"):
        run(web, "v2", tmp_path)


def test_every_file_of_v1_1_and_the_prompt_have_a_published_hash():
    known = {file.name: file for file in known_files.KNOWN_FILES}
    for name in [*(f"{REPOSITORIES['v1.1']} {name}" for name in WEIGHTS), f"OpenImagingLab/FlashVSR {PROMPT}"]:
        assert len(known[name].sha256) == 64 and known[name].size_slack_bytes == 0


def test_importing_the_package_imports_no_hub_and_opens_no_connection(package_environment, tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('connection')\n"
        "socket.socket.connect = refuse\n"
        "import steadyvsr.models.flashvsr.checkpoint.download\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=package_environment, cwd=tmp_path)


def test_two_downloads_into_one_folder_wait_for_each_other(web, tmp_path, caplog):
    caplog.set_level("INFO")
    at_once, most = 0, 0
    opened = web.urlopen

    def slowly(request, timeout):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return opened(request, timeout)

    web.urlopen = slowly
    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(run, web, "v1.1", tmp_path) for _ in range(2)]:
            result.result()
    assert most == 1 and len(web.requests) == len(WEIGHTS) + 1
    assert_complete(tmp_path, "v1.1")
    assert "another download" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right that users lack there")
@pytest.mark.parametrize("name", [f"{WEIGHTS[0]}.part", download.LOCK_NAME])
def test_a_link_in_the_folder_is_not_followed(web, tmp_path, name):
    theirs = tmp_path / "precious.txt"
    theirs.write_text("precious")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / name).symlink_to(theirs)
    with pytest.raises(DownloadError, match="expected a folder to write v1.1 to"):
        run(web, "v1.1", folder)
    assert theirs.read_text() == "precious"


@pytest.mark.parametrize("name", [*WEIGHTS, PROMPT])
def test_a_published_file_with_another_hash_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    data = content(name, "v1.1")
    known = KnownFile(f"JunhaoZhuang/FlashVSR-v1.1 {name}", hashlib.sha256(data).hexdigest(), len(data), None)
    monkeypatch.setattr(known_files, "KNOWN_FILES", (known,))
    (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    file = WeightFile(tmp_path / name, len(data), "pickle", {}, {})
    with pytest.raises(CheckpointError, match=f"expected the published {known.name} with sha256"):
        known_files.refuse_altered(file, "v1")
