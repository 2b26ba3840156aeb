"""What the loader nodes share: their inputs, where a model goes, whether it is there already, and the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import folder_paths
import torch
from comfy_api.v0_0_2 import io

from ...memory import budget, probe
from ...memory.reading import size_text
from ...patches import hooks, prompt, residency
from ...patches.kept import PINNED, POLICIES, Entry, Key, registry
from ...patches.versions import directed, supported, torch_devices, unique_id
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


def file_input(id: str, folder: str) -> io.Input:
    return io.Combo.Input(id, options=folder_paths.get_filename_list(folder), tooltip=f"A file of models/{folder}.")


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
    paths = {name: folder_paths.get_full_path(folder, name) if name else None for name in names}
    stats = {name: path and os.stat(path) for name, path in paths.items()}
    return repr([(name, stat and (stat.st_mtime_ns, stat.st_size)) for name, stat in stats.items()])


def choose_place(device: str, allow_cpu: bool, files: ModelFiles, node: str) -> tuple[torch.device | None, str]:
    """Where a model of these files will compute, and why; None: ComfyUI decides.

    With auto, a model that is loaded already stays where it is.

    Raises:
        ValueError: there is no such device, or the model fits on none.
    """
    if device == DEFAULT:
        return None, "ComfyUI's choice"
    known = {str(known): known for known in [*torch_devices(), CPU]}
    if device in known:
        return known[device], "chosen by name"
    if device != AUTO:
        raise ValueError(f"{node}: expected a device of {', '.join(known)}; got {device!r}. Choose one of them.")
    # A second copy on another card would cost more than the fuller card does.
    for name, there in known.items():
        if registry().find(files.key(name)) is not None:
            return there, "it is loaded for this device already"
    readings = [probe.attempt(probe.current(), there) for there in known.values() if there != CPU]
    if not readings:
        return None, "there is no accelerator: ComfyUI computes on the CPU"
    try:
        choice = budget.choose_device(files.bytes, readings, cpu_allowed=allow_cpu)
    except ValueError as error:
        raise ValueError(f"{node}: {error} Or choose default: ComfyUI makes room and loads partially.") from error
    return torch.device(choice.device), choice.reason


def put(patcher: Any, device: torch.device | None) -> Any:
    """A patcher that was just made, directed to a device; see `versions.directed`."""
    return patcher if device is None or device == patcher.load_device else directed(patcher, device)


def patchers_in(parts: Iterable[Any]) -> list[Any]:
    """The ModelPatchers of several models; a part may be None."""
    return [patcher for part in parts if part is not None for patcher in residency.patchers_of(part)]


class Loading:
    """One execution of a loader node: finds or reads the model, offloads it if asked to, and reports.

    Attributes:
        node, node_id: the node's name, and its id in the graph.
        name: of the model, for reports.
        keep_loaded, offload_after_load, device, allow_cpu: the inputs that loaders share.
    """

    def __init__(
        self,
        running: Any,
        node: str,
        name: str,
        keep_loaded: str,
        offload_after_load: bool,
        device: str = DEFAULT,
        allow_cpu: bool = False,
    ) -> None:
        self.node, self.node_id, self.name = node, unique_id(running), name
        self.keep_loaded, self.offload_after_load = keep_loaded, offload_after_load
        self.device, self.allow_cpu = device, allow_cpu
        self._left: set[str] = set()
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
        place, reason = choose_place(self.device, self.allow_cpu, files, self.node)
        key = files.key(DEFAULT if place is None else str(place))

        def read() -> Any:
            self._report["source"] = "disk"
            return load(place)

        if (known := registry().find(key)) is not None:
            self.leave(known.patchers)
        hooks.install()  # again: a pack imported after this one may have replaced them
        book = residency.prompt_ledger()
        with book.phase(f"load {self.name}"):
            value = registry().obtain(
                key, self.keep_loaded, read, patchers_of, self.name, lambda: self._admit(files.bytes)
            )
        entry = registry().find(key)
        patchers = patchers_of(value)
        self._report |= {
            "predicted_bytes": files.bytes,
            "weights_bytes": sum(patcher.model_size() for patcher in patchers),
            "device": str(patchers[0].load_device),
            "offload_device": str(patchers[0].offload_device),
            "device_reason": reason,
        }
        if entry is not None:
            self._keeping(entry)
        return value

    def leave(self, patchers: Iterable[Any]) -> None:
        """What of these is on its device now was not put there by this execution, which leaves it there."""
        self._left |= {residency.handle_of(patcher.model) for patcher in patchers if patcher.loaded_size()}

    def note(self, **more: Any) -> None:
        self._report |= more

    def hand_out(self, *parts: Any) -> io.NodeOutput:
        """The node's outputs: clones of what the owner has. A part may be None.

        Packs change a patcher's options in place, and the owner's must stay as it is; a VAE has no clone.
        """
        return self.output(*(part.clone() if hasattr(part, "clone") else part for part in parts))

    def output(self, *models: Any) -> io.NodeOutput:
        """The node's outputs, taken off their device first if that is asked for. A model may be None."""
        if self.offload_after_load:
            self._offload(patchers_in(models))
        return with_report(*models, report=self._report)

    def _offload(self, patchers: list[Any]) -> None:
        stay = [patcher for patcher in patchers if self._stays(patcher)]
        receipts = [
            receipt
            for patcher in patchers
            if not any(patcher is other for other in stay)
            for receipt in residency.offload_model(patcher)
        ]
        stays_bytes = sum(patcher.loaded_size() for patcher in stay)
        self._report |= {
            "offload": [receipt.to_json() for receipt in receipts],
            "stays_bytes": stays_bytes,
            "resident_bytes_after": stays_bytes + sum(receipt.still_loaded for receipt in receipts),
        }
        for receipt in receipts:
            log.info("%s %s: %s", self.node, receipt.name, receipt)
        if receipts:
            worst = max(receipts, key=lambda r: r.still_loaded + r.unnamed + sum(holder.bytes for holder in r.held))
            node_status.send(self.node_id, receipt={"line": str(worst), "verdict": worst.verdict.value})

    def _stays(self, patcher: Any) -> bool:
        """Whether it was on its device before this node ran, or is pinned: a promise that its own loader keeps, too."""
        owner = registry().owner_of(patcher)
        return residency.handle_of(patcher.model) in self._left or (owner is not None and owner.policy == PINNED)

    def _admit(self, needed: int) -> None:
        """Checks whether the weights fit into RAM, and releases kept models that nobody uses where they do not."""
        admission = residency.may_load(needed, CPU)
        if admission.short:
            registry().yield_ram(lambda: residency.may_load(needed, CPU).short > 0, f"{self.name} needs RAM")
            admission = residency.may_load(needed, CPU)
        if admission.short:
            log.warning("%s: %s: %s", self.node, self.name, admission)
        # A shortage is no error: the operating system may still swap, and the prediction may be too high.
        self._report["admission"] = str(admission)

    def _keeping(self, entry: Entry) -> None:
        """Reports which policy applies, and why where that is not the one that this node asks for."""
        asked, wishes = self.keep_loaded, entry.wishes_in(prompt.running())
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
