"""What a FlashVSR run will need: shown on its node before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...memory import budget
from ...memory.process import shared
from ...models.flashvsr import FlashVSRConfig, output_size
from ...models.flashvsr.checkpoint import NANO_FILE, load_flashvsr
from ...models.flashvsr.config import PRECISIONS
from ...models.flashvsr.footprint import activation_bytes
from ...patches.residency import patchers_of
from . import model_sets
from .model import LoadedFlashVSR

ADVICE = "lower scale, kv_ratio or precision, or set tile"


@dataclass(frozen=True)
class Network:
    """What a prediction needs to know about a model: its sizes, its number of weights, and the bytes of each."""

    config: FlashVSRConfig
    parameters: int
    itemsize: int
    prompt_tokens: int


def predict(
    model_set: str, precision: str, width: int, height: int, scale: float, kv_ratio: float, budget_gb: float
) -> dict[str, int | str | None]:
    """Bytes of a run without tiles or other savings, and what to change if the budget is smaller.

    Returns:
        predicted: None for a model that has not been loaded yet: its sizes are unknown until it is read.
        budget: None without one.
        advice: "" where nothing has to change.

    Raises:
        ValueError: a size or number that no run would take.
    """
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision: expected one of auto, {', '.join(PRECISIONS)}; got {precision[:20]!r}.")
    size = output_size(width, height, scale)
    allowed = budget.gib(budget_gb) if budget_gb > 0 else None
    network = _network(model_set)
    if network is None:
        return {"predicted": None, "budget": allowed, "advice": ""}
    itemsize = network.itemsize if precision == "auto" else PRECISIONS[precision].itemsize
    needed = network.parameters * itemsize + activation_bytes(
        network.config, size, kv_ratio, itemsize, prompt_tokens=network.prompt_tokens
    )
    too_much = allowed is not None and needed > allowed
    return {"predicted": needed, "budget": allowed, "advice": ADVICE if too_much else ""}


def remember(model_set: str, model: LoadedFlashVSR) -> None:
    """Notes the sizes of a model that was loaded: predictions are asked for on threads that must not hold one."""
    parameters = sum(x.numel() for patcher in patchers_of(model) for x in patcher.model.parameters())
    _known()[model_set] = Network(model.config, parameters, model.dtype.itemsize, model.prompt.shape[1])


def _known() -> dict[str, Network]:
    return shared("flashvsr_networks", dict)


def _network(model_set: str) -> Network | None:
    found = _known().get(model_set)
    return _nano() if found is None and model_set == model_sets.NANO else found


@cache
def _nano() -> Network:
    model = load_flashvsr(NANO_FILE, dtype=torch.float32, device="cpu")
    parts = (model.transformer, model.lq_projection, model.decoder)
    parameters = sum(x.numel() for part in parts for x in part.parameters())
    return Network(model.transformer.config, parameters, torch.float32.itemsize, model.prompt.shape[1])
