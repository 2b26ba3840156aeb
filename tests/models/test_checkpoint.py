"""Checkpoints: every layout gives the same model, in the dtype asked for, and is described and written back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from steadyvsr.models import weight_file
from steadyvsr.models.flashvsr.checkpoint.inspect import inspect_checkpoint
from steadyvsr.models.flashvsr.checkpoint.load import expected_entries, load_flashvsr, save_merged
from steadyvsr.models.flashvsr.checkpoint.parts import NETWORKS
from steadyvsr.models.flashvsr.config import FlashVSRConfig
from steadyvsr.models.flashvsr.lq_projection import BufferLQ4xProjection
from steadyvsr.models.wan_vae import WanVAE
from steadyvsr.models.weight_file import CheckpointError, WeightFile
from steadyvsr.tests.models.checkpoint_files import (
    OFFICIAL,
    TINY,
    assert_holds,
    publish,
    random_parts,
    write,
    write_folder,
    write_merged,
)

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
LAYOUTS = {
    "official": OFFICIAL,
    "Kijai": {
        "transformer": "Wan2_1-T2V-1_3B_FlashVSR_fp32.safetensors",
        "lq_projection": "Wan2_1_FlashVSR_LQ_proj_model_bf16.safetensors",
        "decoder": "Wan2_1_FlashVSR_TCDecoder_fp32.safetensors",
        "prompt": "posi_prompt.pth",
    },
    "1038lab": {
        "transformer": "FlashVSR1_1.safetensors",
        "lq_projection": "LQ_proj_in.safetensors",
        "decoder": "TCDecoder.safetensors",
        "prompt": "Prompt.safetensors",
    },
    "Wan2GP": {
        "transformer": "FlashVSR_v1.1_transformer_bf16.safetensors",
        "lq_projection": "FlashVSR_v1.1_lq_proj_bf16.safetensors",
        "decoder": "FlashVSR_v1.1_tcdecoder_bf16.safetensors",
        "prompt": "FlashVSR_v1.1_posi_prompt_bf16.safetensors",
    },
    "no known name": {"transformer": "a.pt", "lq_projection": "b.bin", "decoder": "c.sft", "prompt": "d.safetensors"},
}
PREFIXES = {
    "official": {},
    "Kijai": {"lq_projection": "LQ_proj_in."},
    "1038lab": {"transformer": "model.diffusion_model."},
    "Wan2GP": {},
    "no known name": {"transformer": "module.", "lq_projection": "net.lq.", "decoder": "x."},
}


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, torch.Tensor]]:
    return random_parts()


# Layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_folder_layout_gives_the_same_weights(tmp_path, parts, layout):
    folder = write_folder(tmp_path / "weights", parts, LAYOUTS[layout], PREFIXES[layout])
    assert_holds(load_flashvsr(folder, version="v1.1"), parts)


def test_a_merged_file_gives_the_weights_its_version_and_family(tmp_path, parts):
    model = load_flashvsr(write_merged(tmp_path / "tiny.safetensors", parts, "v1"))
    assert_holds(model, parts)
    assert (model.version, model.family) == ("v1", "tiny")
    assert type(model.lq_projection) is BufferLQ4xProjection


def test_a_merged_file_has_the_documented_keys_and_metadata(tmp_path, parts):
    with safe_open(write_merged(tmp_path / "tiny.safetensors", parts), "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    expected = set(parts["transformer"]) | {"positive_conditioning"}
    expected |= {"lq_proj_in." + key for key in parts["lq_projection"]}
    expected |= {"tc_decoder." + key for key in parts["decoder"]}
    assert names == expected
    assert metadata["version"] == "v1.1" and metadata["family"] == "tiny" and len(metadata["sha256"]) == 64


def test_a_loaded_model_is_written_and_read_back(tmp_path, parts):
    model = load_flashvsr(write_folder(tmp_path / "a", parts), version="v1")
    save_merged(model, tmp_path / "b.safetensors", model.version, model.family, torch.float32)
    assert_holds(load_flashvsr(tmp_path / "b.safetensors"), parts)


def test_projection_keys_inside_the_transformer_file_are_found(tmp_path, parts):
    both = {"model.diffusion_model." + key: tensor for key, tensor in parts["transformer"].items()}
    both |= {"model.diffusion_model.LQ_proj_in." + key: tensor for key, tensor in parts["lq_projection"].items()}
    write(tmp_path / "dit_with_projection.safetensors", both)
    write_folder(tmp_path, parts, {part: OFFICIAL[part] for part in ("decoder", "prompt")})
    assert_holds(load_flashvsr(tmp_path, version="v1.1"), parts)
    mapping = {"transformer": tmp_path / "dit_with_projection.safetensors", "decoder": tmp_path / "TCDecoder.ckpt"}
    assert_holds(load_flashvsr(mapping, version="v1.1"), parts)


def test_a_mapping_takes_parts_from_anywhere(tmp_path, parts):
    mapping = {
        part: write(tmp_path / part / "file.safetensors", tensors)
        for part, tensors in parts.items()
        if part != "prompt"
    }
    mapping["prompt"] = write(tmp_path / "p" / "posi_prompt.pth", parts["prompt"])
    assert_holds(load_flashvsr(mapping, version="v1"), parts)


def test_a_mapping_that_swaps_files_is_refused(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    swapped = {"transformer": folder / OFFICIAL["decoder"], "decoder": folder / OFFICIAL["transformer"]}
    with pytest.raises(CheckpointError, match=r"TCDecoder\.ckpt: expected the transformer; got decoder"):
        load_flashvsr(swapped, version="v1")


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "taew2_1.safetensors"])
def test_other_autoencoders_in_the_folder_are_left_alone(tmp_path, parts, name):
    folder = write_folder(tmp_path, parts)
    if name.startswith("Wan"):
        manifest = json.loads((MANIFESTS / "wan2.1_vae.json").read_text())["keys"]
        write(folder / name, {key: torch.zeros(1) for key in manifest})
    else:
        keys = ("encoder.0.weight", "decoder.1.weight", "decoder.5.conv.0.weight", "decoder.26.weight")
        write(folder / name, {key: torch.zeros(4, 16, 3, 3) for key in keys})
    assert_holds(load_flashvsr(folder, version="v1"), parts)


def test_encoder_tensors_of_the_official_decoder_file_are_ignored_and_listed(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    write(folder / OFFICIAL["decoder"], {**parts["decoder"], "encoder.0.weight": torch.ones(4, 3, 3, 3)})
    assert_holds(load_flashvsr(folder, version="v1"), parts)
    ignored = [part.ignored for part in inspect_checkpoint(folder).parts if part.part == "decoder"]
    assert ignored == [("encoder.0.weight",)]


def test_tensors_that_a_published_file_has_beside_its_network_are_no_error(tmp_path, parts, monkeypatch):
    folder = write_folder(tmp_path, parts)
    path = write(folder / OFFICIAL["decoder"], {**parts["decoder"], "unknown.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="1 not known: unknown.weight"):
        load_flashvsr(folder, version="v1")
    publish(monkeypatch, path, None)
    assert_holds(load_flashvsr(folder, version="v1"), parts)


def test_state_dicts_inside_a_training_checkpoint_are_found(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    torch.save({"epoch": 3, "state_dict": parts["lq_projection"]}, folder / OFFICIAL["lq_projection"])
    assert_holds(load_flashvsr(folder, version="v1"), parts)


def test_archives_of_old_torch_versions_are_read(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    path = folder / OFFICIAL["decoder"]
    torch.save(parts["decoder"], path, _use_new_zipfile_serialization=False)
    assert_holds(load_flashvsr(folder, version="v1"), parts)


# Manifests of the released files


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((MANIFESTS / f"{name}.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("dit_wan2.1_t2v_1.3b", "transformer"),
        ("lq_proj_in", "lq_projection"),
        ("kijai_lq_proj_model", "lq_projection"),
        ("tcdecoder", "decoder"),
    ],
)
def test_networks_have_the_keys_and_shapes_of_the_released_files(name, part):
    expected = {key: tuple(tensor.shape) for key, tensor in expected_entries(FlashVSRConfig())[part].items()}
    assert expected == {key.removeprefix("LQ_proj_in."): shape for key, shape in manifest(name).items()}


@pytest.mark.parametrize("name", ["wan2.1_vae", "wan2.1_vae_decoder_only"])
def test_the_wan_vae_has_the_keys_and_shapes_of_the_released_file(name):
    entries = {key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()}
    state = WanVAE.from_state_dict(entries).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == manifest(name)


def test_the_released_sizes_are_read_from_the_released_shapes():
    names = ("dit_wan2.1_t2v_1.3b", "lq_proj_in", "tcdecoder")
    entries = [{key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()} for name in names]
    assert FlashVSRConfig.from_tensors(*entries) == FlashVSRConfig()


# Dtypes and memory


def test_weights_stay_as_stored_unless_a_dtype_is_asked_for(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    half = {key: tensor.half() for key, tensor in parts["decoder"].items()}
    write(folder / OFFICIAL["decoder"], half)
    stored = load_flashvsr(folder, version="v1")
    assert {tensor.dtype for tensor in stored.decoder.state_dict().values()} == {torch.float16}
    assert {tensor.dtype for tensor in stored.transformer.state_dict().values()} == {torch.float32}
    cast = load_flashvsr(folder, version="v1", dtype=torch.bfloat16)
    tensors = [t for part in NETWORKS for t in getattr(cast, part).state_dict().values()] + [cast.prompt]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.ckpt"])
def test_tensors_do_not_change_with_the_file_they_came_from(tmp_path, parts, name):
    path = write(tmp_path / name, parts["transformer"])
    file = WeightFile.open(path)
    tensors = dict(file.read(file.entries))
    with path.open("r+b") as opened:
        opened.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, parts["transformer"][key]) for key, tensor in tensors.items())


def test_every_tensor_owns_exactly_its_memory_and_is_frozen(tmp_path, parts):
    model = load_flashvsr(write_merged(tmp_path / "tiny.safetensors", parts))
    for part in NETWORKS:
        module = getattr(model, part)
        assert not module.training and not list(module.buffers())
        for parameter in module.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            assert not parameter.requires_grad


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.ckpt"])
def test_a_file_read_in_many_short_mappings_gives_the_same_tensors(tmp_path, parts, monkeypatch, name):
    monkeypatch.setattr(weight_file, "_MAPPED_BYTES", 1000)
    file = WeightFile.open(write(tmp_path / name, parts["transformer"]))
    tensors = dict(file.read(file.entries))
    assert tensors.keys() == parts["transformer"].keys()
    assert all(torch.equal(tensor, parts["transformer"][key]) for key, tensor in tensors.items())


def test_values_that_the_dtype_cannot_hold_are_an_error(tmp_path, parts):
    large = {**parts["decoder"], "decoder.1.bias": parts["decoder"]["decoder.1.bias"] + 1e6}
    folder = write_folder(tmp_path, {**parts, "decoder": large})
    load_flashvsr(folder, version="v1")
    with pytest.raises(CheckpointError, match=r"TCDecoder\.ckpt: expected finite values in decoder\.1\.bias.*bfloat16"):
        load_flashvsr(folder, version="v1", dtype=torch.float16)


# Prompts


@pytest.mark.parametrize(
    ("form", "length"),
    [("tensor", 1), ("2-D", 5), ("context", 7), ("list", 5), ("safetensors", 512), ("argument", 3), ("path", 5)],
)
def test_a_prompt_in_any_form_becomes_one_context(tmp_path, parts, form, length):
    context = torch.randn(1, length, TINY.text_dim)
    folder = write_folder(tmp_path / "w", parts, {part: OFFICIAL[part] for part in NETWORKS})
    prompt = None
    if form == "argument":
        prompt = context[0]
    elif form == "path":
        prompt = write(tmp_path / "elsewhere.pth", {"context": context})
    elif form == "safetensors":
        save_file({"context": context}, folder / "Prompt.safetensors")
    else:
        forms = {"tensor": context, "2-D": context[0], "context": {"context": context}, "list": [context[0]]}
        torch.save(forms[form], folder / "posi_prompt.pth")
    assert torch.equal(load_flashvsr(folder, version="v1", prompt=prompt).prompt, context)


@pytest.mark.parametrize("place", [".", "..", "../prompt_tensor"])
def test_a_prompt_beside_the_weights_is_found(tmp_path, parts, place):
    folder = write_folder(tmp_path / "WanVSR" / "FlashVSR", parts, {part: OFFICIAL[part] for part in NETWORKS})
    write(folder / place / "posi_prompt.pth", parts["prompt"])
    assert_holds(load_flashvsr(folder, version="v1"), parts)


def test_a_missing_prompt_says_where_to_get_it(tmp_path, parts):
    folder = write_folder(tmp_path / "w", parts, {part: OFFICIAL[part] for part in NETWORKS})
    with pytest.raises(CheckpointError, match=r"https://github\.com/OpenImagingLab/FlashVSR.*posi_prompt\.pth"):
        load_flashvsr(folder, version="v1")


@pytest.mark.parametrize("shape", [(5, 25), (2, 5, 24), (24,), (1, 0, 24)])
def test_a_prompt_of_another_shape_is_refused(tmp_path, parts, shape):
    with pytest.raises(CheckpointError, match=r"\(length, 24\)"):
        load_flashvsr(write_folder(tmp_path, parts), version="v1", prompt=torch.zeros(shape))


# Inspection and saving


def test_inspection_tells_parts_bytes_dtypes_and_what_is_absent(tmp_path, parts):
    report = inspect_checkpoint(write_folder(tmp_path, parts, {part: OFFICIAL[part] for part in NETWORKS}))
    by_part = {part.part: part for part in report.parts}
    assert set(by_part) == set(NETWORKS) and report.absent == ("prompt",)
    for part, found in by_part.items():
        assert found.bytes == sum(tensor.nbytes for tensor in parts[part].values())
        assert found.dtypes == ("float32",) and not found.missing and not found.extra
    assert (report.family, report.version) == ("flashvsr", None)
    json.dumps(dataclasses.asdict(report))


def test_inspection_of_one_file_lists_missing_and_extra_keys(tmp_path, parts):
    tensors = {**parts["lq_projection"], "conv3.weight": torch.zeros(1)}
    del tensors["conv2.bias"]
    (part,) = inspect_checkpoint(write(tmp_path / "lq.safetensors", tensors)).parts
    assert (part.part, part.missing, part.extra) == ("lq_projection", ("conv2.bias",), ("conv3.weight",))


def test_inspection_says_how_a_version_is_known(tmp_path, parts):
    report = inspect_checkpoint(write_merged(tmp_path / "tiny.safetensors", parts, "v1"))
    assert (report.family, report.version) == ("tiny", "v1")
    assert {part.how_known for part in report.parts if part.version} == {"the metadata of the file"}


def test_saving_replaces_whole_or_not_at_all(tmp_path, parts):
    path = write_merged(tmp_path / "tiny.safetensors", parts)
    before = path.read_bytes()
    large = {**parts["decoder"], "decoder.1.bias": parts["decoder"]["decoder.1.bias"] + 1e6}
    with pytest.raises(ValueError, match=r"decoder\.1\.bias"):
        write_merged(path, {**parts, "decoder": large}, dtype=torch.float16)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
