"""What the open memory panel costs: CPU time of the sampler's thread, and of the whole server, open and closed.

    python -m steadyvsr.benchmarks.sampler_cost --comfyui PATH [--python INTERPRETER] [--seconds 60] [--json FILE]

Starts ComfyUI on the CPU with this pack alone, subscribes to updates as an open panel does, listens for that long,
unsubscribes, and waits as long again. The thread's time comes from its own clock (`time.thread_time`) and from what the
system counts for it in /proc; the server's is the user and system time of the process (building and sending the
message included). Exit status 1 above 1 % of one core open, above 0 closed, or above 60 kB of scripts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import psutil
from steadyvsr.benchmarks import frame

LIMIT_SHARE, LIMIT_SCRIPT_BYTES, LIMIT_PUSHES_PER_SECOND = 0.01, 60_000, 2.0
SETTLE_SECONDS = 5
CLIENT = "sampler-cost"


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
    """The sampler's figures once its thread is gone."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := await figures(session))["running"]:
        if time.monotonic() > deadline:
            raise SystemExit("the sampler: expected its end after the panel closed; it is still running.")
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


async def measure(url: str, pid: int, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures with an open panel, and after it was closed."""
    import aiohttp  # comes with ComfyUI; --help does not need it

    server = psutil.Process(pid)
    async with aiohttp.ClientSession(url) as session, session.ws_connect(f"/ws?clientId={CLIENT}") as listener:
        await asyncio.sleep(SETTLE_SECONDS)
        before, (whole, threads_before) = await figures(session), spent(server)
        began = time.monotonic()
        await watch(session, True)
        sizes = await received(listener, seconds)
        (whole_open, threads), open_seconds = spent(server), time.monotonic() - began
        await watch(session, False)
        after = await ended(session)
        whole_ended, threads_ended = spent(server)
        gone = threads.keys() - threads_before.keys() - threads_ended.keys()
        began = time.monotonic()
        await asyncio.sleep(seconds)
        closed = await figures(session)
        whole_closed, closed_seconds = spent(server)[0], time.monotonic() - began
    ran, cpu = (after[name] - before[name] for name in ("seconds", "cpu_seconds"))
    return {
        "seconds": ran,
        "pushes": len(sizes),
        "pushed_bytes": max(sizes, default=0),
        "thread_cpu_seconds": cpu,
        "thread_cpu_seconds_by_system": sum(threads[thread] for thread in gone),
        "thread_share": cpu / ran,
        "server_share": (whole_open - whole) / open_seconds,
    }, {
        "seconds": closed_seconds,
        "running": closed["running"],
        "thread_cpu_seconds": closed["cpu_seconds"] - after["cpu_seconds"],
        "pushes": closed["pushes"] - after["pushes"],
        "server_share": (whole_closed - whole_ended) / closed_seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = frame.comfyui_parser(__doc__, of_its_own=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(arguments)
    version = frame.version_of(options.comfyui)
    with frame.server(options.comfyui, options.python) as (url, pid):
        shown, quiet = asyncio.run(measure(url, pid, options.seconds))
    scripts = {str(p.relative_to(frame.ROOT)): p.stat().st_size for p in sorted((frame.ROOT / "web").rglob("*.js"))}
    print(
        f"open {shown['seconds']:.1f} s: {shown['pushes']} pushes, thread {shown['thread_cpu_seconds']:.3f} s "
        f"({100 * shown['thread_share']:.2f} % of a core; the system counts "
        f"{shown['thread_cpu_seconds_by_system']:.2f} s), server {100 * shown['server_share']:.2f} %\n"
        f"closed {quiet['seconds']:.1f} s: {quiet['pushes']} pushes, thread {quiet['thread_cpu_seconds']:.3f} s, "
        f"running {quiet['running']}, server {100 * quiet['server_share']:.2f} %\n"
        f"scripts: {sum(scripts.values()):,} bytes in {len(scripts)} files"
    )
    targets = {
        "thread open": 0 < shown["thread_share"] <= LIMIT_SHARE,
        "pushes": 0 < shown["pushes"] <= LIMIT_PUSHES_PER_SECOND * shown["seconds"],
        "closed": (quiet["running"], quiet["thread_cpu_seconds"], quiet["pushes"]) == (False, 0, 0),
        "bytes of scripts": sum(scripts.values()) <= LIMIT_SCRIPT_BYTES,
    }
    record = {"comfyui": version, "open": shown, "closed": quiet, "script_bytes": scripts}
    return frame.finish(options.json, record, frame.unmet(targets))


if __name__ == "__main__":
    sys.exit(main())
