"""What is known about FlashVSR checkpoints: which keys belong to which part, and which files to which release.

Parts are recognised by their keys, never by file names: files are copied, renamed and mispaired. The most reported
"ghosting" of FlashVSR is a projection of one release loaded as that of the other; their shapes are identical.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...known_files import known_file
from ...weight_file import CheckpointError, WeightFile, tensors_sha256
from ..tc_decoder import CONDITION_CHANNELS

NETWORKS = ("transformer", "lq_projection", "decoder")
PARTS = (*NETWORKS, "prompt")
VERSIONS = ("v1", "v1.1")
FAMILY = "flashvsr"

MERGED_PREFIXES = {"transformer": "", "lq_projection": "lq_proj_in.", "decoder": "tc_decoder."}
"""Prefixes of the networks in one merged file."""
MERGED_PROMPT = "positive_conditioning"
MERGED_FORMAT = "steadyvsr-merged"
"""Metadata `format` of the merged files written here; only these have a `sha256` of their tensors to check."""

_MARKERS = {
    "transformer": (
        "patch_embedding.weight",
        "blocks.0.self_attn.q.weight",
        "time_projection.1.weight",
        "head.head.weight",
    ),
    "lq_projection": ("linear_layers.0.weight", "norm1.gamma", "norm2.gamma"),
    "decoder": ("decoder.1.weight", "decoder.5.conv.0.weight", "decoder.10.weight", "decoder.26.weight"),
    "vae": ("conv2.weight", "decoder.middle.0.residual.0.gamma", "decoder.head.0.gamma"),
}
"""Two markers under one prefix identify a part (also a Wan VAE, so that its keys are not mistaken for another's)."""
_KEYS = {
    "transformer": re.compile(r"(patch_embedding|text_embedding|time_embedding|time_projection|blocks|head)\."),
    "lq_projection": re.compile(r"(conv[12]|norm[12]|linear_layers)\."),
    "decoder": re.compile(r"(decoder|encoder)\."),
    "vae": re.compile(r"(encoder|decoder|conv[12])\."),
}
_IGNORED = {"decoder": "encoder."}
"""Keys of a part that no network here uses: the TC decoder was made from an autoencoder."""
_PROMPT_NAMES = ("", "context", MERGED_PROMPT, "posi_prompt", "posi_context", "prompt", "prompt_emb", "prompt_embeds")
_IDENTITY = {
    "transformer": ("patch_embedding.bias", "head.modulation"),
    "lq_projection": ("norm1.gamma", "conv1.bias"),
    "decoder": ("decoder.1.bias", "decoder.26.bias"),
    "prompt": ("context",),
}
"""Small tensors whose raw bytes identify a part."""


KNOWN_PROJECTIONS: dict[str, str] = {}
"""sha256 of the raw bytes of norm1.gamma and conv1.bias, as stored → version. Empty, because the released files to
compute it from were not available when this was written. `steadyvsr inspect` prints it for any file."""


@dataclass(frozen=True)
class Source:
    """Where one part is stored.

    Attributes:
        names: official key → name in the file ("context" for the prompt).
        ignored: names of tensors of the part that nothing here uses.
    """

    part: str
    file: WeightFile
    names: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def entries(self) -> dict[str, Tensor]:
        """Official key → tensor on the meta device."""
        return {key: self.file.entries[name] for key, name in self.names.items()}

    def fingerprint(self) -> str | None:
        """sha256 of the raw bytes of the part's identifying tensors, as stored; None if one is missing."""
        keys = _IDENTITY.get(self.part, ())
        if not keys or any(key not in self.names for key in keys):
            return None
        return tensors_sha256(tensor for _, tensor in self.file.read(self.names[key] for key in keys))


@dataclass(frozen=True)
class Evidence:
    """A version, and how it is known."""

    version: str
    how: str


def find_parts(file: WeightFile) -> dict[str, Source]:
    """Part → where it is stored in the file, under whatever prefix. A Wan VAE is the part "vae".

    Raises:
        CheckpointError: the file holds a part twice.
    """
    names = list(file.entries)
    prompts = [name for name in names if _is_prompt(file, name)]
    if prompts:
        names.remove(prompts[0])
    prefixes = _find_prefixes(file, names)
    keys: dict[str, dict[str, str]] = {part: {} for part in prefixes}
    ignored: dict[str, list[str]] = {part: [] for part in prefixes}
    for name in names:
        part = _part_of(name, prefixes)
        if part is None:
            continue
        key = name.removeprefix(prefixes[part])
        if part in _IGNORED and key.startswith(_IGNORED[part]):
            ignored[part].append(name)
        else:
            keys[part][key] = name
    sources = {part: Source(part, file, keys[part], tuple(ignored[part])) for part in prefixes}
    if prompts:
        sources["prompt"] = Source("prompt", file, {"context": prompts[0]})
    return sources


def known_version(source: Source) -> Evidence | None:
    """The release of a transformer or LQ projection, if anything trustworthy tells it.

    In order of cost: the metadata of a merged file, the projection's fingerprint, and the sha256 of the whole file,
    which is computed only if the size is that of a published file.
    """
    if source.part not in ("transformer", "lq_projection"):
        return None
    stated = metadata_version(source.file)
    if stated:
        return Evidence(stated, "the metadata of the file")
    if source.part == "lq_projection" and KNOWN_PROJECTIONS:
        version = KNOWN_PROJECTIONS.get(source.fingerprint() or "")
        if version:
            return Evidence(version, "the sha256 of norm1.gamma and conv1.bias")
    known = known_file(source.file)
    if known and known.version:
        return Evidence(known.version, f"the sha256 of the file, which is that of {known.name}")
    return None


def metadata_version(file: WeightFile) -> str | None:
    """`version` in the metadata of a merged file; "1", "1.0" and "1.1" count only together with a `family`."""
    stated = file.metadata.get("version", "").strip().lower()
    if "family" in file.metadata:
        stated = {"1": "v1", "1.0": "v1", "v1.0": "v1", "1.1": "v1.1"}.get(stated, stated)
    return stated if stated in VERSIONS else None


def version_hint(names: Iterable[str]) -> str | None:
    """The version that file or folder names suggest. It is shown as a hint and never trusted."""
    text = " ".join(names).lower()
    if re.search(r"1[._]1(?!\d)", text.replace("wan2_1", "").replace("wan2.1", "")):
        return "v1.1"
    return None


def _is_prompt(file: WeightFile, name: str) -> bool:
    named = name.split(".")[0] in _PROMPT_NAMES
    return file.entries[name].ndim in (2, 3) and (named or len(file.entries) == 1)


def _find_prefixes(file: WeightFile, names: Iterable[str]) -> dict[str, str]:
    """Part → the prefix of at least two of its markers."""
    names = set(names)
    found = {}
    for part, markers in _MARKERS.items():
        hits = [
            name.removesuffix(marker) for marker in markers for name in names if ("." + name).endswith("." + marker)
        ]
        prefixes = sorted(
            prefix for prefix, count in Counter(hits).items() if count >= 2 and not _is_taehv(file, part, prefix)
        )
        if len(prefixes) > 1:
            listed = " and ".join(repr(prefix) for prefix in prefixes[:4])
            raise CheckpointError(
                f"{file.path}: expected one {part}; got {len(prefixes)}, under {listed}. Split the file."
            )
        if prefixes:
            found[part] = prefixes[0]
    return found


def _is_taehv(file: WeightFile, part: str, prefix: str) -> bool:
    """Whether it is a TAEHV decoder, which has the TC decoder's key names but takes no condition."""
    first = file.entries.get(prefix + "decoder.1.weight")
    return part == "decoder" and first is not None and first.ndim == 4 and first.shape[1] <= CONDITION_CHANNELS


def _part_of(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The part whose prefix fits and is longest; among parts that share one, the one whose keys look like this name."""
    fitting = [part for part, prefix in prefixes.items() if name.startswith(prefix)]
    if not fitting:
        return None
    longest = max(len(prefixes[part]) for part in fitting)
    fitting = [part for part in fitting if len(prefixes[part]) == longest]
    return next((part for part in fitting if _KEYS[part].match(name[longest:])), fitting[0])
