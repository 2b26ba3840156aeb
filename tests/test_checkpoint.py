"""Checkpoints: every layout gives the same model, every bad file one clear error, and no pickle's code ever runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from steadyvsr.models.flashvsr import layouts, weight_file
from steadyvsr.models.flashvsr.checkpoint import expected_entries, load_flashvsr, save_merged
from steadyvsr.models.flashvsr.config import FlashVSRConfig
from steadyvsr.models.flashvsr.inspection import inspect_checkpoint
from steadyvsr.models.flashvsr.layouts import KnownFile
from steadyvsr.models.flashvsr.lq_projection import BufferLQ4xProjection, CausalLQ4xProjection
from steadyvsr.models.flashvsr.weight_file import CheckpointError, WeightFile, tensors_sha256

MANIFESTS = Path(__file__).parent / "data" / "manifests"
TINY = FlashVSRConfig(
    dim=128,
    num_heads=1,
    ffn_dim=32,
    num_layers=2,
    freq_dim=16,
    text_dim=24,
    lq_hidden=(6, 8),
    lq_layers=2,
    decoder_channels=(8, 6, 4, 4),
)
OFFICIAL = {
    "transformer": "diffusion_pytorch_model_streaming_dmd.safetensors",
    "lq_projection": "LQ_proj_in.ckpt",
    "decoder": "TCDecoder.ckpt",
    "prompt": "posi_prompt.pth",
}
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
    """Random tensors for every part, under official keys."""
    generator = torch.Generator().manual_seed(0)
    result = {
        part: {key: torch.randn(tensor.shape, generator=generator) for key, tensor in entries.items()}
        for part, entries in expected_entries(TINY).items()
    }
    result["prompt"] = {"context": torch.randn(1, 5, TINY.text_dim, generator=generator)}
    return result


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".safetensors", ".sft"):
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors["context"] if set(tensors) == {"context"} else tensors, path)
    return path


def write_folder(
    folder: Path, parts: dict, names: dict[str, str] = OFFICIAL, prefixes: dict[str, str] | None = None
) -> Path:
    for part, name in names.items():
        prefix = (prefixes or {}).get(part, "")
        write(folder / name, {prefix + key: tensor for key, tensor in parts[part].items()})
    return folder


def write_merged(path: Path, parts: dict, version: str = "v1.1", dtype: torch.dtype = torch.float32) -> Path:
    save_merged({**parts, "prompt": parts["prompt"]["context"]}, path, version, "tiny", dtype)
    return path


def assert_holds(model, parts: dict) -> None:
    for part in layouts.NETWORKS:
        state = getattr(model, part).state_dict()
        assert state.keys() == parts[part].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, parts[part][key]), key
    assert torch.equal(model.prompt, parts["prompt"]["context"])


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


def test_the_released_sizes_are_read_from_the_released_shapes():
    names = ("dit_wan2.1_t2v_1.3b", "lq_proj_in", "tcdecoder")
    entries = [{key: torch.empty(shape, device="meta") for key, shape in manifest(name).items()} for name in names]
    assert FlashVSRConfig.from_tensors(*entries) == FlashVSRConfig()


# Versions


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


def publish(monkeypatch, path: Path, version: str | None) -> None:
    """Enters a file among the published ones."""
    file = WeightFile.open(path)
    known = KnownFile(path.name, file.sha256(), file.size_bytes, version)
    monkeypatch.setattr(layouts, "KNOWN_FILES", (*layouts.KNOWN_FILES, known))


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
    monkeypatch.setitem(layouts.KNOWN_PROJECTIONS, digest, "v1")
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


# Dtypes and memory


def test_weights_stay_as_stored_unless_a_dtype_is_asked_for(tmp_path, parts):
    folder = write_folder(tmp_path, parts)
    half = {key: tensor.half() for key, tensor in parts["decoder"].items()}
    write(folder / OFFICIAL["decoder"], half)
    stored = load_flashvsr(folder, version="v1")
    assert {tensor.dtype for tensor in stored.decoder.state_dict().values()} == {torch.float16}
    assert {tensor.dtype for tensor in stored.transformer.state_dict().values()} == {torch.float32}
    cast = load_flashvsr(folder, version="v1", dtype=torch.bfloat16)
    tensors = [t for part in layouts.NETWORKS for t in getattr(cast, part).state_dict().values()] + [cast.prompt]
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
    for part in layouts.NETWORKS:
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
    folder = write_folder(tmp_path / "w", parts, {part: OFFICIAL[part] for part in layouts.NETWORKS})
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
    folder = write_folder(tmp_path / "WanVSR" / "FlashVSR", parts, {part: OFFICIAL[part] for part in layouts.NETWORKS})
    write(folder / place / "posi_prompt.pth", parts["prompt"])
    assert_holds(load_flashvsr(folder, version="v1"), parts)


def test_a_missing_prompt_says_where_to_get_it(tmp_path, parts):
    folder = write_folder(tmp_path / "w", parts, {part: OFFICIAL[part] for part in layouts.NETWORKS})
    with pytest.raises(CheckpointError, match=r"https://github\.com/OpenImagingLab/FlashVSR.*posi_prompt\.pth"):
        load_flashvsr(folder, version="v1")


@pytest.mark.parametrize("shape", [(5, 25), (2, 5, 24), (24,), (1, 0, 24)])
def test_a_prompt_of_another_shape_is_refused(tmp_path, parts, shape):
    with pytest.raises(CheckpointError, match=r"\(length, 24\)"):
        load_flashvsr(write_folder(tmp_path, parts), version="v1", prompt=torch.zeros(shape))


# Bad files


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


# Inspection and saving


def test_inspection_tells_parts_bytes_dtypes_and_what_is_absent(tmp_path, parts):
    report = inspect_checkpoint(write_folder(tmp_path, parts, {part: OFFICIAL[part] for part in layouts.NETWORKS}))
    by_part = {part.part: part for part in report.parts}
    assert set(by_part) == set(layouts.NETWORKS) and report.absent == ("prompt",)
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
