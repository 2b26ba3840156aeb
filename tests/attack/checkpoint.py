"""Attacks the readers of weights with damaged and hostile files: a clear error or the right weights, and nothing else.

Each file is a spoilt copy of a good tiny one (`damages`). `load_flashvsr` or `load_wan_vae` gets it by itself or in
its folder, or `steadyvsr inspect` does, in a process of its own that may take 10 s and twice the memory of a good file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from steadyvsr import cli
from steadyvsr.models import known_files
from steadyvsr.models.flashvsr.checkpoint import load_flashvsr
from steadyvsr.models.wan_vae import WanVAE, load_wan_vae
from steadyvsr.tests.attack import archive_damages, safetensors_damages
from steadyvsr.tests.attack.damages import ANY, REFUSED, Spoilt
from steadyvsr.tests.attack.outcome import Outcome, announce, failure_of, forget_peak, isolated, peak_bytes, unclear
from steadyvsr.tests.models.checkpoint_files import OFFICIAL, random_parts, write_folder, write_merged
from torch import Tensor

FACTOR = 2
"""A spoilt file may take so many times the memory of a good one of its size."""
MERGED, VAE = "model.safetensors", "vae.pth"
READERS = ("load", "load", "load", "load", "inspect")
VERSION = "v1.1"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A good file among the files that it is loaded with.

    Attributes:
        name: of the file.
        content: its bytes as safetensors, and its tensors under the keys in it.
        part: part of a FlashVSR model; "merged" for a whole one in one file, "vae" for a Wan VAE.
    """

    name: str
    content: bytes
    tensors: Tensors
    part: str


@cache
def good_parts() -> dict[str, Tensors]:
    torch.set_num_threads(1)
    return random_parts()


@cache
def targets() -> tuple[Target, ...]:
    """The whole model in one file, each part in its own, and a VAE."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        content = write_merged(Path(folder) / MERGED, good_parts(), VERSION).read_bytes()
    found.append(Target(MERGED, content, {}, "merged"))
    for part in ("transformer", "lq_projection", "decoder", "prompt"):
        tensors = good_parts()[part]
        found.append(Target(OFFICIAL[part], save(tensors), tensors, part))
    torch.manual_seed(0)
    vae = {key: value.detach().clone() for key, value in WanVAE(dim=4).state_dict().items()}
    found.append(Target(VAE, save(vae), vae, "vae"))
    return tuple(found)


def loaded(path: Path, part: str) -> Tensors:
    """What the loader makes of the file or folder, under one name for each tensor."""
    if part == "vae":
        return dict(load_wan_vae(path).state_dict())
    model = load_flashvsr(path, version=VERSION)
    found = {f"{name}.{key}": value for name in weights_of(model) for key, value in weights_of(model)[name].items()}
    return found | {"prompt.context": model.prompt}


def weights_of(model: Any) -> dict[str, Tensors]:
    return {name: getattr(model, name).state_dict() for name in ("transformer", "lq_projection", "decoder")}


def wanted(part: str) -> Tensors:
    if part == "vae":
        return next(target.tensors for target in targets() if target.part == "vae")
    return {f"{name}.{key}": value for name, tensors in good_parts().items() for key, value in tensors.items()}


def inspected(path: Path) -> str:
    """What `steadyvsr inspect` says.

    Raises:
        ValueError: it says it as an error.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["inspect", str(path)])
    if code == cli.EXIT_BAD_INPUT:
        raise ValueError(err.getvalue().strip())
    assert code == 0, code
    return out.getvalue()


def good_growth(part: str, reader: str) -> int:
    """Bytes that this process grows by when it reads a good file, in a fork of its own."""
    found = isolated(_good, part, reader)
    assert found.good, found
    return found.grown_bytes


@cache
def allowed_growth(part: str, reader: str) -> int:
    return good_growth(part, reader)


def _good(part: str, reader: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        target = next(target for target in targets() if target.part == part)
        path = lay_out(Path(folder), target, target.content, ".safetensors")
        before = forget_peak()
        inspected(path) if reader == "inspect" else loaded(path, part)
        return Outcome(part, "right", True, grown_bytes=peak_bytes() - before)


def lay_out(folder: Path, target: Target, content: bytes, suffix: str | None) -> Path:
    """Writes the file, with the other parts of its model beside it; returns what is to be loaded."""
    name = Path(target.name)
    name = name.with_suffix(suffix) if suffix else name
    if target.part not in ("merged", "vae"):
        write_folder(folder, good_parts(), {part: file for part, file in OFFICIAL.items() if part != target.part})
    (folder / name).write_bytes(content)
    return folder if target.part not in ("merged", "vae") else folder / name


def spoilt(target: Target, rng: random.Random, canary: Path) -> tuple[Spoilt, str | None]:
    """The damaged file, and the suffix of the form that it was made from."""
    form = rng.choice(["safetensors", "safetensors", "archive"]) if target.tensors else "safetensors"
    # The only tensor of a file is a prompt under any name, and beside a prompt anything may lie.
    lenient = (
        (safetensors_damages.renamed, archive_damages.renamed_key, safetensors_damages.added, archive_damages.wrapped)
        if target.part == "prompt"
        else ()
    )
    if form == "safetensors":
        usable = [
            damage
            for damage in safetensors_damages.SAFETENSORS
            if target.part != "prompt" or damage is not safetensors_damages.swapped
        ]
        damage = rng.choice([*ANY, *usable, *usable])
        found, suffix = damage(target.content, rng), ".safetensors"
        return (replace(found, touched=0) if damage in lenient else found), suffix
    damage: Callable[..., Spoilt] = rng.choice([*ANY, *archive_damages.ARCHIVES * 2, archive_damages.with_code])
    if damage in ANY:
        return damage(archive_damages.saved(target.tensors, rng), rng), ".ckpt"
    arguments = (canary,) if damage is archive_damages.with_code else ()
    found = damage(target.tensors, rng, *arguments)
    return (replace(found, touched=0) if damage in lenient else found), ".ckpt"


def run(seed: int) -> Outcome:
    """One damaged file."""
    rng = random.Random(seed)
    target, reader = rng.choice(targets()), rng.choice(READERS)
    return isolated(attack, seed, target, reader, allowed_growth(target.part, reader))


def attack(seed: int, target: Target, reader: str, growth: int) -> Outcome:
    warnings.simplefilter("ignore")
    logging.disable()
    rng = random.Random(-1 - seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "weights"
        folder.mkdir()
        canary = Path(name) / "canary"
        damaged, suffix = spoilt(target, rng, canary)
        path = lay_out(folder, target, damaged.content, damaged.suffix or suffix)
        published = rng.random() < 0.1 and damaged.content != target.content
        case = f"{reader} {target.part} ({suffix}): {damaged.how}{', under a published size' if published else ''}"
        announce(case)
        if published:
            publish(folder, len(damaged.content), target)
        if damaged.never_torch:
            guard(target, canary)
        # A good file of that size would be as much larger in memory.
        limit = FACTOR * (growth + max(0, len(damaged.content) - len(target.content)))
        size = len(damaged.content)
        touched = damaged.touched if not published else REFUSED
        del damaged
        before = forget_peak()
        end = ended(path, target.part, reader, touched, case)
        grown = peak_bytes() - before
        if canary.exists():
            end = Outcome(case, "runs code, or gives a tar to torch.load", False, str(path))
        elif grown > limit and end.good:
            figures = f"{grown >> 20} MiB for a file of {size >> 10} KiB; a good one's limit is {limit >> 20} MiB"
            end = Outcome(case, "too much memory", False, figures)
        return Outcome(end.case, end.end, end.good, end.detail, grown_bytes=grown)


def guard(target: Target, canary: Path) -> None:
    """Touches the canary if `torch.load` is given the damaged file."""
    original, stem = torch.load, Path(target.name).stem

    def load(file: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(getattr(file, "name", file)).stem == stem:
            canary.touch()
        return original(file, *arguments, **keywords)

    torch.load = load


def publish(folder: Path, size: int, target: Target) -> None:
    """Enters a file of this name and size, with another hash, among the published ones."""
    (name,) = [path.name for path in folder.iterdir() if path.name.startswith(Path(target.name).stem)]
    known = known_files.KnownFile(f"somebody/model {name}", "0" * 64, size, None)
    known_files.KNOWN_FILES = (*known_files.KNOWN_FILES, known)


def ended(path: Path, part: str, reader: str, touched: int, case: str) -> Outcome:
    try:
        if reader == "inspect":
            problem = next(filter(None, map(unclear, inspected(path).splitlines())), "")
            return Outcome(case, f"described with {problem}" if problem else "described", not problem)
        found = loaded(path, part)
    except (ValueError, OSError) as error:
        message = str(error)
        if type(error).__name__ not in ("CheckpointError", "ValueError", "FileNotFoundError", "PermissionError"):
            return failure_of(case, error)
        problem = unclear(message) or ("" if path.name in message else "a message that names no file")
        return Outcome(case, problem or "refused", not problem, message[:300])
    except BaseException as error:  # noqa: B036  whatever it is, it is the finding
        return failure_of(case, error)
    return compared(found, wanted(part), touched, case)


def compared(found: Tensors, right: Tensors, touched: int, case: str) -> Outcome:
    if touched == REFUSED:
        return Outcome(case, "accepted", False, "it had to be refused")
    if found.keys() != right.keys() or any(found[key].shape != right[key].shape for key in right):
        return Outcome(case, "other weights", False, "keys or shapes differ")
    differing = [key for key in right if not torch.equal(found[key].float(), right[key].float())]
    if len(differing) > touched:
        return Outcome(case, "other weights", False, f"{len(differing)} tensors differ: {differing[:3]}")
    if not all(tensor.isfinite().all() for tensor in found.values()):
        return Outcome(case, "other weights", False, "NaN or infinity")
    return Outcome(case, "right", True)
