"""What the memory promises are worth on this device: planted holders, a press with a kept model, worker processes."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...memory import holders, offload, probe
from ...memory.reading import size_text
from ...models.flashvsr import StreamOptions
from ...models.flashvsr.checkpoint import NANO_FILE
from ...models.video import ClipWriter
from .. import folder as folders
from ..clip import OutputOptions
from .record import Found, NotHere, Setting

REST = torch.device("cpu")
WIDE, TINY_WIDE = 4096, 1024
LAYERS = 4
CLIPS, CLIP_FRAMES, CLIP_SIDE = 10, 17, (32, 48)
HELD_LIST: list[Tensor] = []
REMEMBERED = SimpleNamespace()
"""Planted holders: what a node that remembers its inputs looks like."""


def network(setting: Setting) -> nn.Sequential:
    """A network of a few hundred MiB on the device (16 MiB in fp32 in a rehearsal)."""
    side = TINY_WIDE if setting.reduced else WIDE
    return nn.Sequential(*(nn.Linear(side, side, device=setting.device, dtype=setting.dtype) for _ in range(LAYERS)))


def offloaded(setting: Setting, model: nn.Module, name: str) -> offload.Receipt:
    """Moves a network to RAM, verified."""

    def move() -> None:
        model.to(REST)

    subject = offload.Subject(
        name=name,
        load_device=setting.device,
        offload_device=REST,
        loaded_bytes=lambda: sum(x.nbytes for x in model.parameters() if holders.same_device(x.device, setting.device)),
        move=move,
        tensors=lambda: [*model.named_parameters(), *model.named_buffers()],
    )
    return offload.offload(subject, lambda: probe.empty_cache(setting.device), reader=setting.probe)


@contextmanager
def in_a_list(model: nn.Module) -> Iterator[None]:
    HELD_LIST.append(next(model.parameters()).detach())
    try:
        yield
    finally:
        HELD_LIST.clear()


@contextmanager
def in_an_object(model: nn.Module) -> Iterator[None]:
    REMEMBERED.weight = next(model.parameters()).detach()
    try:
        yield
    finally:
        del REMEMBERED.weight


PLANTED = {"a list of a module": in_a_list, "an attribute of an object": in_an_object}


def planted_holders(setting: Setting) -> Found:
    """An offload with nothing in the way, then with a copy of a weight held somewhere: is that seen, and by whom?"""
    if setting.on_cpu:
        raise NotHere("No card was found here: on a CPU a model rests where it computes, and nothing can be offloaded.")
    found = Found({"receipts": []})
    for what, plant in {"nothing": None, **PLANTED}.items():
        model = network(setting)
        if plant is None:
            receipt = offloaded(setting, model, "a network")
            right = receipt.freed
        else:
            with plant(model):
                receipt = offloaded(setting, model, "a network")
            right = receipt.verdict is offload.Verdict.STILL_HELD and bool(receipt.held)
        by = ", ".join(holder.name for holder in receipt.held) or "nobody"
        row = {"planted": what, "verdict": receipt.verdict.value, "asked_bytes": receipt.asked, "held_by": by}
        found.figures["receipts"].append({**row, "left_tensors_bytes": receipt.left_tensors})
        found.lines.append(f"holder: {what}: {receipt.verdict.value}, held by {by}")
        if not right:
            found.missed.append(f"the verdict with {what} planted")
        del model
        gc.collect()
    return found


def press(setting: Setting) -> Found:
    """What a free-memory button does with a kept model and one that is not: bytes by reading, not by any book.

    In ComfyUI the buttons themselves are pressed by the tests; here the pack's own offload does what they do.
    """
    if setting.on_cpu:
        raise NotHere("No card was found here: a press has nothing to move on a CPU.")
    kept, other = network(setting), network(setting)
    before_weights = [weight.detach().to(REST, copy=True) for weight in kept.parameters()]
    loaded = probe.attempt(setting.probe, setting.device, settled=True)
    receipts = [offloaded(setting, model, name) for model, name in ((kept, "kept"), (other, "not kept"))]
    del other
    gc.collect()
    pressed = probe.attempt(setting.probe, setting.device, settled=True)
    whole = all(torch.equal(a, b) for a, b in zip(before_weights, kept.parameters(), strict=True))
    kept.to(setting.device)
    back = sum(weight.nbytes for weight in kept.parameters() if weight.device.type == setting.device.type)
    asked = sum(receipt.asked for receipt in receipts)
    left = None
    if loaded.allocated.bytes is not None and pressed.allocated.bytes is not None:
        left = loaded.allocated.bytes - pressed.allocated.bytes
    lines = [
        f"asked {size_text(asked)}, left {size_text(left)} by {loaded.allocated.source or 'no counter'}; the kept "
        f"model is {'whole' if whole else 'CHANGED'} in RAM and came back without a file ({size_text(back)})"
    ]
    promises = {
        "every byte left the device": left is None or left >= asked,
        "the kept weights are unchanged": whole,
        "the kept model comes back": back == receipts[0].asked,
    }
    figures: dict[str, Any] = {"asked_bytes": asked, "left_bytes": left, "kept_unchanged": whole, "back_bytes": back}
    return Found(figures, lines, [promise for promise, is_so in promises.items() if not is_so])


def two_workers(setting: Setting) -> Found:
    """Ten small clips with the embedded network: one worker process, then two."""
    clips, seconds = 2 if setting.reduced else CLIPS, {}
    if setting.device.type not in ("cpu", "cuda"):
        raise NotHere(f"Worker processes cannot reach a {setting.device.type} device from here.")
    found = Found({"clips": clips})
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in"
        source.mkdir()
        for index in range(clips):
            pictures = torch.rand(CLIP_FRAMES, *CLIP_SIDE, 3, generator=torch.Generator().manual_seed(index))
            with ClipWriter(str(source / f"{index:02d}.mp4"), CLIP_SIDE[1], CLIP_SIDE[0], 12) as writer:
                for picture in pictures:
                    writer.write(picture)
        for workers in (1, 2):
            output = Path(name) / f"out{workers}"
            settings = folders.WorkerSettings(
                str(setting.device), str(NANO_FILE), StreamOptions(scale=2.0), OutputOptions()
            )
            manifest = folders.Manifest(output, folders.folder_settings(settings))
            run = folders.FolderRun(tuple(folders.find_jobs(source, output)), (settings,), workers)
            report = folders.run_folder(run, manifest, lambda line: None)
            seconds[workers] = report.seconds
            found.figures[f"{workers}_workers"] = {"seconds": report.seconds, "done": len(report.done)}
            if len(report.done) != clips:
                found.missed.append(f"every clip with {workers} workers: {report.failed[0].error}")
    found.lines.append(
        f"{clips} clips: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s ({seconds[1] / seconds[2]:.2f} times)"
    )
    return found
