"""Decides how many workers a device gets, from the measured footprint of its first clip."""

from __future__ import annotations

from dataclasses import dataclass

from ...memory.budget import workers as workers_that_fit
from ...memory.reading import size_text

FREE_SHARE = 0.20
"""Part of a card that stays free: on one reported to be 99.7 % full, 45 of 50 clips of a night were lost."""


@dataclass(frozen=True)
class Workers:
    """How many workers a device gets, and why.

    Attributes:
        count: at least 1.
        reason: the calculation, as text.
    """

    count: int
    reason: str


def admit(
    footprint: int, total: int, *, asked: int | None = None, force: bool = False, cores: int | None = None
) -> Workers:
    """As many workers of that footprint as fit on a device of that size (both in bytes) with a fifth of it left free.

    Args:
        asked: how many the user wants; None for as many as fit.
        force: start as many as were asked for even if they do not fit.
        cores: on the CPU, more workers than cores would only slow each other down.

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
    return Workers(fit, f"{wanted} is {why}: {fit} used instead of {asked}")
