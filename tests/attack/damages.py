"""Spoilt files of weights: what all kinds of them have in common, and the damages that any file can take.

A damage is a function of a good file and a seeded generator. It says what may come of the spoilt file
(`Spoilt.touched`): nothing but an error (`REFUSED`), or else the right weights, of which at most so many tensors may
differ from those of the good file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

REFUSED = -1
NAMES = (
    "blocks.{n}.self_attn.q.weight", "linear_layers.{n}.weight", "lq_proj_in.linear_layers.{n}.bias",
    "tc_decoder.decoder.{n}.weight", "blocks.{n}", "blocks.-{n}.a", "blocks. {n}.a", "blocks.{n}e9.a", "blocks.0{n}.x",
)  # fmt: skip
ODD_NAMES = (
    "", ".", "..", "../../etc/passwd", "a" * 100_000, "blocks.\u0665.x", "\x00", "\x1b[2Jgone", "\u202eevil", "\ud800",
    "blocks..weight", "blocks.٣.x", "linear_layers.².weight", "__metadata__.x", "\r\nError: all is well",
)  # fmt: skip


@dataclass(frozen=True)
class Spoilt:
    """A file after the damage.

    Attributes:
        content: of the file.
        how: the damage in words.
        touched: tensors that may differ from the good file's if it loads at all; `REFUSED`: it must not load.
        suffix: of its name; None keeps that of the good file.
        never_torch: whether it must not even be given to `torch.load`.
    """

    content: bytes
    how: str
    touched: int = 0
    suffix: str | None = None
    never_torch: bool = False


def cut(good: bytes, rng: random.Random) -> Spoilt:
    end = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(good)), rng.randrange(len(good)), len(good) - 1])
    return Spoilt(good[:end], f"cut after {end} of {len(good)} bytes", REFUSED)


def flipped_bits(good: bytes, rng: random.Random) -> Spoilt:
    content, count = bytearray(good), rng.choice([1, 1, 2, 8, 64])
    first = rng.random() < 0.5
    for _ in range(count):
        content[rng.randrange(min(len(good), 4096) if first else len(good))] ^= 1 << rng.randrange(8)
    return Spoilt(bytes(content), f"{count} bits flipped{' near the start' if first else ''}", count)


def overwritten(good: bytes, rng: random.Random) -> Spoilt:
    start, length = rng.randrange(len(good)), rng.choice([1, 8, 512, 65536])
    filling = rng.choice([b"\0", b"\xff", b"\x80", b"("])
    stop = min(len(good), start + length)
    content = good[:start] + filling * (stop - start) + good[stop:]
    return Spoilt(content, f"{stop - start} bytes of {filling!r} at {start}", 1 << 20)


def other_content(good: bytes, rng: random.Random) -> Spoilt:
    contents = {
        "nothing": b"", "a web page": b"<!DOCTYPE html><html>Login</html>", "zeros": bytes(rng.choice([1, 8, 9, 4096])),
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a GGUF": b"GGUF\3\0",
        "noise": rng.randbytes(rng.choice([1, 8, 100, 10_000])), "a JPEG": b"\xff\xd8\xff\xe0" + rng.randbytes(500),
        "an empty zip": b"PK\5\6" + bytes(18), "PK alone": b"PK", "0x80 alone": b"\x80", "a script": b"#!/bin/sh\nls\n",
    }  # fmt: skip
    name = rng.choice(list(contents))
    return Spoilt(contents[name], name, REFUSED)


def another_suffix(good: bytes, rng: random.Random) -> Spoilt:
    suffix = rng.choice([".safetensors", ".sft", ".ckpt", ".pth", ".pt", ".bin", ".SAFETENSORS"])
    return Spoilt(good, f"called {suffix}", 0, suffix)


def followed_by(good: bytes, rng: random.Random) -> Spoilt:
    size = rng.choice([1, 8, 100, 5000])
    return Spoilt(good + rng.randbytes(size), f"{size} more bytes at its end", 0)


def swollen(good: bytes, rng: random.Random) -> Spoilt:
    """The file of a good one that is much longer than its contents."""
    return Spoilt(good + bytes(50 << 20), "50 MiB of zeros at its end", 0)


ANY = (cut, flipped_bits, flipped_bits, overwritten, other_content, another_suffix, followed_by, swollen)
