"""Everything that is promised, measured on one machine by one command: `steadyvsr doctor --full --json FILE`.

Random weights of the released size are made on the spot; nothing is downloaded. `benchmarks/card/run.py` runs the same
blocks at more sizes.
"""

from .compute import attention, budgets, ceilings, golden_vectors, repeats, speed, wan_tiles
from .holding import planted_holders, press, two_workers
from .record import Found, NotHere, Setting, measure, page, save

FULL = {
    "ceilings": ceilings,
    "attention": attention,
    "golden vectors": golden_vectors,
    "offload with planted holders": planted_holders,
    "a press with a kept model": press,
    "speed at 768 × 1408": speed,
    "200 frames three times": repeats,
    "budgets of 6 to 24 GB": budgets,
    "Wan VAE at 832 × 480": wan_tiles,
    "clips with one and two workers": two_workers,
}
"""What the full doctor measures, the cheapest and most telling first."""

__all__ = ["FULL", "Found", "NotHere", "Setting", "measure", "page", "save"]
