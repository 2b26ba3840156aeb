"""The routes of the memory panel through a client of aiohttp, with models in ComfyUI's list and in the registry."""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from aiohttp.test_utils import TestClient, TestServer
from host import BASE, CPU, EVENTS, LOOP, SERVER, mm, pack
from torch import nn

CARD = torch.device("xpu:0")
"""A card that this process cannot ask: its numbers are planted in the probe."""
kept = pack("patches.kept")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)


def patcher() -> Any:
    return pack("patches.versions").patcher_class()(Network(), load_device=CPU, offload_device=CPU)


def owned(name: str, policy: str = "keep") -> Any:
    path = BASE / name
    path.touch()
    key = kept.Key.of("model", [path])
    return kept.registry().obtain(key, policy, patcher, lambda value: [value], name)


def asked(talk: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """What `talk` makes of the server's answers: `get(name)` and `post(name, body)` give (status, JSON)."""

    async def session() -> Any:
        async with TestClient(TestServer(SERVER.app), loop=LOOP) as client:

            async def get(name: str) -> tuple[int, Any]:
                async with client.get(f"/steadyvsr/{name}") as answer:
                    return answer.status, await answer.json()

            async def post(name: str, body: Any) -> tuple[int, Any]:
                given = {"data": body} if isinstance(body, bytes) else {"json": body}
                async with client.post(f"/steadyvsr/{name}", **given) as answer:
                    return answer.status, await answer.json()

            return await talk(get, post)

    return LOOP.run_until_complete(session())


def keys(value: Any) -> Any:
    """The names in a tree of JSON; of a list those of its first item."""
    if isinstance(value, dict):
        return {name: keys(item) for name, item in sorted(value.items())}
    return [keys(value[0])] if isinstance(value, list) and value else None


def cleared() -> None:
    kept.registry().release()
    mm.unload_all_models()
    mm.current_loaded_models.clear()
    gc.collect()


@contextmanager
def a_card() -> Iterator[None]:
    """One accelerator, of which the probe reads 24 GiB in total."""
    reading, names = pack("memory.reading"), ("get_torch_device", "get_all_torch_devices")
    figures = {"allocated": 1, "reserved": 2, "used": 12, "process": 4, "total": 24}
    exact = {name: reading.exact(gib << 30, "planted") for name, gib in figures.items()}
    read = reading.Reading(str(CARD), **exact, others=(reading.OtherProcess(4242, "blender", 8 << 30),))
    process, stock = vars(sys.modules["steadyvsr_state"]), {n: getattr(mm, n) for n in names if hasattr(mm, n)}
    pack("memory.probe").current()
    probe, process["probe"] = process["probe"], pack("memory.probe").ScriptedProbe(lambda *_, **__: read)
    for name in stock:
        setattr(mm, name, (lambda *_, **__: CARD) if name == names[0] else (lambda *_, **__: [CARD]))
    try:
        yield
    finally:
        process["probe"] = probe
        for name, original in stock.items():
            setattr(mm, name, original)


def state() -> dict:
    """The state that the panel is shown, with a kept model, another one and a phase, on a card and in RAM."""
    cleared()

    async def talk(get: Any, post: Any) -> Any:
        return await get("state")

    held = [owned("A.safetensors"), patcher()]
    mm.load_models_gpu(held)
    with a_card():
        for loaded in held:
            loaded.load_device = CARD  # it is in the books alone: no tensor can go there
        book = pack("memory.ledger").current()
        book.devices = [CARD]
        with book.phase("planted"):
            pass
        status, answer = asked(talk)
        for loaded in held:
            loaded.load_device = CPU
    return {
        "status": status, "keys": keys(answer), "devices": [device["device"] for device in answer["devices"]],
        "parts": {device["device"]: device["parts"] for device in answer["devices"][:1]},
        "policies": sorted(str(model["policy"]) for model in answer["residents"]),
        "loaded": [model["bytes"] == model["size"] > 0 for model in answer["residents"]],
        "weights": sum(model["bytes"] for model in answer["residents"]),
        "phases": [phase["name"] for phase in answer["phases"]][-1:],
    }  # fmt: skip


def gets() -> dict:
    async def talk(get: Any, post: Any) -> dict:
        return {
            name: [(answer := await get(name))[0], sorted(answer[1])] for name in ("receipts", "snapshots", "ledger")
        }

    return asked(talk)


BAD = {
    "no JSON": ("free", b"{"), "no object": ("free", [1]), "nothing asked": ("free", {}),
    "a word for a bool": ("free", {"unload_models": "yes"}),
    "a bool for a word": ("watch", {"client": True, "open": True}),
    "ids that are no list": ("release", {"ids": "all"}), "an id that is no word": ("release", {"ids": [1]}),
    "an unknown id": ("release", {"ids": ["0123456789ab"]}),
    "an unknown policy": ("policy", {"id": "0123456789ab", "policy": "x"}),
    "an unknown model": ("policy", {"id": "0123456789ab", "policy": "keep"}),
    "an unknown handle": ("offload", {"handle": "../x"}),
    "a level of 101 %": ("settings", {"warn_percent": 101}),
    "RAM below 0": ("settings", {"kept_ram_gib": -1}),
    "least RAM below 0": ("settings", {"least_ram_gib": -1}),
    "a switch that is a number": ("settings", {"reset_when_short": 1}),
    "no size": ("predict", {"model_set": "nano (embedded)", "width": 64}),
    "no number": ("predict", {"width": True, "height": 1}),
    "too much": ("free", b'{"a": "' + b"x" * 70_000 + b'"}'),
}  # fmt: skip


def refused() -> dict:
    async def talk(get: Any, post: Any) -> dict:
        return {name: await post(*request) for name, request in BAD.items()}

    return asked(talk)


def buttons() -> dict:
    """Free, keep, release and offload, with the worker's turn played between request and result."""
    cleared()
    model = owned("B.safetensors", "no")
    mm.load_models_gpu([model])
    id, handle = kept.registry().owner_of(model).id, pack("patches.residency").handle_of(model.model)
    seen: dict[str, Any] = {}

    def policy_of(wanted: str) -> str | None:
        return next((entry.policy for entry in kept.registry().entries() if entry.id == wanted), None)

    async def steps(get: Any, post: Any) -> None:
        EVENTS.clear()
        status, answer = await post("policy", {"id": id, "policy": "keep"})
        seen["keep"] = [status, answer["receipt"]["verdict"], policy_of(id)]
        status, answer = await post("offload", {"handle": handle})
        seen["offload"], pending = (
            [status, answer["receipt"]["verdict"], model.loaded_size() > 0],
            answer["receipt"]["id"],
        )
        SERVER.prompt_queue.get_flags()  # the worker's turn
        _, answer = await get("receipts")
        card = answer["receipts"][0]
        seen["offloaded"] = [card["id"] == pending, card["title"], model.loaded_size() > 0]
        status, _ = await post("free", {"unload_models": True, "free_memory": True})
        seen["free"] = [status, sorted(SERVER.prompt_queue.get_flags())]
        status, answer = await post("release", {})
        seen["release"] = [status, answer["receipt"]["verdict"], policy_of(id)]
        wanted = {"warn_percent": 70, "critical_percent": 90, "kept_ram_gib": 2}
        status, answer = await post("settings", wanted | {"least_ram_gib": 3, "reset_when_short": False})
        seen["settings"] = [status, answer]
        await post("settings", {"kept_ram_gib": 0, "least_ram_gib": 0, "reset_when_short": True})
        status, answer = await post("predict", {"model_set": "nano (embedded)", "width": 64, "height": 64, "scale": 2})
        seen["predict"] = [status, answer["predicted"] > 0, sorted(answer)]
        status, answer = await post("predict", {"model_set": "unknown", "width": 64, "height": 64, "scale": 2})
        seen["predict unknown"] = [status, answer["predicted"]]

    asked(steps)
    seen["pushed"] = sorted({event for event, _, _ in EVENTS})
    return seen


def watching() -> dict:
    """The push to a page that watches, and to one that is gone."""
    cleared()
    push = pack("nodes.panel.push")
    SERVER.sockets["page"] = object()
    EVENTS.clear()

    async def talk(get: Any, post: Any) -> list:
        return [await post("watch", {"client": name, "open": True}) for name in ("page", "nobody")]

    answers = asked(talk)
    thread = push.state_push()._thread
    while not any(event == push.EVENT for event, _, _ in EVENTS):
        thread.join(0.05)
    del SERVER.sockets["page"]
    thread.join(10)
    pushed = [(data, sid) for event, data, sid in EVENTS if event == push.EVENT]
    return {
        "answers": answers, "to": sorted({sid for _, sid in pushed}), "keys": sorted(pushed[0][0]),
        "ended": not thread.is_alive(), "figures": sorted(push.state_push().figures()),
    }  # fmt: skip


SERVER.add_routes()
SCENARIOS = {"state": state, "gets": gets, "refused": refused, "buttons": buttons, "watching": watching}
