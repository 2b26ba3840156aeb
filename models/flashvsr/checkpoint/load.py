"""Loading files of weights as a `FlashVSR`, and saving one as a merged file.

A checkpoint is a folder, one merged file, or a mapping of part → file. The parts are found by their keys (`parts`) and
compared with the networks on the meta device before anything is read. Then they are read tensor by tensor in the dtype
asked for and assigned, so that the weights exist once.

v1 and v1.1 have identical keys and shapes but different projections. Which of them the weights are is known from what
can be trusted (metadata of merged files, hashes) or said by the caller, never guessed from names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...known_files import known_file, refuse_altered
from ...operations import cast_on_use
from ...weight_file import CheckpointError, WeightFile, tensors_sha256
from ..config import LAYER_LIMIT, LQ_CACHE_ORDERS, FlashVSRConfig
from ..lq_projection import BufferLQ4xProjection, CausalLQ4xProjection
from ..model import FlashVSR
from ..tc_decoder import TCDecoder
from ..transformer import Transformer
from .parts import (
    FAMILY,
    MERGED_FORMAT,
    MERGED_PREFIXES,
    MERGED_PROMPT,
    NETWORKS,
    VERSIONS,
    Source,
    find_parts,
)
from .sources import (
    PROMPT_URL,
    Checkpoint,
    PathLike,
    choose_sources,
    find_checkpoint,
    find_prompt,
    listed,
    resolve_version,
)


def load_flashvsr(
    path: PathLike | Mapping[str, PathLike],
    version: str = "auto",
    lq_cache_order: str = "fixed",
    num_heads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    operations=cast_on_use,
    prompt: Tensor | PathLike | None = None,
) -> FlashVSR:
    """Loads a FlashVSR model.

        model = load_flashvsr("models/FlashVSR-v1.1", dtype=torch.bfloat16, device="cuda")

    Args:
        path: a folder (official, Kijai, 1038lab, Wan2GP or any other names), one merged file, or a mapping from
            "transformer", "lq_projection", "decoder", "prompt" to files.
        version: auto | v1 | v1.1. An explicit version is obeyed, with a warning if the weights are known to be of the
            other.
        lq_cache_order: of a v1 projection: "fixed" (use the cache, then update it) or "as_trained" (update, then use:
            what the released v1 weights were trained with).
        num_heads: needed only where the head dim is not 128.
        dtype: of the weights; None keeps each tensor as stored.
        operations: layer namespace; see `models.operations`.
        prompt: the prompt context, LD or BLD with B = 1 and D = the weights' text dim, or a file that holds it; None
            takes the one among the weights or beside them.

    Raises:
        CheckpointError (a ValueError): the files are missing, damaged, refused, of unknown version, or do not fit the
            networks. The message names the file.
        ValueError: an argument is out of range.
    """
    if version not in ("auto", *VERSIONS):
        raise ValueError(f"load_flashvsr: expected version auto, {' or '.join(VERSIONS)}; got {version!r}.")
    if lq_cache_order not in LQ_CACHE_ORDERS:
        raise ValueError(
            f"load_flashvsr: expected lq_cache_order {' or '.join(LQ_CACHE_ORDERS)}; got {lq_cache_order!r}."
        )
    checkpoint = find_checkpoint(path)
    sources = choose_sources(checkpoint, version)
    version = resolve_version(checkpoint, sources, version)
    if version == "v1.1" and lq_cache_order == "as_trained":
        raise ValueError(
            f"{checkpoint.label}: expected lq_cache_order 'fixed' for v1.1, which was trained with that order; "
            f"got 'as_trained'. That choice exists for v1 weights only."
        )
    for source in sources.values():
        refuse_altered(source.file, version)
    config = _checked_config(checkpoint, sources, num_heads)
    context = _load_prompt(checkpoint, prompt, config.text_dim, version, dtype, device)
    with torch.device("meta"):
        modules = _networks(config, version, lq_cache_order, operations)
    for file in {source.file.path: source.file for source in sources.values()}.values():
        _check_merged_sha256(file)
    for part, module in modules.items():
        source = sources[part]
        wanted = module.state_dict().keys()
        keys = {name: key for key, name in source.names.items() if key in wanted}
        state = {keys[name]: tensor for name, tensor in source.file.read(keys, dtype, device)}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False).eval()
    family = next((s.file.metadata["family"] for s in sources.values() if "family" in s.file.metadata), FAMILY)
    return FlashVSR(
        transformer=modules["transformer"],
        lq_projection=modules["lq_projection"],
        decoder=modules["decoder"],
        prompt=context,
        version=version,
        family=family,
    )


def save_merged(
    model: FlashVSR | Mapping[str, Mapping[str, Tensor] | Tensor],
    path: PathLike,
    version: str,
    family: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes one merged safetensors file that `load_flashvsr` can read; an existing file is replaced at the end.

    Args:
        model: a FlashVSR, or state dicts with official keys under "transformer", "lq_projection", "decoder" and the
            context under "prompt".

    Raises:
        ValueError: the version is unknown, or `dtype` cannot hold a value.
    """
    if version not in VERSIONS:
        raise ValueError(f"save_merged: expected version {' or '.join(VERSIONS)}; got {version!r}.")
    parts: dict[str, Any]
    if isinstance(model, FlashVSR):
        parts = {part: getattr(model, part).state_dict() for part in NETWORKS} | {"prompt": model.prompt}
    else:
        parts = dict(model)
    named = {prefix + key: tensor for part, prefix in MERGED_PREFIXES.items() for key, tensor in parts[part].items()}
    named[MERGED_PROMPT] = parts["prompt"]
    tensors = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in sorted(named.items())}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"save_merged: expected values that {dtype} can hold; {name} has NaN or infinity. Use float32."
            )
    metadata = {
        "format": MERGED_FORMAT,
        "family": family,
        "version": version,
        "sha256": tensors_sha256(tensors.values()),
    }
    path = Path(path)
    part_path = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part_path, metadata)
        os.replace(part_path, path)
    finally:
        part_path.unlink(missing_ok=True)


def _networks(config: FlashVSRConfig, version: str, lq_cache_order: str, operations) -> dict[str, Any]:
    kind = CausalLQ4xProjection if version == "v1.1" else partial(BufferLQ4xProjection, cache_order=lq_cache_order)
    projection = kind(config.lq_hidden, config.dim, config.lq_layers, operations=operations)
    return {
        "transformer": Transformer(config, operations=operations),
        "lq_projection": projection,
        "decoder": TCDecoder(config.decoder_channels, config.out_dim, operations=operations),
    }


def _checked_config(checkpoint: Checkpoint, sources: Mapping[str, Source], num_heads: int | None) -> FlashVSRConfig:
    """The sizes of the weights, once every key, shape and dtype is known to fit."""
    entries = {part: sources[part].entries() for part in NETWORKS}
    try:
        config = FlashVSRConfig.from_tensors(*entries.values(), num_heads=num_heads)
    except (KeyError, IndexError):
        # A tensor that fixes a size is missing or has too few axes; the names can still be compared.
        config = None
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.label}: {error}") from error
    expected = expected_entries(config or names_config(entries))
    problems = []
    for part in NETWORKS:
        missing, extra = compare_keys(expected[part], entries[part])
        if extra and known_file(sources[part].file):
            # The official TCDecoder.ckpt is 7.6 MB larger than its decoder: its own script loads it with strict=False.
            extra = []
        shapes = [
            f"{key} {tuple(expected[part][key].shape)} expected, {tuple(tensor.shape)} found"
            for key, tensor in entries[part].items()
            if key in expected[part] and _differs(tensor, expected[part][key], config is not None)
        ]
        kinds = sorted({str(tensor.dtype) for tensor in entries[part].values() if not tensor.is_floating_point()})
        found = [
            ("missing", missing),
            ("not known", extra),
            ("of another shape", shapes),
            ("not floating-point", kinds),
        ]
        text = "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in found if keys)
        if text:
            problems.append(f"  {part} ({sources[part].file.path.name}): {text}")
    if problems or config is None:
        raise CheckpointError(
            f"{checkpoint.label}: expected the keys and shapes of FlashVSR; got",
            *problems,
            "The file is of another model, incomplete, or quantised in a form that is not supported.",
        )
    return config


def _differs(tensor: Tensor, expected: Tensor, sizes_known: bool) -> bool:
    """Whether the shape is wrong; without known sizes, whether the number of axes is."""
    return tensor.shape != expected.shape if sizes_known else tensor.ndim != expected.ndim


def expected_entries(config: FlashVSRConfig) -> dict[str, dict[str, Tensor]]:
    """Part → official key → meta tensor, for networks of these sizes."""
    with torch.device("meta"):
        return {part: module.state_dict() for part, module in _networks(config, "v1.1", "fixed", cast_on_use).items()}


def names_config(entries: Mapping[str, Mapping[str, Tensor]]) -> FlashVSRConfig:
    """A config with the right key names but not the right sizes: names depend only on the two layer counts."""
    return FlashVSRConfig(
        num_layers=_count(entries.get("transformer", {}), "blocks"),
        lq_layers=_count(entries.get("lq_projection", {}), "linear_layers"),
    )


def _count(entries: Mapping[str, Tensor], name: str) -> int:
    """1 + the largest index under `name` that is plausible for the number of keys."""
    found = [int(match[1]) for key in entries if (match := re.match(rf"{name}\.([0-9]{{1,9}})\.", key))]
    return 1 + max((index for index in found if index < min(len(entries), LAYER_LIMIT)), default=0)


def compare_keys(expected: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """(missing, extra) keys."""
    return [key for key in expected if key not in entries], [key for key in entries if key not in expected]


def _load_prompt(
    checkpoint: Checkpoint,
    prompt: Tensor | PathLike | None,
    text_dim: int,
    version: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Tensor:
    """The prompt context as BLD, B = 1."""
    if isinstance(prompt, Tensor):
        return _shaped_prompt("load_flashvsr(prompt=…)", prompt, text_dim).to(device=device, dtype=dtype)
    if prompt is not None:
        source = find_parts(WeightFile.open(prompt)).get("prompt")
        if source is None:
            raise CheckpointError(
                f"{prompt}: expected a prompt context (one tensor of 2 or 3 axes); got none. Get {PROMPT_URL}."
            )
    else:
        source = find_prompt(checkpoint, text_dim)
    refuse_altered(source.file, version)
    name = source.names["context"]
    _shaped_prompt(str(source.file.path), source.file.entries[name], text_dim)
    ((_, tensor),) = source.file.read([name], dtype, device)
    return _shaped_prompt(str(source.file.path), tensor, text_dim)


def _shaped_prompt(label: str, context: Tensor, text_dim: int) -> Tensor:
    shape = tuple(context.shape)
    fits = context.ndim in (2, 3) and 0 not in shape and shape[-1] == text_dim and (context.ndim == 2 or shape[0] == 1)
    if not fits or not context.is_floating_point():
        raise CheckpointError(
            f"{label}: expected a floating-point prompt context of shape (length, {text_dim}) or "
            f"(1, length, {text_dim}); got {shape} {context.dtype}. Get {PROMPT_URL}."
        )
    return context.reshape(1, -1, text_dim)


def _check_merged_sha256(file: WeightFile) -> None:
    """Raises a CheckpointError if a file of `save_merged` no longer holds what was written."""
    if file.metadata.get("format") != MERGED_FORMAT:
        return
    digest = tensors_sha256(tensor for _, tensor in file.read(sorted(file.entries)))
    if digest != file.metadata.get("sha256"):
        raise CheckpointError(
            f"{file.path}: expected tensors with sha256 {file.metadata.get('sha256')}; got {digest}. The file is "
            f"damaged: fetch it again."
        )
