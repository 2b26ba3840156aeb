"""A loader's execution with a small network of its own, on a card that is a name in ComfyUI's books."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from host import BASE, CPU, call, mm, pack
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


def lora_files() -> dict:
    """How many LoRA files are in RAM while outputs of Apply LoRA are cached, and when the cache is emptied."""
    stock = {(folder_paths, "get_full_path"): lambda folder, name: str(BASE / name),
             (comfy.utils, "load_torch_file"): lambda path, **_: ({"lora": torch.zeros(1000)}, None),
             (comfy.sd, "load_lora_for_models"): fitting}  # fmt: skip
    originals = {place: getattr(*place, None) for place in stock}
    for (module, name), stand_in in stock.items():
        setattr(module, name, stand_in)
    seen = {}
    try:
        with a_card():
            for policy in ("no", "keep"):
                cleared()
                base, cache = load("no")[0], []
                for number in range(3):
                    (BASE / f"lora{number}").touch()
                    cache.append(call("ApplyLoRA", model=base, lora_name=f"lora{number}", strength_model=1.0,
                                      keep_loaded=policy))  # fmt: skip
                alive = [files()]
                cache.clear()  # "Free model and node cache"
                del base
                press()
                seen[policy] = [*alive, files()]
            cleared()
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original) if original is not None else delattr(module, name)
    return seen


def fitting(model: Any, clip: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    """A LoRA that changes one weight."""
    made = model.clone()
    made.patches = {"linear.weight": [None]}
    return made, None


def files() -> int:
    """LoRA files in RAM, whoever holds them."""
    gc.collect()
    kind = pack("nodes.loaders.lora").LoraFile
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


SCENARIOS = {"ten runs": ten_runs, "put there": put_there, "lora files": lora_files}
