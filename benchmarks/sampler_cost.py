"""What the open memory panel costs: CPU time of the sampler's thread, and of the whole server, open and closed.

    python -m steadyvsr.benchmarks.sampler_cost --comfyui PATH [--seconds 60] [--json FILE]     by ComfyUI's Python

Starts ComfyUI on the CPU with this pack alone, asks for the push as an open panel does, listens to it for that long,
closes, and waits as long again. The thread's time is its own clock (`time.thread_time`), and beside it what the
system counts for it in /proc; the server's is user and system time of the process (building and sending the message
included). Exit status 1 above 1 % of one core open, above 0 closed, or above 60 kB of scripts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SHARE, LIMIT_SCRIPT_BYTES, LIMIT_PUSHES_PER_SECOND = 0.01, 60_000, 2.0
START_SECONDS, SETTLE_SECONDS = 120, 5
CLIENT = "sampler-cost"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(comfyui: Path, base: Path, port: int) -> subprocess.Popen:
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "steadyvsr").symlink_to(ROOT, target_is_directory=True)
    options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    command = [sys.executable, "main.py", *options, "--database-url", "sqlite:///:memory:"]
    with (base / "server.log").open("w") as log:
        return subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log)


async def answering(session: Any, process: subprocess.Popen, base: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            async with session.get("/system_stats"):
                return
        except OSError:
            await asyncio.sleep(0.3)
    raise SystemExit(f"{base}: expected a ComfyUI that starts; got:\n{(base / 'server.log').read_text()[-2000:]}")


def spent(process: psutil.Process) -> tuple[float, dict[int, float]]:
    """Seconds of one core so far: of the whole process, and of each of its threads."""
    times = process.cpu_times()
    return times.user + times.system, {t.id: t.user_time + t.system_time for t in process.threads()}


async def figures(session: Any) -> dict[str, Any]:
    async with session.get("/steadyvsr/state") as answer:
        return (await answer.json())["push"]


async def watch(session: Any, wanted: bool) -> None:
    async with session.post("/steadyvsr/watch", json={"client": CLIENT, "open": wanted}) as answer:
        answer.raise_for_status()


async def ended(session: Any) -> dict[str, Any]:
    """What the sampler tells once its thread is gone."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := await figures(session))["running"]:
        if time.monotonic() > deadline:
            raise SystemExit("the sampler: expected its end after the panel closed; it runs on.")
        await asyncio.sleep(0.2)
    return now


async def received(listener: Any, seconds: float) -> list[int]:
    """Bytes of each state that is pushed in that time."""
    sizes, deadline = [], time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            message = await listener.receive(timeout=left)
        except asyncio.TimeoutError:
            break
        if isinstance(message.data, str) and json.loads(message.data)["type"] == "steadyvsr.state":
            sizes.append(len(message.data))
    return sizes


async def measure(port: int, process: subprocess.Popen, base: Path, seconds: float) -> dict[str, Any]:
    import aiohttp  # in ComfyUI's environment, not needed to read --help

    server = psutil.Process(process.pid)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        await answering(session, process, base)
        async with session.ws_connect(f"/ws?clientId={CLIENT}") as listener:
            await asyncio.sleep(SETTLE_SECONDS)
            before = await figures(session)
            threads_before = set(spent(server)[1])
            await watch(session, True)
            began, (whole, _) = time.monotonic(), spent(server)
            sizes = await received(listener, seconds)
            whole_open, threads = spent(server)
            open_seconds = time.monotonic() - began
            await watch(session, False)
            after = await ended(session)
            gone = (threads.keys() - threads_before) - set(spent(server)[1])
            began, (whole, rest) = time.monotonic(), (spent(server)[0], whole)
            await asyncio.sleep(seconds)
            closed = await figures(session)
            whole_closed, closed_seconds = spent(server)[0] - whole, time.monotonic() - began
    return {
        "open": {
            "seconds": after["seconds"] - before["seconds"],
            "pushes": len(sizes),
            "pushed_bytes": max(sizes, default=0),
            "thread_cpu_seconds": after["cpu_seconds"] - before["cpu_seconds"],
            "thread_cpu_seconds_by_system": sum(threads[id] for id in gone),
            "thread_share": (after["cpu_seconds"] - before["cpu_seconds"]) / (after["seconds"] - before["seconds"]),
            "server_share": (whole_open - rest) / open_seconds,
        },
        "closed": {
            "seconds": closed_seconds,
            "running": closed["running"],
            "thread_cpu_seconds": closed["cpu_seconds"] - after["cpu_seconds"],
            "pushes": closed["pushes"] - after["pushes"],
            "server_share": whole_closed / closed_seconds,
        },
    }


def version_of(comfyui: Path) -> str:
    found = re.search(r'"([^"]+)"', (comfyui / "comfyui_version.py").read_text())
    if found is None:
        raise SystemExit(f"{comfyui}: expected a ComfyUI checkout with a version; got none. Give its folder.")
    return found[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    comfyui, port = options.comfyui.resolve(), free_port()
    version = version_of(comfyui)
    with tempfile.TemporaryDirectory() as folder:
        process = start(comfyui, Path(folder), port)
        try:
            found = asyncio.run(measure(port, process, Path(folder), options.seconds))
        finally:
            process.terminate()
            process.wait(30)
    scripts = {str(path.relative_to(ROOT)): path.stat().st_size for path in sorted((ROOT / "web").rglob("*.js"))}
    shown, quiet = found["open"], found["closed"]
    print(
        f"open {shown['seconds']:.1f} s: {shown['pushes']} pushes, thread {shown['thread_cpu_seconds']:.3f} s "
        f"({100 * shown['thread_share']:.2f} % of a core; the system counts "
        f"{shown['thread_cpu_seconds_by_system']:.2f} s), server {100 * shown['server_share']:.2f} %"
    )
    print(
        f"closed {quiet['seconds']:.1f} s: {quiet['pushes']} pushes, thread {quiet['thread_cpu_seconds']:.3f} s, "
        f"running {quiet['running']}, server {100 * quiet['server_share']:.2f} %"
    )
    print(f"scripts: {sum(scripts.values()):,} bytes in {len(scripts)} files")
    if options.json:
        place = {"comfyui": version, "python": platform.python_version(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**place, **found, "script_bytes": scripts}, indent=1) + "\n")
    good = (
        0 < shown["thread_share"] <= LIMIT_SHARE
        and 0 < shown["pushes"] <= LIMIT_PUSHES_PER_SECOND * shown["seconds"]
        and (quiet["running"], quiet["thread_cpu_seconds"], quiet["pushes"]) == (False, 0, 0)
        and sum(scripts.values()) <= LIMIT_SCRIPT_BYTES
    )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
