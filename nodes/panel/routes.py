"""The routes of the memory panel, under /steadyvsr: what it shows, and what its buttons ask for.

What comes in is checked in requests.py and here. Models are named by handles and ids that this process gave out, never
by a path. Whatever moves a model waits for the end of the running prompt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from aiohttp import web
from server import PromptServer

from ...memory import ledger
from ...memory.offload import Verdict
from ...memory.process import shared
from ...memory.reading import GIB, size_text
from ...patches import idle, presses, prompt, residency
from ...patches.kept import EJECTABLE, POLICIES, registry
from .. import receipts
from ..flashvsr import prediction
from ..receipts import Line, ReceiptCard
from . import state as panel_state
from .push import state_push
from .requests import NUMBER, BadRequest, Kind, body_of, check_host

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def register_routes() -> None:
    """Adds the routes to ComfyUI's server, once per process."""
    instance, known = prompt.server(), shared("panel_routes", lambda: [False])
    if instance is None or known[0]:
        return
    known[0] = True
    presses.listen(_press_receipt)
    receipts.listen(lambda card: state_push().send(receipts.EVENT, card))
    for name, answer in GETS.items():
        instance.routes.get(f"/steadyvsr/{name}")(_route(lambda body, answer=answer: answer()))
    for name, (handler, fields) in POSTS.items():
        instance.routes.post(f"/steadyvsr/{name}")(_route(handler, fields))


def _route(
    handler: Handler, fields: Mapping[str, Kind] | None = None
) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler as the server calls it; without `fields` no body is read."""

    async def answer(request: web.Request) -> web.Response:
        try:
            check_host(request)
            return web.json_response(handler({} if fields is None else await body_of(request, fields)))
        except BadRequest as error:
            return web.json_response({"error": str(error)}, status=error.status)

    return answer


def _needed(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise BadRequest(f"{name}: got null, which has the wrong type.")
    return body[name]


def watch(body: dict[str, Any]) -> dict[str, Any]:
    """A panel opens or closes. {client: id of its websocket, open: bool}"""
    state_push().watch(_needed(body, "client"), _needed(body, "open"))
    return {}


def free(body: dict[str, Any]) -> dict[str, Any]:
    """Sets the flags that ComfyUI's own buttons set; its worker acts on them after the running prompt."""
    flags = {name: body.get(name, False) for name in ("unload_models", "free_memory")}
    if not any(flags.values()):
        raise BadRequest("expected unload_models or free_memory to be true; got neither.")
    for name, wanted in flags.items():
        if wanted:
            PromptServer.instance.prompt_queue.set_flag(name, True)
    return {}


def release(body: dict[str, Any]) -> dict[str, Any]:
    """Gives up kept models: those in {ids: […]}, or all of them without it."""
    ids = body.get("ids")
    if ids is not None:
        if not all(isinstance(id, str) for id in ids):
            raise BadRequest("ids: expected a list of ids; got a list with something else in it.")
        # Before anything is released: a list with one wrong id changes nothing.
        known = {entry.id for entry in registry().entries() if entry.wanted != EJECTABLE}
        unknown = [id for id in ids if id not in known]
        if unknown:
            raise BadRequest(f"no kept model has the id {unknown[0][:40]!r}.", 404)
    given_up = registry().release(ids)
    _settle()
    title = f"Release {given_up[0].name}" if len(given_up) == 1 else "Release kept models"
    line = "none is kept"
    if given_up:
        sizes = ", ".join(f"{entry.name} {size_text(entry.size_bytes)}" for entry in given_up)
        line = f"no longer kept: {sizes}; goes now if nothing uses it, else with the next press"
    return {"receipt": receipts.give(ReceiptCard(title, line, "DONE"))}


def policy(body: dict[str, Any]) -> dict[str, Any]:
    """Keeps a model or stops keeping it. {id, policy: no | keep | pin}"""
    id, wanted = _needed(body, "id"), _needed(body, "policy")
    if wanted not in POLICIES:
        raise BadRequest(f"policy: expected {', '.join(POLICIES)}; got {wanted[:40]!r}.")
    try:
        entry = registry().set_policy(id, wanted)
    except KeyError as error:
        raise BadRequest(f"no model has the id {id[:40]!r}.", 404) from error
    _settle()
    words = {"no": "no longer kept", "keep": "kept", "pin": "pinned"}[wanted]
    line = f"{size_text(entry.size_bytes)} of weights, {words} until a loader node asks otherwise"
    return {"receipt": receipts.give(ReceiptCard(f"{entry.name}: {words}", line, "DONE"))}


def _settle() -> None:
    """Has ComfyUI's worker take or give up models as the policies now say: after the running node, or at once."""
    idle.run_when_idle(PromptServer.instance.prompt_queue, registry().settle)


def offload(body: dict[str, Any]) -> dict[str, Any]:
    """Moves one network off its device, after the running prompt, and measures. {handle}"""
    handle = _needed(body, "handle")
    name = next((network["name"] for network in residency.networks() if network["handle"] == handle), None)
    if name is None:
        raise BadRequest(f"no model {handle[:40]!r} is loaded or kept any more.", 404)
    title, id = f"Offload {name}", receipts.new_id()

    def move() -> None:
        found = residency.patcher_of(handle)
        line, verdict = "it was gone before its turn came", Verdict.NOT_LOADED
        if found is not None:
            (receipt,) = residency.offload_model(found)
            line, verdict = str(receipt), receipt.verdict
        receipts.give(ReceiptCard(title, line, verdict.value, id=id))

    waits = "waits for the end of the running prompt" if prompt.in_work() else "being moved"
    pending = receipts.give(ReceiptCard(title, waits, "PENDING", id=id))
    idle.run_when_idle(PromptServer.instance.prompt_queue, move)
    return {"receipt": pending}


def settings(body: dict[str, Any]) -> dict[str, Any]:
    """The settings that the server acts on.

    {warn_percent, critical_percent, kept_ram_gib, least_ram_gib, reset_when_short}
    """
    book, kept, relief = ledger.current(), registry(), idle.relief()
    warn = body.get("warn_percent", book.levels.warn * 100)
    critical = body.get("critical_percent", book.levels.critical * 100)
    ram = body.get("kept_ram_gib", (kept.ram_budget_bytes or 0) / GIB)
    if not 0 <= ram <= 1e6:
        raise BadRequest(f"kept_ram_gib: expected 0 (half of the RAM) or more GiB; got {ram}.")
    least = body.get("least_ram_gib", (kept.least_ram_bytes or 0) / GIB)
    if not 0 <= least <= 1e6:
        raise BadRequest(f"least_ram_gib: expected 0 (a tenth of the RAM) or more GiB; got {least}.")
    reset = body.get("reset_when_short", relief.enabled)
    try:
        levels = ledger.Levels(warn=warn / 100, critical=critical / 100)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    if warn > critical:
        raise BadRequest(f"settings: expected warn_percent up to critical_percent, {critical:g}; got {warn:g}.")
    book.levels = levels
    kept.ram_budget_bytes, kept.least_ram_bytes = int(ram * GIB) or None, int(least * GIB) or None
    relief.enabled = reset
    return {
        "levels": asdict(book.levels),
        "kept_budget_bytes": kept.budget_bytes(),
        "least_ram_bytes": kept.least_available_bytes(),
        "reset_when_short": relief.enabled,
    }


def predict(body: dict[str, Any]) -> dict[str, Any]:
    """What a FlashVSR run of these settings will need; see `prediction.predict`."""
    try:
        return prediction.predict(
            body.get("model_set", ""),
            body.get("precision", "auto"),
            _needed(body, "width"),
            _needed(body, "height"),
            float(_needed(body, "scale")),
            float(body.get("kv_ratio", 3.0)),
            float(body.get("budget_gb", 0)),
        )
    except (ValueError, OverflowError) as error:
        raise BadRequest(str(error)) from error


def _press_receipt(press: presses.Press) -> None:
    """The receipt of a press, whoever pressed: the panel, ComfyUI's menu, ComfyUI-Manager, or a node."""
    lines = tuple(
        Line(item.name, item.policy, (after := press.bytes_after(item)) > 0, item.bytes, after, item.handle)
        for item in press.before.residents
        if item.bytes
    )
    titles = {"button": "Free memory", "OOM": "Out of memory: everything unloaded", "housekeeping": "End of a prompt"}
    verdict = "FAILED" if press.lost else press.verdict.value
    receipts.give(ReceiptCard(titles[press.caller], press.line, verdict, lines))


GETS: dict[str, Callable[[], dict[str, Any]]] = {
    "state": lambda: {**panel_state.state(), "push": state_push().figures()},
    "receipts": lambda: {"receipts": receipts.newest()},
    "snapshots": lambda: {"snapshots": presses.to_json()},
    "ledger": lambda: ledger.current().to_json(),
}
POSTS: dict[str, tuple[Handler, dict[str, Kind]]] = {
    "watch": (watch, {"client": str, "open": bool}),
    "free": (free, {"unload_models": bool, "free_memory": bool}),
    "release": (release, {"ids": list}),
    "policy": (policy, {"id": str, "policy": str}),
    "offload": (offload, {"handle": str}),
    "settings": (
        settings,
        {
            **dict.fromkeys(("warn_percent", "critical_percent", "kept_ram_gib", "least_ram_gib"), NUMBER),
            "reset_when_short": bool,
        },
    ),
    "predict": (
        predict,
        {
            "model_set": str, "precision": str, "width": int, "height": int, "scale": NUMBER, "kv_ratio": NUMBER,
            "budget_gb": NUMBER,
        },
    ),
}  # fmt: skip
"""Route → what it does, and the keys that it takes with their types; a key beside these is refused."""
