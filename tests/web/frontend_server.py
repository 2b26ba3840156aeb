"""A stand-in for ComfyUI's server: enough for the packaged front end to boot, and the pack's routes with scripted
numbers. What the browser posts is recorded; a test pushes what the server would push."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def scripted_state(**changes: Any) -> dict:
    """A 24 GiB card with a kept model, another one, a pool, and another process."""
    state = {
        "time": 1000.0,
        "prompt": False,
        "devices": [
            {
                "device": "cuda:0", "name": "Test card", "total": 24 * GIB, "used": 15 * GIB, "source": "NVML",
                "level": "ok", "notes": [], "processes": [{"pid": 4242, "name": "blender", "bytes": 2 * GIB}],
                "parts": {
                    "kept": 6 * GIB, "models": 3 * GIB, "working": 1 * GIB, "pool": 3 * GIB, "others": 2 * GIB,
                    "free": 9 * GIB,
                },
            }
        ],
        "residents": [
            {
                "handle": "m1", "id": "0123456789ab", "name": "WAN21", "kind": "MODEL", "dtype": "bf16",
                "device": "cuda:0", "bytes": 6 * GIB, "size": 6 * GIB, "policy": "keep", "last_used": 990.0,
                "movable": True,
            },
            {
                "handle": "m2", "id": "ba9876543210", "name": "WanVAE", "kind": "VAE", "dtype": "bf16",
                "device": "cuda:0", "bytes": 3 * GIB, "size": 3 * GIB, "policy": "no", "last_used": None,
                "movable": True,
            },
        ],
        "phases": [{"name": "sample", "start": 960.0, "end": 990.0}],
        "promises_off": [],
        "ram": {"kept": 6 * GIB, "budget": 32 * GIB},
    }  # fmt: skip
    return {**state, **changes}


def receipt(id: str, title: str, line: str, verdict: str = "FREED", models: list[dict] | None = None) -> dict:
    return {"id": id, "time": 1_700_000_000.0, "title": title, "line": line, "verdict": verdict, "models": models or []}


class FrontendServer:
    """Serves one unpacked `comfyui_frontend_package/static` on a free port of the loopback, in a thread of its own.

    Attributes:
        posts: (route, body) of everything posted to the pack's routes and to /free, in order.
        state, answers: what the routes say; `answers` maps a route to a function of the body.
        watching: client ids that asked for pushes and did not take it back.
    """

    def __init__(self, static: Path, object_info: dict | None = None, settings: dict | None = None) -> None:
        self.static = static
        self.posts: list[tuple[str, Any]] = []
        self.state = scripted_state()
        self.receipts: list[dict] = []
        self.answers: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.watching: set[str] = set()
        self.object_info = object_info or {}
        self.settings = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False,
                         "Comfy.Workflow.ShowMissingNodesWarning": False}  # fmt: skip
        self.settings |= settings or {}
        self.port = 0
        self._sockets: list[web.WebSocketResponse] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FrontendServer:
        self._thread.start()
        assert self._ready.wait(20), "the stand-in server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def push(self, event: str, data: Any) -> None:
        """Sends a websocket event to every page."""
        asyncio.run_coroutine_threadsafe(self._send(event, data), self._loop).result(10)

    def drop(self) -> None:
        """Closes every websocket and refuses new ones, as a server that is gone does, until `come_back`."""
        self._gone = True
        asyncio.run_coroutine_threadsafe(self._close_sockets(), self._loop).result(10)

    def come_back(self) -> None:
        self._gone = False

    _gone = False

    async def _close_sockets(self) -> None:
        for socket in list(self._sockets):
            await socket.close()

    async def _send(self, event: str, data: Any) -> None:
        for socket in list(self._sockets):
            await socket.send_str(json.dumps({"type": event, "data": data}))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        for prefix in ("", "/api"):
            app.router.add_get(prefix + "/users", self._json({"storage": "server", "migrated": True}))
            app.router.add_get(prefix + "/settings", self._settings)
            app.router.add_post(prefix + "/settings", self._accept)
            app.router.add_post(prefix + "/settings/{id}", self._accept)
            app.router.add_get(prefix + "/extensions", self._extensions)
            app.router.add_get(prefix + "/object_info", self._json(self.object_info))
            app.router.add_get(prefix + "/i18n", self._json({}))
            app.router.add_get(prefix + "/steadyvsr/{name}", self._get)
            app.router.add_post(prefix + "/steadyvsr/{name}", self._post)
            app.router.add_post(prefix + "/free", self._free)
            app.router.add_get(prefix + "/ws", self._socket)
        app.router.add_static("/extensions/steadyvsr", ROOT / "web")
        app.router.add_get("/", self._index)
        app.router.add_static("/", self.static)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._runner is not None
        await self._close_sockets()
        await self._runner.cleanup()

    async def _index(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self.static / "index.html")

    async def _settings(self, request: web.Request) -> web.Response:
        return web.json_response(self.settings)

    async def _extensions(self, request: web.Request) -> web.Response:
        scripts = sorted(path.relative_to(ROOT / "web") for path in (ROOT / "web").rglob("*.js"))
        return web.json_response([f"/extensions/steadyvsr/{path}" for path in scripts])

    def _json(self, value: Any) -> Callable:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response(value)

        return answer

    async def _accept(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _get(self, request: web.Request) -> web.Response:
        if self._gone:
            return web.Response(status=503)
        known = {"state": self.state, "receipts": {"receipts": self.receipts}}
        name = request.match_info["name"]
        return web.json_response(known[name]) if name in known else web.Response(status=404)

    async def _post(self, request: web.Request) -> web.Response:
        if self._gone:
            return web.Response(status=503)
        if request.headers.get("X-SteadyVSR") != "1" or request.content_type != "application/json":
            return web.json_response({"error": "the panel's header is missing"}, status=403)
        name, body = request.match_info["name"], await request.json()
        self.posts.append((name, body))
        if name == "watch":
            (self.watching.add if body["open"] else self.watching.discard)(body["client"])
        status, answer = self.answers.get(name, lambda _: (200, {}))(body)
        return web.json_response(answer, status=status)

    async def _free(self, request: web.Request) -> web.Response:
        self.posts.append(("/free", await request.json()))
        return web.Response()

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if self._gone:
            return web.Response(status=503)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._sockets.append(socket)
        sid = request.query.get("clientId") or "test-client"
        await socket.send_str(
            json.dumps({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": sid}})
        )
        try:
            async for message in socket:
                if message.type == WSMsgType.ERROR:
                    break
        finally:
            self._sockets.remove(socket)
        return socket
