"""The web server: routes to add to, pages to push to, the queue."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from execution import PromptQueue


class PromptServer:
    instance: PromptServer

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        PromptServer.instance = self
        self.loop = loop
        self.app, self.routes = web.Application(), web.RouteTableDef()
        self.sockets: dict[str, Any] = {}
        self.prompt_queue = PromptQueue(self)
        self.client_id: str | None = None

    def add_routes(self) -> None:
        self.app.add_routes(self.routes)

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        pass
