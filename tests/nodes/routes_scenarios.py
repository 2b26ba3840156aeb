"""The routes of the memory panel through a client of aiohttp, with models in ComfyUI's list and in the registry."""

from __future__ import annotations

import gc
import gzip
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.cli_args
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


OURS = {"X-SteadyVSR": "1", "Content-Type": "application/json"}


def asked(talk: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """What `talk` makes of the server's answers: `get(name)` and `post(name, body)` give (status, JSON or text).

    Both take headers; those of `post` stand in the place of the ones that a page of ours sends.
    """

    async def session() -> Any:
        async with TestClient(TestServer(SERVER.app), loop=LOOP) as client:

            async def told(answer: Any) -> tuple[int, Any]:
                return answer.status, await (answer.json() if "json" in answer.content_type else answer.text())

            async def get(name: str, **headers: str) -> tuple[int, Any]:
                async with client.get(f"/steadyvsr/{name}", headers=headers) as answer:
                    return await told(answer)

            async def post(name: str, body: Any, headers: dict[str, str] = OURS) -> tuple[int, Any]:
                data = body if isinstance(body, bytes) else json.dumps(body)
                async with client.post(f"/steadyvsr/{name}", data=data, headers=headers) as answer:
                    return await told(answer)

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
    "a misspelt key": ("release", {"id": ["0123456789ab"]}),
    "a key that another route has": ("predict", {"width": 64, "height": 64, "scale": 2, "decoder": "tc"}),
    "a warning above the strong one": ("settings", {"warn_percent": 90, "critical_percent": 60}),
    "a number of 400 digits": ("settings", {"kept_ram_gib": 10**400}),
    "a size of 400 digits": ("predict", {"width": 10**400, "height": 64, "scale": 2}),
    "a scale of 400 digits": ("predict", {"width": 64, "height": 64, "scale": 10**400}),
    "a number of 5,000 digits": ("settings", b'{"kept_ram_gib": ' + b"9" * 5000 + b"}"),
    "not a number": ("settings", b'{"kept_ram_gib": NaN}'),
    "no end": ("settings", b'{"warn_percent": Infinity}'),
    "a deep list": ("release", b'{"ids": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "a list of lists": ("release", {"ids": [[[]]]}),
    "a dict for a word": ("policy", {"id": {"a": 1}, "policy": "keep"}),
    "half a character": ("policy", b'{"id": "\\ud800", "policy": "keep"}'),
    "no UTF-8": ("free", b'{"unload_models": "\xff"}'),
}  # fmt: skip


def refused() -> dict:
    async def talk(get: Any, post: Any) -> dict:
        return {name: await post(*request) for name, request in BAD.items()}

    return asked(talk)


HOSTS = {
    "localhost": "localhost:8188", "the loopback": "127.0.0.1:8188", "the loopback of IPv6": "[::1]:8188",
    "another name": "evil.example:8188", "a name like ours": "127.0.0.1.evil.example", "nothing": "",
    "another machine": "203.0.113.9:8188", "nonsense": "[::1", "a list": "localhost, evil.example",
}  # fmt: skip


def hosts() -> dict:
    """Who may ask, by the Host of a GET and of a POST."""

    async def talk(get: Any, post: Any) -> dict:
        return {
            name: [
                (await get("state", Host=host))[0],
                (await post("watch", {"client": "x", "open": False}, {**OURS, "Host": host}))[0],
            ]
            for name, host in HOSTS.items()
        }

    return asked(talk)


def listened() -> dict:
    """Statuses of a GET by Host, where ComfyUI was told to listen to a name or to everybody."""
    arguments = comfy.cli_args.args
    stock, seen = arguments.listen, {}
    try:
        for listen in ("127.0.0.1", "box.lan,127.0.0.1", "0.0.0.0,::"):
            arguments.listen = listen

            async def talk(get: Any, post: Any) -> list:
                names = ("box.lan:8188", "203.0.113.9:8188", "[2001:db8::9]:8188", "evil.example")
                return [(await get("receipts", Host=name))[0] for name in names]

            seen[listen] = asked(talk)
    finally:
        arguments.listen = stock
    return seen


def foreign() -> dict:
    """What a page of another site can send without asking first, and bodies that are not what they seem."""
    cleared()
    kept_one = owned("F.safetensors")

    async def talk(get: Any, post: Any) -> dict:
        bomb = gzip.compress(b'{"unload_models": ' + b" " * 60_000_000 + b"true}")
        requests = {
            "no header": (b"{}", {"Content-Type": "application/json"}),
            "a form": (b"", {"Content-Type": "application/x-www-form-urlencoded"}),
            "plain text": (b"{}", {"Content-Type": "text/plain"}),
            "our header, plain text": (b"{}", {**OURS, "Content-Type": "text/plain"}),
            "our header, no type": (b"{}", {"X-SteadyVSR": "1", "Content-Type": ""}),
            "another value": (b"{}", {**OURS, "X-SteadyVSR": "0"}),
            "an unknown charset": (b"{}", {**OURS, "Content-Type": "application/json; charset=klingon"}),
            "UTF-7": (b"{}", {**OURS, "Content-Type": "application/json; charset=utf-7"}),
            "packed": (gzip.compress(b"{}"), {**OURS, "Content-Encoding": "gzip"}),
            "a bomb": (bomb, {**OURS, "Content-Encoding": "gzip"}),
        }
        return {name: await post("release", *request) for name, request in requests.items()}

    answers = asked(talk)
    owners = [entry.name for entry in kept.registry().owned()]
    kept.registry().release()
    del kept_one
    return {"answers": answers, "kept": owners}


def buttons() -> dict:
    """Free, keep, release and offload, with the worker's turn played between request and result."""
    cleared()
    model = owned("B.safetensors", "no")
    mm.load_models_gpu([model])
    id, handle = kept.registry().owner_of(model).id, pack("patches.residency").handle_of(model.model)
    seen: dict[str, Any] = {}

    def policy_of(wanted: str) -> str | None:
        return next((entry.policy for entry in kept.registry().entries() if entry.id == wanted), None)

    push = pack("nodes.panel.push")
    SERVER.sockets["page"] = object()

    async def steps(get: Any, post: Any) -> None:
        await post("watch", {"client": "page", "open": True})
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
    seen["pushed"] = sorted({event for event, _, _ in EVENTS} - {push.EVENT})
    del SERVER.sockets["page"]
    push.state_push()._thread.join(10)
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


def receipts_sent() -> dict:
    """To whom a receipt goes: pages that have the panel open, and nobody else."""
    cleared()
    push, receipts, seen = pack("nodes.panel.push"), pack("nodes.receipts"), {}
    SERVER.sockets |= {"page": object(), "other": object()}

    def told() -> list:
        EVENTS.clear()
        receipts.give(receipts.ReceiptCard("A title", "a line", "DONE"))
        return [sid for event, _, sid in EVENTS if event == receipts.EVENT]

    seen["nobody watches"] = told()
    for name, open in (("one page watches", True), ("it has closed the panel", False)):

        async def talk(get: Any, post: Any, open: bool = open) -> Any:
            return await post("watch", {"client": "page", "open": open})

        asked(talk)
        seen[name] = told()
    thread = push.state_push()._thread
    if thread is not None:
        thread.join(10)
    del SERVER.sockets["page"], SERVER.sockets["other"]
    return seen


SERVER.add_routes()
SCENARIOS = {
    "state": state, "gets": gets, "refused": refused, "hosts": hosts, "listened": listened, "foreign": foreign,
    "buttons": buttons, "watching": watching, "receipts": receipts_sent,
}  # fmt: skip
