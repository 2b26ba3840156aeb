"""What a request has to be before a route acts on it: who may ask, and what its body may hold.

A browser lets any page send simple requests to this machine; it asks first (CORS preflight) where a header is not one
of its own, and ComfyUI allows none of ours. A name that an attacker points at this machine (DNS rebinding) makes their
page one of ours to the browser: such names are refused, for reading too.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

import psutil
from aiohttp import web
from comfy.cli_args import args

HEADER, WANTED = "X-SteadyVSR", "1"
BODY_BYTES = 64 * 1024
LARGEST_NUMBER = 10**15
"""Beyond every size in pixels, GiB or percent, and still exact as a float."""
HOST = re.compile(r"(?:(?P<name>[a-z0-9._-]+)|\[(?P<address>[0-9a-f:.]+)\])(?::\d+)?")
NUMBER = (int, float)
Kind = type | tuple[type, ...]


class BadRequest(Exception):
    """What is asked for cannot be done; 400 where the body is not what the route takes, 404 for an unknown name."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


def check_host(request: web.Request) -> None:
    """Raises BadRequest unless the request names this machine as its Host."""
    host = request.headers.get("Host", "")
    found = HOST.fullmatch(host.lower())
    if found is None or not _is_ours(found["name"] or found["address"]):
        raise BadRequest(
            f"expected a Host of this machine; got {host[:80]!r}. Open ComfyUI by its address, start it with --listen "
            "and that name, or name it in STEADYVSR_HOSTS.",
            403,
        )


async def body_of(request: web.Request, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """The JSON object in a request, with the keys of `fields` and no other; any of them may be missing.

    Raises:
        BadRequest: the header or the content type is missing, or the body is anything else.
    """
    if request.headers.get(HEADER) != WANTED:
        raise BadRequest(f"expected the header {HEADER}: {WANTED}. Pages of other sites cannot send it.", 403)
    kind, _, parameters = request.headers.get("Content-Type", "").lower().partition(";")
    if kind.strip() != "application/json":
        raise BadRequest(f"expected the content type application/json; got {kind[:40]!r}.", 415)
    if parameters.strip().replace('"', "") not in ("", "charset=utf-8"):
        raise BadRequest(f"expected JSON in UTF-8; got {parameters.strip()[:40]!r}.", 415)
    if "Content-Encoding" in request.headers:
        raise BadRequest("expected an uncompressed body. Send it without Content-Encoding.", 415)
    body = bytearray()
    # Piece by piece: without a Content-Length nobody knows how much comes.
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > BODY_BYTES:
            raise BadRequest(f"expected at most {BODY_BYTES} bytes; got more.")
    return checked(_parsed(bytes(body)), fields)


def checked(body: object, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """The body, if it is an object that has only these fields, each of its kind.

    Raises:
        BadRequest: it is not.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"expected a JSON object; got {type(body).__name__}.")
    for name, value in body.items():
        if name not in fields:
            raise BadRequest(f"expected the keys {', '.join(fields)}; got {name[:40]!r}.")
        # A bool is an int to Python, but not to the sender.
        if not isinstance(value, fields[name]) or (isinstance(value, bool) and fields[name] is not bool):
            raise BadRequest(f"{name}: got {_shown(value)}, which has the wrong type.")
        if isinstance(value, NUMBER) and abs(value) > LARGEST_NUMBER:
            raise BadRequest(f"{name}: expected a number of at most {LARGEST_NUMBER:,} either way; got a larger one.")
    return body


def _parsed(body: bytes) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(constant)  # NaN and the infinities are Python's own, not JSON's

    try:
        return json.loads(body.decode("utf-8") or "{}", parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest("expected JSON; got something else.") from error


def _shown(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:80]


def _is_ours(name: str) -> bool:
    listening = _names(str(args.listen))
    own = {"localhost", socket.gethostname().lower()} | listening | _names(os.environ.get("STEADYVSR_HOSTS", ""))
    if name in own or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    # An address cannot be rebound. Where ComfyUI listens to everybody, the one in use may be a router's.
    if address.is_loopback or listening & {"0.0.0.0", "::"}:
        return True
    interfaces = psutil.net_if_addrs().values()
    return str(address) in {item.address.partition("%")[0] for addresses in interfaces for item in addresses}


def _names(text: str) -> set[str]:
    return {name.strip().lower() for name in text.split(",") if name.strip()}
