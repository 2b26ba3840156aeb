"""Bad checkpoints: one clear error that names the file, and no pickle's code ever runs."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch
from steadyvsr.models.flashvsr.checkpoint.inspect import inspect_checkpoint
from steadyvsr.models.flashvsr.checkpoint.load import expected_entries, load_flashvsr
from steadyvsr.models.weight_file import CheckpointError, WeightFile
from steadyvsr.tests.models.checkpoint_files import (
    OFFICIAL,
    TINY,
    assert_holds,
    random_parts,
    write,
    write_folder,
    write_merged,
)


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, torch.Tensor]]:
    return random_parts()


class Bomb:
    """Unpickled by an unguarded loader, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["LQ_proj_in.ckpt", "posi_prompt.pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, parts, name, form):
    folder, marker = write_folder(tmp_path / "w", parts), tmp_path / "marker"
    if form == "plain":
        (folder / name).write_bytes(pickle.dumps({"x": Bomb(marker)}, protocol=2))
    else:
        torch.save(
            {**parts["lq_projection"], "x": Bomb(marker)}, folder / name, _use_new_zipfile_serialization=form == "zip"
        )
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*mkdir.*refused"):
        load_flashvsr(folder, version="v1")
    with pytest.raises(CheckpointError, match="refused"):
        inspect_checkpoint(folder / name)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # the bomb is live: unguarded, it makes its mark
    assert marker.exists()


def spoil(path: Path, how: str) -> None:
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "header only":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "text":
        path.write_text("this is no model\n" * 20)
    elif how == "page":
        path.write_text("<!DOCTYPE html><html>Not found</html>")
    elif how == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070392\n")
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "gguf":
        path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))


@pytest.mark.parametrize("part", ["transformer", "decoder"])
@pytest.mark.parametrize("how", ["empty", "truncated", "header only", "text", "page", "pointer", "zeros", "gguf"])
def test_a_spoilt_file_is_named_with_what_to_do(tmp_path, parts, part, how):
    folder = write_folder(tmp_path / "w", parts)
    spoil(folder / OFFICIAL[part], how)
    with pytest.raises(CheckpointError, match=OFFICIAL[part].replace(".", r"\.")) as caught:
        load_flashvsr(folder, version="v1")
    with pytest.raises(CheckpointError) as named:
        WeightFile.open(folder / OFFICIAL[part])
    assert str(named.value) in str(caught.value)
    wanted = {"empty": "0 bytes", "page": "web page", "pointer": "LFS pointer", "gguf": "GGUF"}
    assert wanted.get(how, "expected") in str(caught.value)


def test_a_truncated_safetensors_file_says_how_much_is_there(tmp_path, parts):
    path = write(tmp_path / "dit.safetensors", parts["transformer"])
    whole = path.stat().st_size
    spoil(path, "truncated")
    with pytest.raises(CheckpointError, match=rf"expected {whole} bytes.*got {whole - 1000}.*truncated"):
        WeightFile.open(path)


@pytest.mark.parametrize("bit", [1, 64])
def test_a_merged_file_with_one_flipped_bit_is_damaged(tmp_path, parts, bit):
    path = write_merged(tmp_path / "tiny.safetensors", parts)
    data = bytearray(path.read_bytes())
    data[-5] ^= bit
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors: expected (tensors with sha256|finite)"):
        load_flashvsr(path)


def test_all_keys_that_do_not_fit_are_in_one_error(tmp_path, parts):
    transformer = dict(parts["transformer"])
    del transformer["blocks.1.norm3.weight"]
    transformer["blocks.0.modulation"] = torch.zeros(1, 6, 64)
    transformer["img_emb.proj.0.weight"] = torch.zeros(4)
    decoder = dict(parts["decoder"])
    del decoder["decoder.3.weight"]
    folder = write_folder(tmp_path, {**parts, "transformer": transformer, "decoder": decoder})
    with pytest.raises(CheckpointError) as caught:
        load_flashvsr(folder, version="v1")
    for text in (
        "blocks.1.norm3.weight",
        "blocks.0.modulation (1, 6, 128) expected, (1, 6, 64) found",
        "img_emb.proj.0.weight",
        "decoder.3.weight",
        *(OFFICIAL[part] for part in ("transformer", "decoder")),
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "key", ["patch_embedding.weight", "blocks.0.ffn.0.weight", "head.head.weight", "time_embedding.0.weight"]
)
def test_a_missing_key_that_fixes_a_size_is_listed_too(tmp_path, parts, key):
    transformer = {name: tensor for name, tensor in parts["transformer"].items() if name != key}
    folder = write_folder(tmp_path, {**parts, "transformer": transformer})
    with pytest.raises(CheckpointError, match=rf"1 missing: {key}"):
        load_flashvsr(folder, version="v1")


def test_long_lists_of_keys_are_cut(tmp_path, parts):
    transformer = {**parts["transformer"], **{f"lora.{index}.weight": torch.zeros(1) for index in range(500)}}
    folder = write_folder(tmp_path, {**parts, "transformer": transformer})
    with pytest.raises(CheckpointError, match=r"500 not known: .* and \d+ more") as caught:
        load_flashvsr(folder, version="v1")
    assert len(str(caught.value)) < 1500


def test_quantised_weights_are_refused(tmp_path, parts):
    transformer = {**parts["transformer"], "blocks.0.ffn.0.weight": torch.zeros(32, 128, dtype=torch.int8)}
    folder = write_folder(tmp_path, {**parts, "transformer": transformer})
    with pytest.raises(CheckpointError, match=r"(?s)int8.*quantised"):
        load_flashvsr(folder, version="v1")


def test_parts_of_two_sizes_do_not_go_together(tmp_path, parts):
    wide = expected_entries(dataclasses.replace(TINY, dim=256, num_heads=2))["transformer"]
    transformer = {key: torch.zeros(tensor.shape) for key, tensor in wide.items()}
    folder = write_folder(tmp_path, {**parts, "transformer": transformer})
    with pytest.raises(CheckpointError, match=r"linear_layers\.0\.weight \(256, 8\) expected, \(128, 8\) found"):
        load_flashvsr(folder, version="v1")


def test_a_model_of_another_kind_says_what_is_missing(tmp_path):
    write(tmp_path / "sd.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"missing: transformer, lq_projection, decoder.*input_blocks"):
        load_flashvsr(tmp_path / "sd.safetensors", version="v1")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.safetensors"])
def test_a_path_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"{name}.*no file"):
        load_flashvsr(tmp_path / name)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="safetensors"):
        load_flashvsr(tmp_path)


def test_a_spoilt_file_that_is_not_needed_only_warns(tmp_path, parts, caplog):
    folder = write_folder(tmp_path, parts)
    (folder / "notes.pt").write_bytes(b"")
    assert_holds(load_flashvsr(folder, version="v1"), parts)
    assert "notes.pt" in caplog.text
