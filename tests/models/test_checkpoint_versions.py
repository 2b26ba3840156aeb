"""Which release the weights are: taken from what can be trusted, asked for where nothing tells it."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from steadyvsr.models.flashvsr.checkpoint import parts as checkpoint_parts
from steadyvsr.models.flashvsr.checkpoint.inspect import inspect_checkpoint
from steadyvsr.models.flashvsr.checkpoint.load import load_flashvsr
from steadyvsr.models.flashvsr.lq_projection import BufferLQ4xProjection, CausalLQ4xProjection
from steadyvsr.models.weight_file import CheckpointError, tensors_sha256
from steadyvsr.tests.models.checkpoint_files import (
    OFFICIAL,
    assert_holds,
    publish,
    random_parts,
    write,
    write_folder,
    write_merged,
)


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, torch.Tensor]]:
    return random_parts()


def test_unknown_weights_need_an_explicit_version(tmp_path, parts):
    with pytest.raises(CheckpointError, match=r"'v1' or 'v1\.1'"):
        load_flashvsr(write_folder(tmp_path / "FlashVSR-v1.1", parts))


@pytest.mark.parametrize(
    ("version", "order", "kind"),
    [
        ("v1", "fixed", BufferLQ4xProjection),
        ("v1", "as_trained", BufferLQ4xProjection),
        ("v1.1", "fixed", CausalLQ4xProjection),
    ],
)
def test_the_version_chooses_the_projection(tmp_path, parts, version, order, kind):
    model = load_flashvsr(write_folder(tmp_path, parts), version=version, lq_cache_order=order)
    assert type(model.lq_projection) is kind
    assert (model.version, model.lq_projection.cache_order) == (version, order)


def test_v1_1_has_no_other_cache_order(tmp_path, parts):
    with pytest.raises(ValueError, match="as_trained"):
        load_flashvsr(write_folder(tmp_path, parts), version="v1.1", lq_cache_order="as_trained")


@pytest.mark.parametrize("argument", [{"version": "v2"}, {"lq_cache_order": "new"}])
def test_unknown_choices_are_refused(tmp_path, parts, argument):
    with pytest.raises(ValueError, match="expected"):
        load_flashvsr(write_folder(tmp_path, parts), **argument)


@pytest.mark.parametrize("part", ["transformer", "lq_projection"])
def test_a_published_file_is_recognised_by_its_hash(tmp_path, parts, monkeypatch, part):
    folder = write_folder(tmp_path, parts)
    publish(monkeypatch, folder / OFFICIAL[part], "v1.1")
    assert load_flashvsr(folder).version == "v1.1"


def test_a_file_of_a_published_size_with_other_bytes_is_not_recognised(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path, parts)
    path = folder / OFFICIAL["transformer"]
    publish(monkeypatch, path, "v1.1")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"'v1' or 'v1\.1'"):
        load_flashvsr(folder)


def test_a_projection_is_recognised_by_two_small_tensors(tmp_path, parts, monkeypatch):
    digest = tensors_sha256([parts["lq_projection"]["norm1.gamma"], parts["lq_projection"]["conv1.bias"]])
    monkeypatch.setitem(checkpoint_parts.KNOWN_PROJECTIONS, digest, "v1")
    folder = write_folder(tmp_path, parts)
    assert load_flashvsr(folder).version == "v1"
    assert {part.fingerprint for part in inspect_checkpoint(folder).parts if part.part == "lq_projection"} == {digest}


def test_an_explicit_version_is_obeyed_with_a_warning(tmp_path, parts, caplog):
    path = write_merged(tmp_path / "tiny.safetensors", parts, "v1.1")
    with caplog.at_level(logging.WARNING, "steadyvsr.checkpoint"):
        assert load_flashvsr(path, version="v1").version == "v1"
    assert "v1.1" in caplog.text


def test_nothing_is_warned_of_when_the_version_agrees(tmp_path, parts, caplog):
    path = write_merged(tmp_path / "tiny.safetensors", parts, "v1.1")
    load_flashvsr(path, version="v1.1")
    load_flashvsr(path)
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["auto", "v1", "v1.1"])
def test_a_projection_and_a_transformer_of_two_known_releases_are_refused(tmp_path, parts, monkeypatch, version):
    folder = write_folder(tmp_path, parts)
    publish(monkeypatch, folder / OFFICIAL["transformer"], "v1.1")
    publish(monkeypatch, folder / OFFICIAL["lq_projection"], "v1")
    with pytest.raises(CheckpointError, match="one release"):
        load_flashvsr(folder, version=version)
    assert inspect_checkpoint(folder).version == "mixed"


def test_a_pair_of_which_one_half_is_unknown_is_loaded(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path, parts)
    publish(monkeypatch, folder / OFFICIAL["transformer"], "v1.1")
    assert load_flashvsr(folder, version="v1").version == "v1"


def other(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor + 1 for key, tensor in tensors.items()}


def test_two_transformers_in_a_folder_need_a_choice(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path, parts)
    second = write(folder / "FlashVSR1_1.safetensors", other(parts["transformer"]))
    with pytest.raises(CheckpointError, match=r"FlashVSR1_1\.safetensors and diffusion_pytorch_model.*mapping"):
        load_flashvsr(folder)
    publish(monkeypatch, second, "v1.1")
    assert_holds(load_flashvsr(folder, version="v1"), parts)
    assert_holds(load_flashvsr(folder, version="v1.1"), {**parts, "transformer": other(parts["transformer"])})


def test_the_same_part_twice_is_no_conflict(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    write(folder / "TCDecoder.safetensors", parts["decoder"])
    assert_holds(load_flashvsr(folder, version="v1"), parts)
