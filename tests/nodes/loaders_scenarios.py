"""A loader's execution with a small network of its own, on a card that is a name in ComfyUI's books."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from host import BASE, CPU, mm, pack
from torch import nn

CARD = torch.device("cpu", 0)
RUNS = 10
kept = pack("patches.kept")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)


class LoaderNode:
    """As much of a running node as a loader asks: it has no id outside a graph."""

    hidden = None


class Moves:
    """Bytes that went to or from a card: every change of what a network's own book says is there."""

    def __init__(self) -> None:
        self.bytes = 0

    def taken(self) -> int:
        found, self.bytes = self.bytes, 0
        return found


@contextmanager
def counted_moves() -> Iterator[Moves]:
    moves, stock = Moves(), nn.Module.__setattr__

    def watched(module: nn.Module, name: str, value: Any) -> None:
        if name == "model_loaded_weight_memory":
            moves.bytes += abs(value - (getattr(module, name, None) or 0))
        stock(module, name, value)

    nn.Module.__setattr__ = watched  # type: ignore[method-assign]
    try:
        yield moves
    finally:
        nn.Module.__setattr__ = stock  # type: ignore[method-assign]


@contextmanager
def a_card() -> Iterator[None]:
    stock = {name: getattr(mm, name) for name in ("get_torch_device", "get_all_torch_devices") if hasattr(mm, name)}
    for name in stock:
        setattr(mm, name, (lambda *_, **__: CARD) if name == "get_torch_device" else (lambda *_, **__: [CARD]))
    try:
        yield
    finally:
        press()
        for name, original in stock.items():
            setattr(mm, name, original)


def load(policy: str, straight_to_card: bool = False, offload: bool = True) -> tuple[Any, dict[str, Any]]:
    """One execution of a loader: its model, and its report.

    Args:
        straight_to_card: ComfyUI loads there at once, as it does where it thinks that there is room.
    """
    loading = pack("nodes.loaders.loading")
    path = BASE / "weights.safetensors"
    if not path.exists():  # a file that is touched is another one
        path.touch()
    run = loading.Loading(LoaderNode, "Load Test", path.name, policy, offload)

    def read(place: Any) -> Any:
        made = pack("patches.versions").patcher_class()(Network(), load_device=CARD, offload_device=CPU)
        if straight_to_card:
            mm.load_models_gpu([made])
        return made

    value = run.obtain(loading.ModelFiles("model", [str(path)], {}, 16_640), read)
    (model, _), report = run.hand_out(value).args, run._report
    return model, report


def press() -> None:
    """As the button "Free model and node cache" does, whose node cache is what the caller has let go of."""
    mm.unload_all_models()
    gc.collect()
    mm.soft_empty_cache()


def cleared() -> None:
    kept.registry().release()
    press()


def ten_runs() -> dict:
    """Bytes moved in each of ten runs with a press after each: the loader executes again, then its model is used."""
    seen: dict[str, Any] = {}
    with a_card(), counted_moves() as moves:
        for policy in ("keep", "pin", "no"):
            cleared()
            moves.taken()
            runs = []
            for _ in range(RUNS):
                model, report = load(policy)
                mm.load_models_gpu([model])
                del model
                press()
                runs.append(moves.taken())
            seen[policy] = {"runs": runs, "source": report["source"], "weights": report["weights_bytes"]}
        cleared()
    return seen


def put_there() -> dict:
    """What this execution put on the card itself: books after it, and the receipts."""
    seen = {}
    with a_card():
        for policy in ("no", "keep", "pin"):
            for offload in (True, False):
                cleared()
                model, report = load(policy, straight_to_card=True, offload=offload)
                again, second = load(policy, offload=True)
                seen[f"{policy} {offload}"] = {
                    "on the card": model.loaded_size(), "receipts": len(report.get("offload", ())),
                    "after another loader": again.loaded_size(), "stays": second.get("stays_bytes"),
                }  # fmt: skip
                del model, again
        cleared()
    return seen


SCENARIOS = {"ten runs": ten_runs, "put there": put_there}
