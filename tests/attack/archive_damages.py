"""Damaged and hostile archives of `torch.save`: code, odd values, zips, old pickles, tars.

Each function is given tensors and writes a file of its own.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steadyvsr.tests.attack.damages import NAMES, ODD_NAMES, REFUSED, Spoilt
from torch import Tensor

Tensors = dict[str, Tensor]


class Calls:
    """Unpickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        return self.call


def saved(value: Any, rng: random.Random) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=rng.random() < 0.6)
    return file.getvalue()


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def records_of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_code(tensors: Tensors, rng: random.Random, canary: Path) -> Spoilt:
    """A pickle that makes a file when it is run, wherever it stands."""
    source = f"open({str(canary)!r}, 'w')"
    gadgets = [
        Calls(os.system, f"touch {canary}"), Calls(eval, source), Calls(exec, source), Calls(open, str(canary), "w"),
        Calls(subprocess.call, ["touch", str(canary)]), Calls(Path.touch, canary), Calls(getattr, torch, "load"),
        Calls(torch.load, str(canary)), Calls(torch._utils._rebuild_parameter, Calls(eval, source), False, None),
        Calls(OrderedDict, Calls(os.system, f"touch {canary}")), Calls(torch.hub.load, str(canary.parent), "x"),
        Calls(print, source), Calls(__import__, "os"), Calls(torch.serialization.add_safe_globals, [os.system]),
        Calls(torch.jit.load, str(canary)), Calls(torch.from_file, str(canary), True, 4),
    ]  # fmt: skip
    gadget = rng.choice(gadgets)
    places: list[Any] = [
        {**tensors, "x": gadget}, gadget, [gadget], {"state_dict": {**tensors, "a": gadget}}, OrderedDict(a=gadget),
        {gadget if False else "blocks.0": [gadget], **tensors},
    ]  # fmt: skip
    content = saved(rng.choice(places), rng)
    name = getattr(gadget.call[0], "__name__", str(gadget.call[0]))
    return Spoilt(content, f"a pickle that calls {name}", REFUSED)


def odd_values(tensors: Tensors, rng: random.Random) -> Spoilt:
    """A pickle whose values are not all dense tensors of the right kind."""
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    flat = tensor.reshape(-1)
    odd: dict[str, Any] = {
        "sparse": tensor.to_sparse(), "complex": tensor.to(torch.complex64), "uint16": tensor.to(torch.uint16),
        "bool": tensor.bool(), "int64": tensor.long(), "meta": tensor.to("meta"),
        "stride 0": flat[:1].expand(tensor.shape),
        "stride 0, 96 GB": flat[:1].expand(24 << 30), "float8": tensor.to(torch.float8_e4m3fn), "a number": 4,
        "None": None, "a list": [tensor, tensor], "NaN": tensor * float("nan"), "infinity": tensor + float("inf"),
        "quantised": torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), "a word": "x" * 100,
        "overlapping": flat[: max(1, flat.numel() // 2)].repeat(3).as_strided((flat.numel(),),
        (1,))[: flat.numel() - 1],
        "empty": tensor[:0], "of another shape": tensor[None], "float64": tensor.double() * 1e300,
        "deep": [[[[tensor]]]],
        "nested": torch.nested.as_nested_tensor([flat[:1], flat[:1]], layout=torch.strided),
    }  # fmt: skip
    right: dict[str, Any] = {
        "a parameter": torch.nn.Parameter(tensor),
        "transposed": tensor.t().contiguous().t() if tensor.ndim == 2 else tensor,
        "a view into a larger one": torch.cat([flat, flat])[flat.numel() :].view(tensor.shape), "half": tensor,
    }  # fmt: skip
    kind = rng.choice([*odd, *right])
    touched = 0 if kind in right else 1 if kind == "float64" else REFUSED
    # On a stride of 0 everything rests on few bytes; the tensor is as large as it says.
    content = {**tensors, name: {**odd, **right}[kind]}
    if kind == "stride 0":
        touched = 1
    return Spoilt(saved(content, rng), f"{name}: {kind}", touched)


def wrapped(tensors: Tensors, rng: random.Random) -> Spoilt:
    """Around the state dict: the wrappers of training code, or something that only looks like it."""
    shells: dict[str, tuple[Any, int]] = {
        "state_dict": ({"state_dict": tensors, "epoch": 3}, 0), "params": ({"params": tensors}, 0),
        "list": ([tensors], 0),
        "itself": (dict(tensors), 0), "tuple of items": (tuple(tensors.items()), 0), "empty": ({}, REFUSED),
        "state_dict of none": ({"state_dict": {}}, REFUSED), "number": (4, REFUSED), "None": (None, REFUSED),
        "twice": ({"state_dict": {"state_dict": tensors}}, 0),
        "number keys": ({1: next(iter(tensors.values()))}, REFUSED),
    }  # fmt: skip
    kind = rng.choice(list(shells))
    value, touched = shells[kind]
    return Spoilt(saved(value, rng), f"wrapped: {kind}", touched)


def renamed_key(tensors: Tensors, rng: random.Random) -> Spoilt:
    old = rng.choice(list(tensors))
    new: Any = rng.choice([*NAMES, *ODD_NAMES, None, 4, ("a", "b"), b"blocks.0"])
    if isinstance(new, str):
        new = new.format(n=rng.choice([7, 65_536, 10**7, 10**9, 2**63, 10**30])) if "{n}" in new else new
    return Spoilt(
        saved({new if key == old else key: value for key, value in tensors.items()}, rng),
        f"{old} became {new!r:.60}",
        REFUSED,
    )


def archive(tensors: Tensors, rng: random.Random) -> Spoilt:
    """The records of the zip: compressed, missing, doubled, of other contents."""
    records = records_of(tensors)
    root = next(iter(records)).split("/")[0]
    data = [name for name in records if "/data/" in name]
    kind = rng.choice([
        "compressed", "a bomb", "a bomb of a pickle", "no pickle", "a storage missing", "a storage cut",
        "a storage longer",
        "another byte order", "no version", "odd version", "a script archive", "another root", "a path upwards",
        "encrypted",
        "twice", "a comment", "something in front", "wrong checksum", "size in the directory",
    ])  # fmt: skip
    touched = REFUSED
    if kind == "compressed":
        return Spoilt(zipped(records, rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])), kind, 0)
    if kind == "a bomb":
        records[rng.choice(data)] = bytes(200 << 20)
        return Spoilt(zipped(records, zipfile.ZIP_DEFLATED), kind, REFUSED)
    if kind == "a bomb of a pickle":
        records[f"{root}/data.pkl"] = b"\x80\x02" + b"N0" * (60 << 20) + b"."
        return Spoilt(zipped(records, zipfile.ZIP_DEFLATED), kind, REFUSED)
    if kind == "no pickle":
        del records[f"{root}/data.pkl"]
    elif kind == "a storage missing":
        del records[rng.choice(data)]
    elif kind == "a storage cut":
        name = rng.choice(data)
        records[name] = records[name][: len(records[name]) // 2]
    elif kind == "a storage longer":
        records[rng.choice(data)] += bytes(4096)
        touched = 0
    elif kind == "another byte order":
        records[f"{root}/byteorder"] = rng.choice([b"big", b"", b"middle"])
        touched = len(tensors)
    elif kind == "no version":
        records.pop(f"{root}/version", None)
        touched = 0
    elif kind == "odd version":
        records[f"{root}/version"] = rng.choice([b"99999999999999999999", b"", b"x", b"-1"])
        touched = 0
    elif kind == "a script archive":
        records[f"{root}/constants.pkl"] = records[f"{root}/data.pkl"]
        records[f"{root}/code/__torch__.py"] = b"import os"
    elif kind == "another root":
        name = rng.choice(["a/b", "\u00e9", "", ".."])
        records = {key.replace(root, name, 1): value for key, value in records.items()}
        touched = 0
    elif kind == "a path upwards":
        records["../../../outside"] = b"x"
        touched = 0
    content = bytearray(zipped(records))
    if kind == "encrypted":
        content[6] |= 1
        content[content.rfind(b"PK\1\2") + 8] |= 1
        touched = 0
    elif kind == "twice":
        with zipfile.ZipFile(file := io.BytesIO(bytes(content)), "a") as again:
            again.writestr(zipfile.ZipInfo(rng.choice(list(records))), b"twice")
        content = bytearray(file.getvalue())
        touched = 1
    elif kind == "a comment":
        content[-2:] = struct.pack("<H", 300)
        content += bytes(300)
        touched = 0
    elif kind == "something in front":
        content = bytearray(b"PK in front" + content)
        touched = 0
    elif kind == "wrong checksum":
        place = content.find(b"PK\1\2")
        content[place + 16 : place + 20] = b"\1\2\3\4"
        touched = 0
    elif kind == "size in the directory":
        places = [i for i in range(len(content) - 4) if content[i : i + 4] == b"PK\1\2"]
        place = rng.choice(places) + rng.choice([20, 24])
        content[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1]))
        touched = 1
    return Spoilt(bytes(content), f"archive: {kind}", touched)


def opcodes(tensors: Tensors, rng: random.Random) -> Spoilt:
    """Numbers and words in the pickle become others: sizes, strides, offsets, storages, names of classes."""
    records = records_of(tensors)
    name = next(key for key in records if key.endswith("data.pkl"))
    raw = bytearray(records[name])
    found = [(op.name, arg, pos) for op, arg, pos in pickletools.genops(bytes(raw))]
    numbers = [
        (arg, pos, {"BININT1": 1, "BININT2": 2, "BININT": 4}[op]) for op, arg, pos in found if op[:6] == "BININT"
    ]
    words = [(arg, pos) for op, arg, pos in found if op in ("GLOBAL", "BINUNICODE") and arg]
    kind = rng.choice(["a number", "a number", "a word", "an opcode", "deep", "long"])
    if kind == "a number" and not numbers:
        kind = "an opcode"
    how = kind
    if kind == "a number":
        before, place, size = rng.choice(numbers)
        after = rng.choice([0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 2), rng.randrange(1 << (8 * size))])
        raw[place + 1 : place + 1 + size] = after.to_bytes(size, "little")
        how = f"{before} became {after}"
    elif kind == "a word":
        before, place = rng.choice(words)
        where = raw.find(before.split(" ")[0].encode(), place)
        raw[where + rng.randrange(len(before.split(" ")[0]))] = rng.choice(b"x.\x00\xff\n0")
        how = f"{before} with another letter"
    elif kind == "an opcode":
        *_, place = rng.choice(found)
        raw[place] = rng.randrange(256)
        how = f"opcode at {place}"
    elif kind == "deep":
        raw = bytearray(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    else:
        raw = bytearray(b"\x80\x02\x8b" + struct.pack("<i", rng.choice([2**31 - 1, -1, 10**6])) + b"\xff" * 1000 + b".")
    records[name] = bytes(raw)
    return Spoilt(zipped(records), f"pickle: {how}", len(tensors))


def old_pickle(tensors: Tensors, rng: random.Random) -> Spoilt:
    """The form before torch 1.6: several pickles one after the other, then the bytes of the storages."""
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    good = file.getvalue()
    stream, ends = io.BytesIO(good), []
    for _ in range(3):
        pickle.load(stream)
        ends.append(stream.tell())
    kind = rng.choice(
        ["as it is", "magic", "protocol", "system", "cut", "keys", "a size of a storage", "bits", "no end"]
    )
    if kind == "as it is":
        return Spoilt(good, "old pickle", 0)
    if kind in ("magic", "protocol", "system"):
        place = ("magic", "protocol", "system").index(kind)
        start = 0 if not place else ends[place - 1]
        value = rng.choice([0, "x", None, 10**30, {"a": 1}])
        content = good[:start] + pickle.dumps(value, 2) + good[ends[place] :]
        return Spoilt(content, f"old pickle: {kind} {value!r}", 0)
    if kind == "cut":
        return Spoilt(good[: rng.randrange(ends[2], len(good))], "old pickle: cut", REFUSED)
    content = bytearray(good)
    if kind == "a size of a storage":
        numbers = [pos for op, _, pos in pickletools.genops(good[ends[2] :]) if op.name == "BININT"]
        place = ends[2] + rng.choice(numbers or [0]) + 1
        content[place : place + 4] = struct.pack("<i", rng.choice([2**31 - 1, -1, 2**30, 0]))
    elif kind == "no end":
        content += b"\xff" * 8
    else:
        for _ in range(rng.choice([1, 4, 16])):
            content[rng.randrange(ends[2], len(content))] ^= 1 << rng.randrange(8)
    return Spoilt(bytes(content), f"old pickle: {kind}", 0 if kind == "no end" else len(tensors))


def tar(tensors: Tensors, rng: random.Random) -> Spoilt:
    """The form before torch 0.1.10, also with a first name that looks like a pickle."""
    odd = rng.random() < 0.6
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as made:
        for name in ([rng.choice(["\x80", "\x80\x02", "PK\x03\x04"])] if odd else []) + [
            "sys_info", "pickle", "storages", "tensors",
        ]:  # fmt: skip
            content = pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return Spoilt(file.getvalue(), f"a tar{' that starts like something else' if odd else ''}", REFUSED, None, True)


ARCHIVES = (odd_values, odd_values, wrapped, renamed_key, archive, archive, opcodes, opcodes, old_pickle, tar)
