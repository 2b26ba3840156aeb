"""Hostile and malformed requests to the routes of the memory panel, as the bytes that go through the socket."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

GETS = ("state", "receipts", "snapshots", "ledger")
PAGE, STRANGER = "page", "stranger"
"""Ids of two open websockets: one page shows the panel, the other does not."""

FORGED, MALFORMED, HARMLESS, GOOD = "forged", "malformed", "harmless", "good"
"""What may come of a request: neither data nor effect; an error in words and no effect; anything but an effect or a
500; status 200."""


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        how: in words.
        raw: its bytes.
        kind: FORGED | MALFORMED | HARMLESS | GOOD.
        hang_up: whether the sender closes before the answer.
    """

    how: str
    raw: bytes
    kind: str
    hang_up: bool = False


@dataclass(frozen=True)
class Aim:
    """What the requests are aimed at.

    Attributes:
        port: of the server, on the loopback.
        id, handle: of a model that is kept and loaded.
    """

    port: int
    id: str
    handle: str

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def bodies(self) -> dict[str, dict[str, Any]]:
        """A body for each route that does something."""
        return {
            "watch": {"client": STRANGER, "open": True},
            "free": {"unload_models": True, "free_memory": True},
            "release": {"ids": [self.id]},
            "policy": {"id": self.id, "policy": "pin"},
            "offload": {"handle": self.handle},
            "settings": {"warn_percent": 11, "critical_percent": 12, "kept_ram_gib": 1},
            "predict": {"model_set": "nano (embedded)", "precision": "auto", "width": 64, "height": 64, "scale": 2},
        }  # fmt: skip


OWN = {"Content-Type": "application/json", "X-SteadyVSR": "1"}
"""What the panel's own pages send."""


def request(
    aim: Aim,
    route: str,
    body: bytes | None,
    headers: dict[str, str],
    method: str | None = None,
    host: str | None = None,
) -> bytes:
    method = method or ("GET" if body is None else "POST")
    lines = [
        f"{method} /steadyvsr/{route} HTTP/1.1",
        f"Host: {aim.host if host is None else host}",
        "Connection: close",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None and not {"Content-Length", "Transfer-Encoding"} & set(headers):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace") + (body or b"")


def posted(aim: Aim, route: str, body: Any, how: str, kind: str = MALFORMED, **headers: str) -> Request:
    """A body as a page of the panel sends it, but for `headers`."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(f"{route}: {how}", request(aim, route, raw, OWN | named), kind)


def rebound(aim: Aim, rng: random.Random) -> Request:
    """A page whose name was pointed at the loopback: to its browser the routes are its own, and it reads the answer."""
    hosts = [
        "evil.example", f"evil.example:{aim.port}", "localhost.evil.example", "127.0.0.1.evil.example",
        "evil.localhost.co",
        f"127.0.0.1@evil.example:{aim.port}", "[::1].evil.example", "xn--localhost-evil", "1.2.3.4",
        "0x7f000001.evil.com",
        "169.254.169.254", "[2001:db8::1]", "localhost,evil.example", "evil.example\tlocalhost",
        "127.0.0.1#.evil.example",
        "127.0.0.1:80:evil", "l\u00f6calhost", "8.8.8.8:8188", f"evil-127.0.0.1:{aim.port}", "127.0.0.1\\evil.example",
    ]  # fmt: skip
    host = rng.choice(hosts)
    if rng.random() < 0.5:
        route = rng.choice(GETS)
        return Request(f"{route} as {host}", request(aim, route, None, {}, host=host), FORGED)
    route, body = rng.choice(list(aim.bodies().items()))
    raw = request(aim, route, json.dumps(body).encode(), OWN | {"Origin": f"http://{host}"}, host=host)
    return Request(f"{route} as {host}", raw, FORGED)


def cross_site(aim: Aim, rng: random.Random) -> Request:
    """What a form, an image or `fetch` in mode no-cors of another site can send: no header of its own."""
    route, body = rng.choice([*aim.bodies().items(), ("release", {}), ("release", {})])
    kind = rng.choice(
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None, "", "TEXT/PLAIN"]
    )
    origin = rng.choice(
        ["https://evil.example", "null", None, "http://localhost.evil.example", f"http://{aim.host}.evil.example"]
    )
    text = json.dumps(body)
    raw = {
        "multipart/form-data; boundary=x": f'--x\r\nContent-Disposition: form-data; name="{text}"\r\n\r\n\r\n--x--\r\n'
    }.get(kind or "", rng.choice([text, text[:-1] + ', "=": ""}', text + "\r\n"]))
    headers = {"Content-Type": kind} if kind is not None else {}
    headers |= {"Origin": origin} if origin else {}
    headers |= {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"} if rng.random() < 0.5 else {}
    return Request(f"{route}: a form of {origin} as {kind}", request(aim, route, raw.encode(), headers), FORGED)


def without_header(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice([*aim.bodies().items(), ("release", {}), ("release", None)])
    kind = rng.choice(["application/json", "application/json; charset=utf-8", "text/json"])
    raw = b"" if body is None else json.dumps(body).encode()
    return Request(f"{route}: {kind} without the header", request(aim, route, raw, {"Content-Type": kind}), FORGED)


def not_json(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice([*aim.bodies().items(), ("release", {})])
    kind = rng.choice(
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", ""]
    )
    return posted(aim, route, body, f"with the header, as {kind!r}", Content_Type=kind)


def preflight(aim: Aim, rng: random.Random) -> Request:
    route = rng.choice([*GETS, *aim.bodies()])
    headers = {
        "Origin": rng.choice(["https://evil.example", "null"]), "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-steadyvsr,content-type",
    }  # fmt: skip
    return Request(f"{route}: preflight", request(aim, route, None, headers, "OPTIONS"), FORGED)


def another_method(aim: Aim, rng: random.Random) -> Request:
    method = rng.choice(["PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "PROPFIND", "get", "A" * 5000, "OPTIONS"])
    route, body = rng.choice([*aim.bodies().items(), ("state", {})])
    return Request(f"{method[:20]} {route}", request(aim, route, json.dumps(body).encode(), OWN, method), MALFORMED)


def got(aim: Aim, rng: random.Random) -> Request:
    """What changes something is not to be had by GET."""
    route, body = rng.choice(list(aim.bodies().items()))
    query = "&".join(f"{name}={json.dumps(value)}" for name, value in body.items()).replace(" ", "")
    return Request(f"GET {route}?{query}", request(aim, f"{route}?{query}", None, OWN), MALFORMED)


def compressed(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    good = json.dumps(body).encode()
    mib = rng.choice([1, 16, 64, 200])
    bomb = good[:-1] + b" " * (mib << 20) + b"}"
    kinds: dict[str, tuple[bytes, str]] = {
        f"gzip bomb of {mib} MiB": (gzip.compress(bomb, 9), "gzip"),
        f"deflate bomb of {mib} MiB": (zlib.compress(bomb, 9), "deflate"),
        "gzip in gzip": (gzip.compress(gzip.compress(bytes(mib << 20))), "gzip, gzip"),
        "damaged gzip": (gzip.compress(good)[:-6], "gzip"), "no gzip": (good, "gzip"), "no deflate": (good, "deflate"),
        "unknown coding": (good, "zip9"), "brotli that is none": (good, "br"), "empty gzip": (b"", "gzip"),
        "zstd that is none": (good, "zstd"),
    }  # fmt: skip
    how = rng.choice(list(kinds))
    content, coding = kinds[how]
    # Without its checksum gzip is read all the same, and nothing is a body as well.
    kind = HARMLESS if how in ("unknown coding", "damaged gzip", "empty gzip") else MALFORMED
    return posted(aim, route, content, how, kind, Content_Encoding=coding)


def charset(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    name = rng.choice([
        "utf-99", "utf-16", "utf-7", "idna", "rot13", "hex", "base64", "zlib", "unicode_escape", "raw_unicode_escape",
        "punycode",
        "mbcs", "undefined", "\"", "x" * 5000, "utf-8\x00", "cp037", "utf-32", "bz2", "latin-1; charset=utf-16",
    ])  # fmt: skip
    content = rng.choice([json.dumps(body).encode(), b"\xff\xfe\x00", b'{"client": "\xe9"}', b"\x80" * 100])
    return posted(
        aim, route, content, f"charset {name[:20]!r}", HARMLESS, Content_Type=f"application/json; charset={name}"
    )


def nested(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    depth = rng.choice([500, 990, 5000, 30_000])
    inside = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth])
    field = rng.choice(list(body)).encode()
    raw = rng.choice(
        [inside, b'{"' + field + b'": ' + inside + b"}", json.dumps(body).encode()[:-1] + b', "x": ' + inside + b"}"]
    )
    return posted(aim, route, raw, f"nested {depth} deep")


def number(aim: Aim, rng: random.Random) -> Request:
    """Numbers that are none, or that no quantity has, where a number belongs and where it does not."""
    route = rng.choice(["settings", "settings", "predict", "predict", "release", "policy", "watch", "free"])
    body = aim.bodies()[route]
    field = rng.choice([name for name, value in body.items() if not isinstance(value, bool)] or list(body))
    text = rng.choice(["9" * 400, "-" + "9" * 400, "9" * 4301, "9" * 60_000, "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "-1",
                       "1e308", "0.1e-400", "-0.0", "9" * 400 + ".5", "2e400", "1" + "0" * 30])  # fmt: skip
    raw = json.dumps(body | {field: "@@"}).replace('"@@"', text).encode()
    harmless = route == "predict" or text in ("0.1e-400", "-0.0")
    return posted(
        aim, route, raw, f"{field} = {text[:12]} ({len(text)} characters)", HARMLESS if harmless else MALFORMED
    )


def unknown_key(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice([*aim.bodies().items(), ("release", {})])
    key = rng.choice(
        [
            "idz",
            "Ids",
            "ids ",
            "id",
            "IDS",
            "__proto__",
            "constructor",
            "",
            "\u0131ds",
            "force",
            "all",
            "path",
            "client_id",
        ]
    )
    if key in body:
        key += "_"
    wrong = (
        {key: body["ids"]} if "ids" in body and rng.random() < 0.7 else body | {key: rng.choice([True, "x", None, [1]])}
    )
    return posted(aim, route, wrong, f"the key {key!r}")


def wrong_type(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    field = rng.choice(list(body))
    value = body[field]
    others: list[Any] = [
        None,
        [],
        {},
        [None],
        {"a": 1},
        [[]],
        "",
        "\x00",
        "\ud800",
        "../../etc/passwd",
        "x" * 30_000,
        True,
        0,
        1.5,
        [1, 2],
    ]
    same = (int, float) if isinstance(value, int) and not isinstance(value, bool) else type(value)
    wrong = [other for other in others if not isinstance(other, same) or (isinstance(other, bool) and same is not bool)]
    chosen = rng.choice(wrong)
    return posted(aim, route, body | {field: chosen}, f"{field} = {chosen!r:.40}")


def no_such(aim: Aim, rng: random.Random) -> Request:
    """Names of models, policies and pages that are none."""
    name = rng.choice(
        ["", "*", "../x", "a" * 20_000, "\x00", "\x1b[31m", "\ud800", "' OR 1=1", "0123456789ab", "\u202e", "%2e%2e"]
    )
    route, body = rng.choice([
        ("release", {"ids": [aim.id, name]}), ("release", {"ids": [name] * 300}),
        ("policy", {"id": name, "policy": "pin"}),
        ("policy", {"id": aim.id, "policy": name}), ("offload", {"handle": name}),
        ("policy", {"id": aim.handle, "policy": "no"}),
    ])  # fmt: skip
    return posted(aim, route, body, f"{name[:20]!r} is none")


def missing_key(aim: Aim, rng: random.Random) -> Request:
    route = rng.choice(["watch", "policy", "offload", "free"])
    body = dict(aim.bodies()[route])
    gone = rng.choice(list(body))
    wrong = {} if route == "free" else {name: value for name, value in body.items() if name != gone}
    return posted(aim, route, wrong, f"without {gone}")


def malformed_json(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    good = json.dumps(body).encode()
    raw = rng.choice([
        good[:-1], good + b"}", b"null", b"[]", b'"x"', b"4", b"true", b"{'a': 1}", b"\x00", good + b"\x00",
        b"\xff\xfe" + good,
        good.replace(b'"', b"'"), b"{" + b"," * 1000 + b"}", good + good, b"NaN", b"//\n" + good, b"undefined",
        b"\xef\xbb\xbf[]",
        rng.randbytes(rng.choice([1, 100, 5000])),
    ])  # fmt: skip
    return posted(aim, route, raw, f"no JSON: {raw[:20]!r}")


def too_much(aim: Aim, rng: random.Random) -> Request:
    route, body = rng.choice(list(aim.bodies().items()))
    good, size = json.dumps(body).encode(), rng.choice([66_000, 1 << 20, 10 << 20])
    raw = good[:-1] + b" " * size + b"}"
    if rng.random() < 0.5:
        return posted(aim, route, raw, f"{size} spaces")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in _parts(raw, 60_000)) + b"0\r\n\r\n"
    return posted(aim, route, chunks, f"{size} spaces in chunks", Transfer_Encoding="chunked")


def _parts(raw: bytes, size: int) -> Iterable[bytes]:
    return (raw[start : start + size] for start in range(0, len(raw), size))


def wire(aim: Aim, rng: random.Random) -> Request:
    """Requests that are hardly HTTP."""
    route, body = rng.choice(list(aim.bodies().items()))
    good = json.dumps(body).encode()
    whole = request(aim, route, good, OWN)
    kinds: dict[str, bytes] = {
        "noise": rng.randbytes(500) + b"\r\n\r\n", "cut": whole[: rng.randrange(1, len(whole))],
        "long header": whole.replace(b"\r\n", b"\r\nX: " + b"a" * 100_000 + b"\r\n", 1),
        "many headers": whole.replace(b"\r\n", b"\r\n" + b"X-A: b\r\n" * 5000, 1),
        "length -1": request(aim, route, good, OWN | {"Content-Length": "-1"}),
        "length of letters": request(aim, route, good, OWN | {"Content-Length": "many"}),
        "two lengths": request(aim, route, good, OWN | {"Content-Length": "2\r\nContent-Length: 40"}),
        "length too large": request(aim, route, good, OWN | {"Content-Length": "9999"}),
        "both lengths": request(aim, route, good, OWN | {"Content-Length": "4", "Transfer-Encoding": "chunked"}),
        "bad chunks": request(aim, route, b"zz\r\n" + good, OWN | {"Transfer-Encoding": "chunked"}),
        "HTTP/9": whole.replace(b"HTTP/1.1", b"HTTP/9.9", 1),
        "no host": whole.replace(f"Host: {aim.host}\r\n".encode(), b""),
        "two hosts": whole.replace(b"\r\n", b"\r\nHost: evil.example\r\n", 1),
        "no version": f"GET /steadyvsr/{route}\r\n\r\n".encode(),
        "lengths of a number with 400 digits": request(aim, route, good, OWN | {"Content-Length": "9" * 400}),
        "a path": whole.replace(b"/steadyvsr/", b"/steadyvsr/../../steadyvsr/%2e%2e/", 1),
        "a websocket": request(aim, "state", None,
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"},
        host="evil.example"),
        "a whole address": whole.replace(b"/steadyvsr/", b"http://evil.example/steadyvsr/",
        1).replace(aim.host.encode(), b"evil.example"),
    }  # fmt: skip
    how = rng.choice(list(kinds))
    forged = how in ("no host", "two hosts", "a websocket", "a whole address", "noise", "HTTP/9")
    return Request(f"{route}: {how}", kinds[how], FORGED if forged else HARMLESS, how in ("cut", "length too large"))


def own_page(aim: Aim, rng: random.Random) -> Request:
    """What the panel does itself: it must go on working."""
    if rng.random() < 0.4:
        route = rng.choice(GETS)
        host = rng.choice([aim.host, f"localhost:{aim.port}", "127.0.0.1", f"[::1]:{aim.port}", "LOCALHOST"])
        return Request(f"{route} as {host}", request(aim, route, None, {}, host=host), GOOD)
    bodies = aim.bodies() | {"watch": {"client": PAGE, "open": rng.random() < 0.5}, "free": {"unload_models": True}}
    route, body = rng.choice(list(bodies.items()))
    return posted(aim, route, body, "of its own page", GOOD, Origin=f"http://{aim.host}")


ATTACKS: tuple[Callable[[Aim, random.Random], Request], ...] = (
    rebound, rebound, cross_site, cross_site, without_header, not_json, preflight, another_method, got, compressed,
    charset, nested,
    number, unknown_key, wrong_type, no_such, missing_key, malformed_json, too_much, wire, own_page, own_page,
)  # fmt: skip
