"""How many workers a device holds, from the measured footprint of the first clip."""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.budget import workers as workers_that_fit
from ...memory.reading import size_text

FREE_SHARE = 0.20
"""Of a card that is left alone: at 99.7 % full, 45 of 50 clips of a reported night were lost."""


@dataclass(frozen=True)
class Workers:
    """How many, and why.

    Attributes:
        count: workers on the device, at least 1.
        reason: the sum in words.
        lowered: whether fewer are used than were asked for.
    """

    count: int
    reason: str
    lowered: bool = False


def admit(
    footprint: int, total: int, *, asked: int | None = None, force: bool = False, cores: int | None = None
) -> Workers:
    """Workers of that footprint on a device of that size, both in bytes, a fifth of it left free.

    Args:
        asked: how many the user wants; None for as many as fit.
        force: take what was asked although it does not fit.
        cores: on the CPU, workers beyond this number only share what one of them could use.

    Raises:
        ValueError: fewer than one worker was asked for.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"--workers: expected auto or a number from 1; got {asked}.")
    allowed = int(total * (1 - FREE_SHARE))
    fit = max(1, workers_that_fit(footprint, allowed, reserve=0))
    if cores is not None:
        fit = min(fit, max(1, cores))
    each, room = size_text(footprint), f"{size_text(allowed)} (80 % of {size_text(total)})"
    if asked is None or asked <= fit:
        count = fit if asked is None else asked
        return Workers(count, f"{count} × {each} = {size_text(count * footprint)} of {room}")
    wanted = f"{asked} × {each} = {size_text(asked * footprint)}"
    if force:
        return Workers(asked, f"{wanted} is more than {room}; forced")
    why = f"more than {room}" if asked * footprint > allowed else f"fits, but there are {cores} cores"
    return Workers(fit, f"{wanted} is {why}: {fit} used instead of {asked}", lowered=True)
