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
from steadyvsr.memory.budget import CONTEXT_BYTES, POOL_SHARE, RESERVE_BYTES, Need, fit, gib
from steadyvsr.memory.reading import GIB
from steadyvsr.models.flashvsr import CausalLQ4xProjection, FlashVSRConfig, TCDecoder, Transformer, padded_size
from steadyvsr.models.flashvsr.footprint import activation_bytes, cache_bytes, decoder_state_bytes
from steadyvsr.models.flashvsr.memory_plan import (
    DECODER_CHUNKS,
    DECODER_STRIPS,
    KV_CACHE,
    TILES,
    MemoryPlan,
    plans,
)

CARDS_GB = (6, 8, 12, 16, 24)
SIZES = ((1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))
KV_RATIO, ITEMSIZE = 3.0, 2
SHORT = {KV_CACHE: "KV in RAM", DECODER_CHUNKS: "chunks", DECODER_STRIPS: "strips", TILES: "tile"}


def weights_bytes(config: FlashVSRConfig) -> int:
    """Of the three networks, counted from their shapes."""
    with torch.device("meta"):
        networks = (
            Transformer(config),
            CausalLQ4xProjection(config.lq_hidden, config.dim, config.lq_layers),
            TCDecoder(config.decoder_channels),
        )
    return sum(parameter.numel() for network in networks for parameter in network.parameters()) * ITEMSIZE


def room(card_gb: int) -> int:
    """Bytes of live tensors that a card can hold."""
    return int((gib(card_gb) - CONTEXT_BYTES - RESERVE_BYTES) / (1 + POOL_SHARE))


def in_ram(config: FlashVSRConfig, size: tuple[int, int], plan: MemoryPlan) -> int:
    """Bytes that the plan keeps in RAM; tiles overlap, so there it is a little more."""
    width, height = padded_size(*size)
    kept = cache_bytes(config, width * height, KV_RATIO, ITEMSIZE) if plan.kv_in_ram or plan.tile else 0
    return kept + (decoder_state_bytes(config, width * height, ITEMSIZE) if plan.decoder_frames == 1 else 0)


def words(plan: MemoryPlan) -> str:
    parts = [SHORT[KV_CACHE]] * plan.kv_in_ram + [SHORT[DECODER_CHUNKS]] * (plan.decoder_frames == 1)
    parts += [SHORT[DECODER_STRIPS]] * (plan.decoder_strip_pixels is not None)
    parts += [f"{SHORT[TILES]} {plan.tile}"] * (plan.tile is not None)
    return " + ".join(parts) or "nothing"


def table() -> str:
    config = FlashVSRConfig()
    weights = weights_bytes(config)

    def need(setting: tuple[str, MemoryPlan], size: tuple[int, int]) -> Need:
        return Need(weights, activations=activation_bytes(config, size, KV_RATIO, ITEMSIZE, plan=setting[1]))

    lines = [
        "| output | everything on the card | " + " | ".join(f"{card} GB" for card in CARDS_GB) + " |",
        "|---|---|" + "---|" * len(CARDS_GB),
    ]
    for size in SIZES:
        whole = need(("", MemoryPlan()), size).tensors
        cells = []
        for card in CARDS_GB:
            found = fit(room(card), plans(MemoryPlan(), size), lambda setting, size=size: need(setting, size))
            if not found.fits or found.setting is None:
                cells.append(f"does not fit ({found.need.tensors / GIB:.1f} GiB at least)")
                continue
            plan = found.setting[1]
            ram = in_ram(config, size, plan)
            beside = f", {ram / GIB:.1f} in RAM" if ram else ""
            cells.append(f"{words(plan)}: {found.need.tensors / GIB:.1f} GiB{beside}")
        lines.append(f"| {size[0]} × {size[1]} | {whole / GIB:.1f} GiB | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"Weights in bf16: {weights / GIB:.2f} GiB, contained in every number.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
