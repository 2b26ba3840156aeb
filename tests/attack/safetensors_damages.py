"""Damaged and hostile safetensors files: lengths, headers, dtypes, shapes, places, names."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from steadyvsr.tests.attack.damages import NAMES, ODD_NAMES, REFUSED, Spoilt

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "U16", "U8", "BOOL", "C64")
NO_DTYPES = ("F128", "", "f32", 32, None, ["F32"], {"a": 1}, "F32\n", "\x1b[31mF32")
HUGE = (2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)


def packed(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def unpacked(good: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", good[:8])
    return json.loads(good[8 : 8 + length]), good[8 + length :]


def tensors_of(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def entry(good: bytes, rng: random.Random) -> Spoilt:
    """One tensor's dtype, shape or place says something else."""
    header, data = unpacked(good)
    name = rng.choice(tensors_of(header))
    field = rng.choice(["dtype", "shape", "data_offsets"])
    item, size = header[name], len(data)
    start, stop = item["data_offsets"]
    before = item[field]
    if field == "dtype":
        item[field] = rng.choice([d for d in (*DTYPES, *NO_DTYPES) if d != before])
    elif field == "shape":
        item[field] = rng.choice([
            [], [0], [-1], [0, *before], [*before, 0], [*before, 1], [1, *before], before[::-1] + [2], [1.5], ["4"],
            [rng.choice(HUGE)], [2**32, 2**32], [0, 2**62], [2**62, 0, 2**62], None, {}, "4", 4, [None], [True], [[4]],
            [1] * 70, [1] * 5000, [*before[:-1], (before or [0])[-1] + 1], [0] + before[1:], [1e300], [-4, -4],
        ])  # fmt: skip
    else:
        item[field] = rng.choice([
            [], [start], [stop, start], [start, stop, stop], [start, stop + 4], [start + 4, stop + 4], [0, size],
            [size, size + stop - start], [start, rng.choice(HUGE)], [-4, stop - start - 4], None, "0", [None, None],
            [float(start), float(stop) + 0.5], [str(start), str(stop)], {}, [start, start], [[start], [stop]],
            [True, False], [start - 4, stop - 4] if start else [4, stop],
        ])  # fmt: skip
    refused = REFUSED if item[field] != before else 0
    return Spoilt(packed(header, data), f"{name[:40]}: {field} {before} became {item[field]!s:.60}", refused)


def removed(good: bytes, rng: random.Random) -> Spoilt:
    header, data = unpacked(good)
    name = rng.choice(tensors_of(header))
    del header[name]
    return Spoilt(packed(header, data), f"without {name}", REFUSED)


def renamed(good: bytes, rng: random.Random) -> Spoilt:
    header, data = unpacked(good)
    old = rng.choice(tensors_of(header))
    if rng.random() < 0.6:
        new = rng.choice(NAMES).format(n=rng.choice([7, 999, 65_536, 10**6, 10**7, 10**9, 2**63, 10**30, 10**4000]))
    else:
        new = rng.choice(ODD_NAMES)
    header = {new if name == old else name: item for name, item in header.items()}
    return Spoilt(packed(header, data), f"{old} became {new[:60]!r}", REFUSED)


def added(good: bytes, rng: random.Random) -> Spoilt:
    """More names than the networks have; data for them where they take any."""
    header, data = unpacked(good)
    count, numel = rng.choice([(1, 4), (1, 0), (1000, 0), (250_000, 0), (1, 1 << 18)])
    name = rng.choice([*NAMES, "extra.{n}"])
    for index in range(count):
        start = len(data)
        header[name.format(n=index + rng.choice([50, 10**9]))] = {
            "dtype": "F32", "shape": [numel], "data_offsets": [start, start + 4 * numel],
        }  # fmt: skip
        data += bytes(4 * numel)
    return Spoilt(packed(header, data), f"{count} × {name} of {numel} added", REFUSED)


def twice(good: bytes, rng: random.Random) -> Spoilt:
    """A key that stands in the header two times: JSON's readers do not agree on which counts."""
    header, data = unpacked(good)
    name = rng.choice(tensors_of(header))
    other = header[name] | {"shape": [2, 2]}
    raw = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(other)}}}"
    return Spoilt(packed(raw.encode(), data), f"{name} twice", REFUSED)


def swapped(good: bytes, rng: random.Random) -> Spoilt:
    """Two tensors of one shape in each other's place: a right file, unless it carries a hash."""
    header, data = unpacked(good)
    groups: dict[str, list[str]] = {}
    for name in tensors_of(header):
        groups.setdefault(f"{header[name]['dtype']}{header[name]['shape']}", []).append(name)
    one, two = rng.sample(rng.choice([g for g in groups.values() if len(g) > 1]), 2)
    places = header[one]["data_offsets"], header[two]["data_offsets"]
    header[two]["data_offsets"], header[one]["data_offsets"] = places
    return Spoilt(packed(header, data), f"{one} and {two} swapped", 2)


def hole(good: bytes, rng: random.Random) -> Spoilt:
    """Bytes between two tensors that belong to neither."""
    header, data = unpacked(good)
    name = rng.choice(tensors_of(header))
    at, size = header[name]["data_offsets"][0], rng.choice([1, 4, 4096])
    for other in tensors_of(header):
        if header[other]["data_offsets"][0] >= at:
            header[other]["data_offsets"] = [place + size for place in header[other]["data_offsets"]]
    return Spoilt(packed(header, data[:at] + bytes(size) + data[at:]), f"{size} bytes before {name}", 0)


def metadata(good: bytes, rng: random.Random) -> Spoilt:
    header, data = unpacked(good)
    deep: Any = "x"
    for _ in range(rng.choice([65, 900, 5000])):
        deep = [deep]
    values: list[Any] = [
        None, [], 4, "x", {"a": 1}, {"a": {"b": "c"}}, {"a": None}, {"version": "v9"}, {"version": "v1"},
        {"family": "\x1b[31m"}, {"format": "steadyvsr-merged"}, {"format": "steadyvsr-merged", "sha256": "0" * 64},
        {"a": "b" * 5_000_000}, {"family": "\ud800"}, {"family": ""}, {"sha256": ""}, {"version": "1.1", "family": "x"},
    ]  # fmt: skip
    choice = rng.randrange(len(values) + 1)
    if choice == len(values):
        raw = json.dumps(header)[:-1].encode() + b', "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}"
        return Spoilt(packed(raw, data), "a header nested 5,000 deep", REFUSED)
    header["__metadata__"] = values[choice]
    return Spoilt(packed(header, data), f"metadata {values[choice]!r:.60}", 0)


def header_length(good: bytes, rng: random.Random) -> Spoilt:
    header, data = unpacked(good)
    size = len(good) - 8 - len(data)
    length = rng.choice([0, 1, 2, 7, size - 1, size + 1, len(good), len(good) - 8, 99_999_999, *HUGE[:4], 2**64 - 1])
    return Spoilt(struct.pack("<Q", length) + good[8:], f"header of {length} bytes instead of {size}", REFUSED)


def no_header(good: bytes, rng: random.Random) -> Spoilt:
    _, data = unpacked(good)
    raws = [
        b"[]", b"null", b"4", b'""', b"{}", b"{", b'{"a": NaN}', b'{"a": []}', b'{"a": {}}', b'{"a": null}', b"\xff{}",
        b'{"__metadata__": {}}', b"{" + b" " * 1_000_000 + b"}", b'{"a":' * 3000 + b"1" + b"}" * 3000, b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}', b"\xef\xbb\xbf{}",
        b'{"\xe9": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}',
    ]  # fmt: skip
    raw = rng.choice(raws)
    return Spoilt(packed(raw, data if rng.random() < 0.5 else b""), f"header {raw[:40]!r}", REFUSED)


def spaced(good: bytes, rng: random.Random) -> Spoilt:
    """A good header with spaces behind it, as the format allows."""
    header, data = unpacked(good)
    return Spoilt(packed(json.dumps(header).encode() + b" " * rng.choice([1, 7, 100_000]), data), "padded header", 0)


SAFETENSORS = (
    entry, entry, entry, entry, removed, renamed, renamed, added, twice, swapped, hole, metadata, header_length,
    no_header, spaced,
)  # fmt: skip
