"""Hostile and mangled weights: one line of error that names the file, soon and without much memory; nothing is run."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from steadyvsr.models import known_files
from steadyvsr.models.flashvsr.checkpoint.inspect import inspect_checkpoint
from steadyvsr.models.flashvsr.checkpoint.load import load_flashvsr
from steadyvsr.models.weight_file import CheckpointError, WeightFile, read_header
from steadyvsr.tests.models.checkpoint_files import (
    OFFICIAL,
    TINY,
    assert_holds,
    publish,
    random_parts,
    write_folder,
    write_merged,
)

LIMIT_SECONDS = 10


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, torch.Tensor]]:
    return random_parts()


def raw(path: Path, header: str | bytes | dict, data: bytes = b"") -> Path:
    """A safetensors file with this header, right or wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refused(path: Path, words: str = "", **options) -> str:
    """Loads and inspects a file or folder that must be refused, and returns the error."""
    started = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_flashvsr(path, version="v1", **options)
    assert time.process_time() - started < LIMIT_SECONDS
    message = str(error.value)
    assert words in message, message
    assert len(message) < 4000 and message.replace("\n", "").isprintable()
    if path.is_dir():
        inspect_checkpoint(path)
    return message


HEADERS = {
    "no offsets": {"a": entry([1], 0, 4) | {"data_offsets": []}},
    "nested": '{"a":' * 5000 + "1" + "}" * 5000,
    "nested shape": '{"a":{"dtype":"F32","shape":' + "[" * 5000 + "]" * 5000 + ',"data_offsets":[0,4]}}',
    "nested metadata": '{"__metadata__":{"a":' + "[" * 5000 + "]" * 5000 + "}}",
    "bytes beside shape": {"a": entry([2], 0, 4)},
    "overlapping": {"a": entry([2], 0, 8), "b": entry([2], 4, 12)},
    "all the same bytes": {f"blocks.{index}": entry([4], 0, 16) for index in range(1000)},
    "backwards": {"a": entry([1], 8, 4)},
    "before the start": {"a": entry([1], -4, 0)},
    "beyond the end": {"a": entry([1 << 20], 0, 1 << 22)},
    "negative": {"a": entry([-1, -1], 0, 4)},
    "true": {"a": entry([True], 0, 4)},
    "fraction": {"a": entry([1.5], 0, 6)},
    "huge and empty": {"a": entry([0, 1 << 62, 1 << 62], 0, 0)},
    "many axes": {"a": entry([1] * 3000, 0, 4)},
    "unknown type": {"a": entry([1], 0, 4, "Q99")},
    "metadata is no text": {"__metadata__": {"version": 7}, "a": entry([1], 0, 4)},
    "metadata is a list": {"__metadata__": [], "a": entry([1], 0, 4)},
    "entry is a number": {"a": 7},
    "a list": "[]",
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_one_line_of_error(tmp_path, name):
    path = raw(tmp_path / "a.safetensors", HEADERS[name], bytes(4096))
    assert "\n" not in refused(path, "a.safetensors: expected")
    with pytest.raises(CheckpointError, match="a.safetensors: expected"):
        inspect_checkpoint(path)
    assert read_header(path) is None


@pytest.mark.parametrize("filler", ["[],", "{},", '"",', "1,"])
def test_a_header_of_endless_trifles_is_refused_before_it_is_parsed(tmp_path, filler):
    path = raw(tmp_path / "a.safetensors", '{"a":[' + filler * (60_000_000 // len(filler)) + "1]}")
    written = time.process_time()
    refused(path, "a.safetensors: expected")
    assert time.process_time() - written < 5


def test_too_many_entries_are_refused(tmp_path):
    path = raw(tmp_path / "a.safetensors", {f"{i}": entry([0], 0, 0) for i in range(200_001)})
    refused(path, "200,000")


@pytest.mark.parametrize("key", ["blocks.{}.modulation", "linear_layers.{}.weight"])
@pytest.mark.parametrize("number", ["99999999", "1" * 400, "7", "-3", "x"])
def test_a_layer_number_beyond_the_others_is_refused_soon(tmp_path, parts, key, number):
    part = "transformer" if key.startswith("blocks") else "lq_projection"
    changed = parts | {part: parts[part] | {key.format(number): torch.zeros(1, 6, TINY.dim)}}
    refused(write_folder(tmp_path / "w", changed), f"({OFFICIAL[part]})")


def test_a_hundred_thousand_layers_of_one_tensor_are_refused_soon(tmp_path, parts):
    blocks = {f"blocks.{index}.modulation": entry([0], 0, 0) for index in range(100_000)}
    folder = write_folder(tmp_path / "w", parts)
    raw(folder / OFFICIAL["transformer"], blocks | {
        key: entry(list(tensor.shape), 0, 0) for key, tensor in parts["transformer"].items() if "blocks.0" in key
    })  # fmt: skip
    refused(folder)


@pytest.mark.parametrize("shape", [(0, 16, 1, 2, 2), (0,), (1 << 40, 0, 1 << 20), (128, 0, 1, 2, 2)])
@pytest.mark.parametrize("key", ["patch_embedding.weight", "text_embedding.0.weight", "head.head.weight"])
def test_sizes_of_zero_are_refused(tmp_path, parts, shape, key):
    changed = parts | {"transformer": parts["transformer"] | {key: torch.empty(shape)}}
    refused(write_folder(tmp_path / "w", changed), "expected")


def odd(kind: str, like: torch.Tensor) -> torch.Tensor:
    if kind == "meta":
        return torch.empty(like.shape, device="meta")
    if kind == "sparse":
        return like.to_sparse()
    if kind == "expanded":
        return torch.zeros(1, dtype=like.dtype).expand(like.shape)
    return like.to({"complex": torch.complex64, "uint16": torch.uint16, "bool": torch.bool}[kind])


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex", "uint16", "bool", "expanded"])
@pytest.mark.parametrize(("part", "key"), [
    ("transformer", "patch_embedding.bias"), ("lq_projection", "norm1.gamma"), ("decoder", "decoder.1.bias"),
    ("decoder", "decoder.10.weight"), ("prompt", "context"),
])  # fmt: skip
def test_tensors_of_odd_kinds_are_refused(tmp_path, parts, kind, part, key):
    names = OFFICIAL | {"transformer": "dit.ckpt"}
    changed = parts | {part: parts[part] | {key: odd(kind, parts[part][key])}}
    message = refused(write_folder(tmp_path / "w", changed, names), names[part])
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["complex", "uint16"])
def test_odd_types_in_a_merged_safetensors_file_are_refused(tmp_path, parts, kind):
    path = write_merged(tmp_path / "m.safetensors", parts)
    tensors = dict(WeightFile.open(path).read(WeightFile.open(path).entries))
    tensors["patch_embedding.bias"] = odd(kind, tensors["patch_embedding.bias"])
    save_file(tensors, path, {"family": "tiny", "version": "v1.1"})
    refused(path, "m.safetensors")


def test_a_prompt_that_claims_more_than_it_stores_is_refused(tmp_path, parts):
    folder = write_folder(tmp_path / "w", parts)
    wide = torch.zeros(1, 1, TINY.text_dim).expand(1, 1 << 30, TINY.text_dim)  # a few kB, 96 GB once copied
    torch.save(wide, folder / OFFICIAL["prompt"])
    refused(folder, OFFICIAL["prompt"])


def test_many_names_for_one_large_tensor_are_refused(tmp_path):
    one = torch.zeros(1 << 20)
    torch.save({f"blocks.{index}.x": one for index in range(3000)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "a.pth")


def test_tied_weights_are_no_crime(tmp_path):
    one = torch.zeros(1000)
    torch.save({"a": one, "b": one}, tmp_path / "a.pth")
    assert set(WeightFile.open(tmp_path / "a.pth").entries) == {"a", "b"}


def test_a_pickle_that_unpacks_to_much_more_than_the_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(20_000_000)}, tmp_path / "big.pth")
    with (
        zipfile.ZipFile(tmp_path / "big.pth") as big,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for record in big.infolist():
            small.writestr(record.filename, big.read(record))
    (tmp_path / "big.pth").unlink()
    assert (tmp_path / "a.pth").stat().st_size < 1 << 20
    refused(tmp_path / "a.pth", "a.pth: expected")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])  # the latter is not mapped
def test_a_record_shorter_than_its_storage_is_refused(tmp_path, name):
    torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / name, "w") as short:
        for record in whole.infolist():
            content = whole.read(record)
            short.writestr(record.filename, content[:2000] if record.filename.endswith("/data/0") else content)
    refused(tmp_path / name, f"{name}: expected an archive")


def test_an_endless_list_of_records_is_not_read(tmp_path):
    """The end of a zip archive states how long its list is: here 1.5 GB, which the file has."""
    size = 1500 << 20
    with (tmp_path / "a.pth").open("wb") as file:
        file.write(b"PK\1\2")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    assert "a directory of" in refused(tmp_path / "a.pth", "a.pth: expected an archive")


def test_a_packed_pickle_of_ordinary_size_has_the_right_values(tmp_path):
    tensor = torch.randn(1000)
    torch.save({"a": tensor}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    ((_, read),) = WeightFile.open(tmp_path / "a.pth").read(["a"])
    assert torch.equal(read, tensor)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_pickle_of_endless_steps_is_refused_soon(tmp_path, form):
    steps = b"\x80\x02" + b"(" + b"]" * 30_000_000 + b"t."
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("archive/data.pkl", steps)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    else:
        legacy = io.BytesIO()
        torch.save({}, legacy, _use_new_zipfile_serialization=False)
        start = legacy.getvalue()
        where = start.index(b"\x80\x02}q\x00.")
        (tmp_path / "a.pth").write_bytes(start[:where] + steps + start[where:])
    refused(tmp_path / "a.pth", "a.pth: expected")


def test_a_key_that_is_no_text_is_not_spelled_out(tmp_path):
    key: tuple = ("x",)
    for _ in range(60):
        key = (key, key)  # its text would have 2**60 parts
    torch.save([key, torch.zeros(1)], tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


def test_a_tar_that_looks_like_a_pickle_never_reaches_torch_load(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.pth", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("\udc80\x02storages")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    assert (tmp_path / "a.pth").read_bytes()[:1] == b"\x80"

    def reached(*arguments, **options):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", reached)
    refused(tmp_path / "a.pth", "tar")


@pytest.mark.parametrize("renamed", [{"LQ_proj_in.ckpt": "LQ_proj_in.safetensors"}, {
    "diffusion_pytorch_model_streaming_dmd.safetensors": "dit.pth", "TCDecoder.ckpt": "TCDecoder.sft"
}])  # fmt: skip
def test_the_content_tells_the_format_whatever_the_name(tmp_path, parts, renamed):
    folder = write_folder(tmp_path / "w", parts)
    for old, new in renamed.items():
        (folder / old).rename(folder / new)
    assert_holds(load_flashvsr(folder, version="v1"), parts)


@pytest.mark.parametrize("length", [0x4B50, 0x80, 0x14B50])
def test_a_safetensors_header_whose_length_looks_like_another_format_is_read(tmp_path, length):
    text = json.dumps({"a": entry([1], 0, 4)})
    path = raw(tmp_path / "a.safetensors", text.ljust(length), bytes(4))
    assert list(WeightFile.open(path).entries) == ["a"]


def test_pickles_need_a_torch_that_reads_them_safely(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path / "w", parts)
    merged = write_merged(tmp_path / "m.safetensors", parts)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    message = refused(folder, "2.5.1")
    assert "CVE-2025-32434" in message and "2.6" in message
    assert load_flashvsr(merged).version == "v1.1"
    for version in ("2.6.0", "2.10.1", "3.0.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert_holds(load_flashvsr(folder, version="v1"), parts)


@pytest.mark.parametrize(("part", "version"), [("decoder", None), ("prompt", None), ("transformer", "v1.1")])
def test_a_published_file_with_other_bytes_never_loads(tmp_path, parts, monkeypatch, part, version):
    folder = write_folder(tmp_path / "w", parts)
    path = folder / OFFICIAL[part]
    publish(monkeypatch, path, version)
    assert load_flashvsr(folder, version="v1.1")
    data = bytearray(path.read_bytes())
    data[data.rindex(next(iter(parts[part].values())).numpy().tobytes()[:8])] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path.name}: expected .*sha256"):
        load_flashvsr(folder, version="v1.1")
    path.rename(path.with_name("mine" + path.suffix))
    if part != "prompt":
        load_flashvsr(folder, version="v1.1")  # a model of one's own, under a name of its own


def test_the_files_of_v1_which_nobody_published_a_hash_of_load_when_asked_for(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path / "w", parts)
    publish(monkeypatch, folder / OFFICIAL["transformer"], "v1.1")
    known = known_files.KNOWN_FILES[-1]
    wrong = known_files.KnownFile(known.name, "0" * 64, known.size_bytes, "v1.1")
    monkeypatch.setattr(known_files, "KNOWN_FILES", (wrong,))
    assert load_flashvsr(folder, version="v1").version == "v1"


@pytest.mark.parametrize("key", ["blocks.0.\x1b[2Jevil", "blocks.0.a\nError: fake", "blocks.0.\u202eabc"])
def test_control_characters_in_keys_are_escaped(tmp_path, parts, key):
    changed = parts | {"transformer": parts["transformer"] | {key: torch.zeros(1)}}
    message = refused(write_folder(tmp_path / "w", changed))
    assert key not in message and "evil" in message or "fake" in message or "abc" in message
    assert "\x1b" not in message and "\n  " in message and "\nError" not in message and "\u202e" not in message


def test_what_changes_after_it_was_opened_is_an_error(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    file = WeightFile.open(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="changed"):
        list(file.read(["a"]))
