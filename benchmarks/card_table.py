"""What to set on a card: predicted bytes of the released FlashVSR model for each card and output size, as Markdown.

    python -m steadyvsr.benchmarks.card_table [--output FILE]

Everything is predicted (models/flashvsr/footprint.py, memory/budget.py); nothing is measured here. bf16, kv_ratio 3,
TC decoder. A plan fits where weights, state and activations, with what the allocator's pool holds beyond them, leave
room for the process' context and a reserve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from steadyvsr.app.card.random_model import released_model
from steadyvsr.app.card.room import CARDS_GB, room
from steadyvsr.memory.budget import Need, fit
from steadyvsr.memory.reading import GIB
from steadyvsr.models.flashvsr import FlashVSRConfig, padded_size
from steadyvsr.models.flashvsr.footprint import activation_bytes, cache_bytes, decoder_state_bytes
from steadyvsr.models.flashvsr.memory_plan import MemoryPlan, plans

SIZES = ((1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))
CONFIG, KV_RATIO, ITEMSIZE = FlashVSRConfig(), 3.0, 2


def in_ram(size: tuple[int, int], plan: MemoryPlan) -> int:
    """Bytes that the plan keeps in RAM; tiles overlap, so there it is a little more."""
    width, height = padded_size(*size)
    kept = cache_bytes(CONFIG, width * height, KV_RATIO, ITEMSIZE) if plan.kv_in_ram or plan.tile else 0
    return kept + (decoder_state_bytes(CONFIG, width * height, ITEMSIZE) if plan.decoder_frames == 1 else 0)


def words(plan: MemoryPlan) -> str:
    parts = {
        "KV in RAM": plan.kv_in_ram,
        "chunks": plan.decoder_frames == 1,
        "strips": plan.decoder_strip_pixels is not None,
        f"tile {plan.tile}": plan.tile is not None,
    }
    return " + ".join(word for word, chosen in parts.items() if chosen) or "nothing"


def cell(card_gb: int, size: tuple[int, int], weights: int) -> str:
    """The first plan that fits, and what it takes."""

    def need(setting: tuple[str, MemoryPlan]) -> Need:
        return Need(weights, activations=activation_bytes(CONFIG, size, KV_RATIO, ITEMSIZE, plan=setting[1]))

    found = fit(room(card_gb), plans(MemoryPlan(), size), need)
    taken = f"{found.need.tensors / GIB:.1f} GiB"
    if found.setting is None:
        return f"does not fit ({taken} at least)"
    plan = found.setting[1]
    ram = in_ram(size, plan)
    return f"{words(plan)}: {taken}" + (f", {ram / GIB:.1f} in RAM" if ram else "")


def table() -> str:
    model = released_model("v1.1", torch.bfloat16, torch.device("meta"))
    networks = (model.transformer, model.lq_projection, model.decoder)
    weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    lines = [
        "| output | everything on the card | " + " | ".join(f"{card} GB" for card in CARDS_GB) + " |",
        "|---|---|" + "---|" * len(CARDS_GB),
    ]
    for size in SIZES:
        whole = weights + activation_bytes(CONFIG, size, KV_RATIO, ITEMSIZE, plan=MemoryPlan())
        cells = [f"{size[0]} × {size[1]}", f"{whole / GIB:.1f} GiB", *(cell(card, size, weights) for card in CARDS_GB)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Weights in bf16: {weights / GIB:.2f} GiB, included in every number."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table as Markdown")
    options = parser.parse_args(arguments)
    text = table()
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
