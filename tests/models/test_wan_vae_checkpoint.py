"""The state dicts and files that a Wan 2.1 VAE is read from."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save, save_file
from steadyvsr.models import operations
from steadyvsr.models.wan_vae import WanVAE, load_wan_vae

DATA = Path(__file__).parents[1] / "data"
DIM = 4


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(dim=DIM)


def random_latents(count: int) -> torch.Tensor:
    return torch.randn(1, 16, count, 2, 3, generator=torch.Generator().manual_seed(2))


def test_keys_and_shapes_are_those_of_the_released_checkpoints():
    manifest = json.loads((DATA / "manifests" / "wan2.1_vae.json").read_text())["keys"]
    with torch.device("meta"):
        full, decoder_only = WanVAE(), WanVAE(with_encoder=False)
    assert {key: list(value.shape) for key, value in full.state_dict().items()} == manifest
    assert {key: list(value.shape) for key, value in decoder_only.state_dict().items()} == {
        key: shape for key, shape in manifest.items() if key.startswith(("decoder.", "conv2."))
    }


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "model."])
def test_sizes_are_read_from_the_tensors_under_any_known_prefix(vae, prefix):
    loaded = WanVAE.from_state_dict({prefix + key: value for key, value in vae.state_dict().items()})
    assert (loaded.dim, loaded.z_dim) == (DIM, 16)
    assert torch.equal(loaded.decode(random_latents(1)), vae.decode(random_latents(1)))


def test_the_layers_are_those_of_the_operations_namespace(vae):
    class Conv2d(operations.Conv2d):
        pass

    class Conv3d(operations.Conv3d):
        pass

    loaded = WanVAE.from_state_dict(vae.state_dict(), operations=SimpleNamespace(Conv2d=Conv2d, Conv3d=Conv3d))
    convolutions = [m for m in loaded.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)]
    assert convolutions and {type(m) for m in convolutions} == {Conv2d, Conv3d}
    assert torch.equal(loaded.decode(random_latents(2)), vae.decode(random_latents(2)))


def test_a_decoder_alone_decodes_and_says_why_it_cannot_encode(vae):
    sd = {key: value for key, value in vae.state_dict().items() if key.startswith(("decoder.", "conv2."))}
    decoder_only = WanVAE.from_state_dict(sd)
    assert torch.equal(decoder_only.decode(random_latents(2)), vae.decode(random_latents(2)))
    with pytest.raises(ValueError, match="expected weights with an encoder"):
        decoder_only.encode(torch.zeros(1, 3, 1, 16, 16))


def test_one_error_lists_every_missing_unexpected_and_misshapen_key(vae):
    sd = dict(vae.state_dict())
    del sd["decoder.conv1.bias"], sd["encoder.middle.1.norm.gamma"]
    sd["decoder.surplus"] = torch.zeros(1)
    sd["conv1.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        WanVAE.from_state_dict(sd)
    for text in (
        "missing decoder.conv1.bias",
        "missing encoder.middle.1.norm.gamma",
        "unexpected decoder.surplus",
        "conv1.bias: shape (5,) instead of (32,)",
    ):
        assert text in str(error.value)


def test_another_models_state_dict_is_refused():
    with pytest.raises(ValueError, match="Choose a Wan 2.1 VAE file"):
        WanVAE.from_state_dict({"blocks.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_loads_in_the_asked_dtype(vae, tmp_path, suffix):
    path = tmp_path / f"vae{suffix}"
    sd = {key: value.bfloat16() for key, value in vae.state_dict().items()}
    if suffix == ".pth":
        torch.save(sd, path)
    else:
        save_file(sd, path)
    assert load_wan_vae(path).conv2.weight.dtype == torch.bfloat16
    loaded = load_wan_vae(path, dtype=torch.float32)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, sd[key].float()) for key, value in loaded.state_dict().items())


class Code:
    def __reduce__(self):
        return eval, ("1",)


def damaged_files(folder: Path, sd: dict[str, torch.Tensor]) -> list[Path]:
    torch.save(sd, folder / "whole.pth")
    save_file(sd, folder / "whole.safetensors")
    contents = {
        "code.pth": pickle.dumps({"decoder.head.2.weight": Code()}, protocol=2),
        "list.pth": pickle.dumps([1], protocol=2),
        "unknown.gguf": b"GGUF",
        "other.safetensors": save({"blocks.0.weight": torch.zeros(1)}),
    }
    for suffix in (".pth", ".safetensors"):
        contents[f"empty{suffix}"] = b""
        contents[f"text{suffix}"] = b"not weights at all, only words\n" * 9
        contents[f"truncated{suffix}"] = (folder / f"whole{suffix}").read_bytes()[:3000]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def test_damaged_foreign_and_hostile_files_give_an_error_that_names_the_file(vae, tmp_path):
    for path in damaged_files(tmp_path, vae.state_dict()):
        with pytest.raises(ValueError) as error:
            load_wan_vae(path)
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_archive_is_named_wherever_the_damage_lies(vae, tmp_path, zipped):
    path = tmp_path / "vae.pth"
    torch.save(vae.state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"vae\.pth: expected"):
            load_wan_vae(path)
    random = torch.Generator().manual_seed(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for position, value in torch.randint(0, 256 * 60, (20, 2), generator=random).tolist():
            damaged[position] = value % 256
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # damage among the numbers themselves goes unseen
            load_wan_vae(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.safetensors"):
        load_wan_vae(tmp_path / "none.safetensors")
