"""What the loader nodes share: their inputs, where a model goes, whether it is there already, and the report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.v0_0_2 import io

from ...memory import budget, probe
from ...memory.offload import Receipt
from ...memory.reading import size_text
from ...patches import hooks, prompt, residency
from ...patches.kept import POLICIES, Entry, Key, registry
from ...patches.versions import directed, supported, torch_devices
from .. import node_status
from ..sockets import (
    ADVANCED,
    allow_cpu_input,
    device_input,
    keep_loaded_input,
    offload_input,
    report_output,
    with_report,
)

log = logging.getLogger("steadyvsr.nodes")

CATEGORY = "SteadyVSR/Loaders"
REPORT_TOOLTIP = "What was loaded and measured, as JSON."
DEFAULT, AUTO = "default", "auto"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where a model computes, and why. With `device` None, ComfyUI decides."""

    device: torch.device | None
    reason: str

    @property
    def option(self) -> str:
        return DEFAULT if self.device is None else str(self.device)


@dataclass(frozen=True)
class Wish:
    """What the shared inputs of a loader ask for."""

    keep_loaded: str
    offload_after_load: bool
    device: str = DEFAULT
    allow_cpu: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files, before they are read.

    Attributes:
        kind: of model, for the registry.
        paths: of the files.
        options: those that change the result; not the device.
        bytes: predicted size of the weights.
    """

    kind: str
    paths: Sequence[str]
    options: Mapping[str, object]
    bytes: int

    def key(self, device: str) -> Key:
        """The registry's key for a device."""
        return Key.of(self.kind, self.paths, {**self.options, "device": device})


def loader_schema(
    node_id: str, name: str, description: str, inputs: list[io.Input], outputs: list[io.Output], aliases: list[str]
) -> io.Schema:
    """A loader's own inputs and outputs with those that every loader has."""
    return io.Schema(
        node_id=node_id,
        display_name=name,
        category=CATEGORY,
        description=description,
        inputs=[
            *inputs,
            keep_loaded_input(),
            offload_input(),
            device_input(
                [DEFAULT, AUTO],
                "Where it computes. default: ComfyUI decides, makes room, and loads partially what does not fit. "
                "auto: the device with the most measured free memory, if the whole model fits there.",
                optional=True,
                **ADVANCED,
            ),
            allow_cpu_input(
                "With device auto: compute on the CPU where the model fits on no card. Otherwise that is an error."
            ),
        ],
        hidden=[io.Hidden.unique_id],
        outputs=[*outputs, report_output(REPORT_TOOLTIP)],
        **supported(io.Schema, search_aliases=aliases),
    )


def file_in(folder: str, name: str, node: str) -> str:
    """Path of a file of a model folder, found the way ComfyUI finds it.

    Raises:
        ValueError: there is no such file.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{node}: expected a file in models/{folder}; got {name!r}, which is not there. Put it there, or choose "
            "another."
        )
    return path


def fingerprint(folder: str, names: Iterable[str | None]) -> str:
    """Changes when one of the files is replaced. A missing file is an error of the node, not of this function."""
    stats = []
    for name in names:
        path = folder_paths.get_full_path(folder, name) if name else None
        stat = Path(path).stat() if path else None
        stats.append((name, stat and (stat.st_mtime_ns, stat.st_size)))
    return repr(stats)


def choose_place(wish: Wish, files: ModelFiles, node: str) -> Place:
    """Where a model of these files will compute. With auto, one that is loaded already stays where it is.

    Raises:
        ValueError: there is no such device, or the model fits on none.
    """
    devices = torch_devices()
    if wish.device == DEFAULT:
        return Place(None, "ComfyUI's choice")
    if wish.device != AUTO:
        known = {str(known): known for known in [*devices, CPU]}
        if wish.device not in known:
            raise ValueError(
                f"{node}: expected a device of {', '.join(known)}; got {wish.device!r}. Choose one of them."
            )
        return Place(known[wish.device], "chosen by name")
    for there in [*devices, CPU]:
        if registry().find(files.key(str(there))) is not None:
            return Place(there, "it is loaded for this device already")
    readings = [probe.attempt(probe.current(), there) for there in devices if there != CPU]
    if not readings:
        return Place(None, "there is no accelerator: ComfyUI computes on the CPU")
    try:
        choice = budget.choose_device(files.bytes, readings, cpu_allowed=wish.allow_cpu)
    except ValueError as error:
        raise ValueError(f"{node}: {error} Or choose default: ComfyUI makes room and loads partially.") from error
    return Place(torch.device(choice.device), choice.reason)


def put(patcher: Any, device: torch.device | None) -> Any:
    """A patcher that was just made, directed to a device; see `versions.directed`."""
    return patcher if device is None or device == patcher.load_device else directed(patcher, device)


class Loading:
    """One execution of a loader node: finds or reads the model, offloads it if asked to, and reports."""

    def __init__(self, node: str, node_id: str | None, name: str, wish: Wish) -> None:
        self.node, self.node_id, self.name, self.wish = node, node_id, name, wish
        self._report: dict[str, Any] = {"node": node, "name": name, "source": "memory: nothing was read"}

    def obtain(
        self,
        files: ModelFiles,
        load: Callable[[torch.device | None], Any],
        patchers_of: Callable[[Any], Sequence[Any]] = residency.patchers_of,
    ) -> Any:
        """The owner's object for these files; see `Registry.obtain`.

        Args:
            load: reads it for a device; None: ComfyUI decides.
            patchers_of: the ModelPatchers inside it.
        """
        place = choose_place(self.wish, files, self.node)
        key, policy = files.key(place.option), self.wish.keep_loaded

        def read() -> Any:
            self._report["source"] = "disk"
            return load(place.device)

        hooks.install()  # again: a pack imported after this one may have replaced them
        book = residency.prompt_ledger()
        with book.phase(f"load {self.name}"):
            value = registry().obtain(key, policy, read, patchers_of, self.name, lambda: self._admit(files.bytes))
        entry = registry().find(key)
        patchers = patchers_of(value)
        self._report |= {
            "predicted_bytes": files.bytes,
            "weights_bytes": sum(patcher.model_size() for patcher in patchers),
            "device": str(patchers[0].load_device),
            "offload_device": str(patchers[0].offload_device),
            "device_reason": place.reason,
        }
        if entry is not None:
            self._keeping(entry, policy)
        return value

    def note(self, **more: Any) -> None:
        self._report |= more

    def hand_out(self, *parts: Any) -> io.NodeOutput:
        """The node's outputs: clones of what the owner has. A part may be None.

        Packs change a patcher's options in place, and the owner's must stay as it is; a VAE has no clone.
        """
        return self.output(*(part.clone() if hasattr(part, "clone") else part for part in parts))

    def output(self, *models: Any) -> io.NodeOutput:
        """The node's outputs, taken off their device first if that is asked for. A model may be None."""
        if self.wish.offload_after_load:
            self._offload(model for model in models if model is not None)
        return with_report(*models, report=self._report)

    def _offload(self, models: Iterable[Any]) -> None:
        """Takes models off their device and verifies it; the receipts go into the report."""
        receipts = [receipt for model in models for receipt in residency.offload_model(model)]
        self._report["offload"] = [receipt.to_json() for receipt in receipts]
        self._report["resident_bytes_after"] = sum(receipt.still_loaded for receipt in receipts)
        for receipt in receipts:
            log.info("%s %s: %s", self.node, receipt.name, receipt)
        if receipts:
            worst = max(receipts, key=_badness)
            node_status.send(self.node_id, receipt={"line": str(worst), "verdict": worst.verdict.value})

    def _admit(self, needed: int) -> None:
        """Checks whether the weights fit into RAM, and releases kept models that nobody uses where they do not."""
        admission = residency.may_load(needed, CPU)
        if admission.short:
            registry().yield_ram(lambda: residency.may_load(needed, CPU).short > 0, f"{self.name} needs RAM")
            admission = residency.may_load(needed, CPU)
        if admission.short:
            log.warning("%s: %s: %s", self.node, self.name, admission)
        self._report["admission"] = str(admission)

    def _keeping(self, entry: Entry, asked: str) -> None:
        wishes = entry.wishes_in(prompt.running())
        stronger = [node for node, wish in wishes.items() if wish == entry.policy != asked]
        reason = f"node {stronger[0]} asks for {entry.policy}" if stronger else ""
        if POLICIES.index(entry.policy) < POLICIES.index(asked):
            reason = f"released: kept models may fill {size_text(registry().budget_bytes())} of RAM together"
        self._report |= {
            "keep_loaded": entry.policy,
            "keep_loaded_reason": reason or "as this node asks",
            "registry": {"id": entry.id, "loads": entry.loads, "hits": entry.hits},
        }
        node_status.send(self.node_id, policy=entry.policy, policy_reason=reason)


def _badness(receipt: Receipt) -> int:
    return receipt.still_loaded + sum(holder.bytes for holder in receipt.held) + receipt.unnamed
