"""Attacks the routes of the memory panel through a socket: no data, no effect, no 500, no stalled server.

The routes are those of the pack on the double of ComfyUI, served by aiohttp in this process; a kept model is loaded and
two pages have a websocket, of which one shows the panel. What a page of the panel itself sends must go on working.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestServer
from steadyvsr.tests.attack.outcome import Outcome, forget_peak, peak_bytes, unclear
from steadyvsr.tests.attack.panel_requests import (
    ATTACKS,
    FORGED,
    GOOD,
    MALFORMED,
    PAGE,
    STRANGER,
    Aim,
    Request,
    own_page,
)

TESTS = Path(__file__).resolve().parents[1]
BASE = tempfile.TemporaryDirectory()
sys.argv = [sys.argv[0], str(TESTS.parent), "double", BASE.name]
sys.path.insert(0, str(TESTS / "nodes"))
host: Any = importlib.import_module("host")
scenarios: Any = importlib.import_module("routes_scenarios")

ANSWER_SECONDS, GROWTH_BYTES = 1.0, 16 << 20
"""Of one request: the work that it may make (seconds of the processor: the machine may have other work), and what the
server's memory may grow by (a body may have 64 kB)."""
GIVE_UP_SECONDS, UPLOAD_BYTES = 10, 100 << 20
DATA = ("residents", "devices", "receipts", "snapshots", "marks", "receipt", "levels", "predicted", "secret-model")
"""Words of the answers that tell something."""

kept, ledger, push, receipts = (
    host.pack(m) for m in ("patches.kept", "memory.ledger", "nodes.panel.push", "nodes.receipts")
)
push.PERIOD_SECONDS = 0.01
logging.disable()


class Place:
    """The server, and the model that there is to lose."""

    def __init__(self) -> None:
        # As ComfyUI sets it, for uploads.
        host.SERVER.app._client_max_size = UPLOAD_BYTES
        self.server = TestServer(host.SERVER.app)
        host.LOOP.run_until_complete(self.server.start_server())
        self.set_up()

    def set_up(self) -> None:
        scenarios.cleared()
        self.model = scenarios.owned("secret-model.safetensors")
        host.mm.load_models_gpu([self.model])
        host.SERVER.prompt_queue.get_flags()
        host.SERVER.sockets |= {PAGE: object(), STRANGER: object()}
        for client in (PAGE, STRANGER):
            push.state_push().watch(client, False)
        ledger.current().levels = ledger.Levels()
        kept.registry().ram_budget_bytes = None
        receipts._ring().clear()
        handle = host.pack("patches.residency").handle_of(self.model.model)
        self.aim = Aim(self.server.port or 0, kept.registry().owner_of(self.model).id, handle)
        host.EVENTS.clear()

    def state(self) -> dict[str, Any]:
        """Whatever a request could change."""
        queue, registry = host.SERVER.prompt_queue, kept.registry()
        return {
            "kept": sorted((entry.id, entry.policy) for entry in registry.owned()), "ram": registry.ram_budget_bytes,
            "flags": sorted(queue.get_flags(reset=False)), "levels": ledger.current().levels,
            "loaded": self.model.loaded_size(),
            "watching": sorted(push.state_push()._watching), "receipts": [card["id"] for card in receipts.newest()],
        }  # fmt: skip

    def warm_up(self) -> None:
        """What is loaded at the first use is nobody's growth."""
        for seed in range(40):
            host.LOOP.run_until_complete(answered(own_page(self.aim, random.Random(seed))))
            self.set_up()


async def answered(request: Request) -> bytes:
    """The whole answer; what is there of it if the server does not close in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PLACE.aim.port, limit=1 << 24)
    answer = b""
    try:
        writer.write(request.raw)
        await writer.drain()
        if request.hang_up:
            return b""
        while chunk := await asyncio.wait_for(reader.read(1 << 16), GIVE_UP_SECONDS):
            answer += chunk
    except (ConnectionError, asyncio.TimeoutError):
        pass  # the server need not listen to the end of what it refuses
    finally:
        writer.close()
    return answer


PLACE = Place()
PLACE.warm_up()


def run(seed: int) -> Outcome:
    """One request."""
    rng = random.Random(seed)
    request = rng.choice(ATTACKS)(PLACE.aim, rng)
    before, resident = PLACE.state(), forget_peak()
    host.EVENTS.clear()
    started = time.process_time()
    answer = host.LOOP.run_until_complete(answered(request))
    seconds, grown = time.process_time() - started, peak_bytes() - resident
    after = PLACE.state()
    end, good = judged(request, answer, before != after, seconds, grown)
    changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
    if changed or request.kind == GOOD:
        PLACE.set_up()
    detail = f"{answer[:200]!r} {changed or ''!s:.200}" if not good else ""
    return Outcome(request.how, end, good, detail, seconds, grown)


def judged(request: Request, answer: bytes, changed: bool, seconds: float, grown: int) -> tuple[str, bool]:
    status = int(answer[9:12]) if answer[:7] == b"HTTP/1." and answer[9:12].isdigit() else 0
    head, _, body = answer.partition(b"\r\n\r\n")
    if status >= 500:
        return f"status {status}", False
    if seconds > ANSWER_SECONDS:
        return "stalls the server", False
    if grown > GROWTH_BYTES:
        return "too much memory", False
    if b"access-control-allow" in head.lower():
        return "lets another site read", False
    if request.kind == GOOD:
        strangers = sorted({str(sid) for _, _, sid in host.EVENTS if sid != PAGE})
        if status != 200:
            return f"the panel's own request fails: {status}", False
        return (f"sent to {', '.join(strangers)}", False) if strangers else ("done", True)
    if request.kind == FORGED and any(word.encode() in body for word in DATA):
        return "data", False
    if changed and request.kind in (FORGED, MALFORMED):
        return "effect", False
    if request.kind == FORGED and status == 200:
        return "accepted", False
    if request.kind == MALFORMED and status == 200:
        return "accepted", False
    problem = unclear(body.decode("utf-8", "replace")) if b"application/json" in head else ""
    if problem:
        return f"answer with {problem}", False
    return "refused" if status else "hung up", True
