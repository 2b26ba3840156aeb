"""What the loader nodes share: where a model goes, whether it is there already, and what the report says of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui

from ...memory import budget, probe
from ...memory.offload import Receipt
from ...memory.reading import size_text
from ...patches import hooks as wrappers
from ...patches import prompt, residency
from ...patches.kept import POLICIES, Entry, Key, registry
from ...patches.versions import directed, supported, torch_devices
from .. import node_status

log = logging.getLogger("steadyvsr.nodes")

CATEGORY = "SteadyVSR/Loaders"
DEFAULT, AUTO = "default", "auto"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where a model computes and why. `device` None leaves it where ComfyUI puts it."""

    device: torch.device | None
    reason: str

    @property
    def option(self) -> str:
        return "default" if self.device is None else str(self.device)


def device_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "device",
            options=list(dict.fromkeys([DEFAULT, AUTO, *map(str, torch_devices()), "cpu"])),
            default=DEFAULT,
            optional=True,
            tooltip="Where it computes. default: ComfyUI decides, makes room, and loads partially what does not fit. "
            "auto: the device with the most measured free memory, if the whole model fits there.",
            **supported(io.Combo.Input, advanced=True),
        ),
        io.Boolean.Input(
            "allow_cpu",
            default=False,
            optional=True,
            tooltip="With device auto: compute on the CPU where the model fits on no card. Otherwise that is an error.",
            **supported(io.Boolean.Input, advanced=True),
        ),
    ]


def offload_input() -> io.Input:
    return io.Boolean.Input(
        "offload_after_load",
        default=True,
        optional=True,
        tooltip="The model ends in RAM, off its device, and the report says by measurement that it did. With keep or "
        "pin it is off the device now and kept from then on.",
    )


def report_output() -> io.Output:
    return io.String.Output("report", display_name="report", tooltip="What was loaded and measured, as JSON.")


def file_in(folder: str, name: str, node: str) -> str:
    """Path of a file of a model folder, found the way ComfyUI finds it.

    Raises:
        ValueError: it is not there.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{node}: expected a file in models/{folder}; got {name!r}, which is not there. Put it there, or choose "
            "another one."
        )
    return path


def fingerprint(folder: str, names: Iterable[str | None]) -> str:
    """Changes when one of the files is replaced. A file that is missing is the node's error, not this one's."""
    stats = []
    for name in names:
        path = folder_paths.get_full_path(folder, name) if name else None
        stat = Path(path).stat() if path else None
        stats.append((name, stat and (stat.st_mtime_ns, stat.st_size)))
    return repr(stats)


def choose_place(device: str, allow_cpu: bool, key_of: Callable[[str], Key], needed: int, node: str) -> Place:
    """Where a model of these files shall compute.

    Args:
        key_of: the registry's key for a device; a model that is there already stays where it is.
        needed: bytes of its weights, predicted.

    Raises:
        ValueError: no such device, or none that it fits on.
    """
    devices = torch_devices()
    if device == DEFAULT:
        return Place(None, "ComfyUI's choice")
    if device != AUTO:
        known = {str(known): known for known in [*devices, CPU]}
        if device not in known:
            raise ValueError(f"{node}: expected a device of {', '.join(known)}; got {device!r}. Choose one of them.")
        return Place(known[device], "chosen by name")
    for there in [*devices, CPU]:
        if registry().find(key_of(str(there))) is not None:
            return Place(there, "it is loaded for this device already")
    readings = [probe.attempt(probe.current(), there) for there in devices if there != CPU]
    if not readings:
        return Place(None, "there is no accelerator: ComfyUI computes on the CPU")
    try:
        choice = budget.choose_device(needed, readings, cpu_allowed=allow_cpu)
    except ValueError as error:
        raise ValueError(f"{node}: {error} Or choose default: ComfyUI makes room and loads partially.") from error
    return Place(torch.device(choice.device), choice.reason)


def put(patcher: Any, device: torch.device | None) -> Any:
    """A patcher that was just made, directed to a device; see `versions.directed`."""
    return patcher if device is None or device == patcher.load_device else directed(patcher, device)


class Loading:
    """One execution of a loader node: finds or reads the model, offloads it if asked, and reports."""

    def __init__(self, node: str, node_id: str | None, name: str) -> None:
        self.node, self.node_id, self.name = node, node_id, name
        self._report: dict[str, Any] = {"node": node, "name": name, "source": "memory: nothing was read"}

    def obtain(
        self,
        key: Key,
        policy: str,
        load: Callable[[], Any],
        patchers_of: Callable[[Any], Sequence[Any]],
        place: Place,
        needed: int,
    ) -> Any:
        """The owner's object for a key; see `Registry.obtain`. `needed`: bytes of its weights, predicted."""

        def read() -> Any:
            self._report["source"] = "disk"
            return load()

        wrappers.install()  # again: a pack that was imported after us may have replaced them
        book = residency.prompt_ledger()
        with book.phase(f"load {self.name}"):
            value = registry().obtain(key, policy, read, patchers_of, self.name, lambda: self._admit(needed))
        entry = registry().find(key)
        patchers = patchers_of(value)
        self._report |= {
            "predicted_bytes": needed,
            "weights_bytes": sum(patcher.model_size() for patcher in patchers),
            "device": str(patchers[0].load_device),
            "offload_device": str(patchers[0].offload_device),
            "device_reason": place.reason,
        }
        if entry is not None:
            self._keeping(entry, policy)
        return value

    def offload(self, models: Iterable[Any]) -> None:
        """Takes models off their device, verified, and keeps the receipts for the report."""
        receipts = [receipt for model in models for receipt in residency.offload_model(model)]
        self._report["offload"] = [receipt.to_json() for receipt in receipts]
        self._report["resident_bytes_after"] = sum(receipt.still_loaded for receipt in receipts)
        for receipt in receipts:
            log.info("%s %s: %s", self.node, receipt.name, receipt)
        if receipts:
            worst = max(receipts, key=_badness)
            node_status.send(self.node_id, receipt={"line": str(worst), "verdict": worst.verdict.value})

    def note(self, **more: Any) -> None:
        self._report |= more

    def output(self, *values: Any) -> io.NodeOutput:
        report = json.dumps(self._report, indent=2, ensure_ascii=False)
        return io.NodeOutput(*values, report, ui=ui.PreviewText(report))

    def _admit(self, needed: int) -> None:
        """Asks whether the RAM has room for the weights, and releases kept models that nobody uses if it has not."""
        admission = residency.may_load(needed, CPU)
        if admission.short:
            registry().yield_ram(lambda: residency.may_load(needed, CPU).short > 0, f"{self.name} needs RAM")
            admission = residency.may_load(needed, CPU)
        if admission.short:
            log.warning("%s: %s: %s", self.node, self.name, admission)
        self._report["admission"] = str(admission)

    def _keeping(self, entry: Entry, asked: str) -> None:
        requests = entry.requests_in(prompt.running())
        stronger = [node for node, request in requests.items() if request.policy == entry.policy != asked]
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


def clone_of(value: Any) -> Any:
    """What a loader hands out: packs change a patcher's options in place, and the owner's must stay as it is."""
    return value.clone() if hasattr(value, "clone") else value
