"""Does memory grow from run to run? A straight line through the bytes after equal runs, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .reading import size_text

MINIMUM_RUNS = 8
"""Fewer points leave the noise unknown: with 5 points a t value of 3.5 is noise in one series of 50."""
WINDOW_RUNS = 32
"""Runs that the line is fitted over. At 32 a slope of a seventh of the noise's range per run stands out."""
SIGNIFICANCE = 3.5
"""Slope over its standard error. With the rule on the rise: no more than 1 % of leak-free series of 50 runs are
reported (tests/test_leak.py counts them)."""
STEP_SHARE = 0.5
"""One jump that leaves less than this share of the line's squared residuals is a step (another model kept), no leak."""


@dataclass(frozen=True)
class Growth:
    """A line through the bytes after each run.

    Attributes:
        runs: how many.
        slope: bytes per run.
        uncertainty: one standard error of the slope, bytes per run.
        noise: range of the residuals, bytes.
        step: whether one jump explains the series much better.
    """

    runs: int
    slope: float
    uncertainty: float
    noise: float
    step: bool

    @property
    def rise(self) -> float:
        """Bytes from the first run to the last, by the line."""
        return self.slope * (self.runs - 1)

    @property
    def leaking(self) -> bool:
        """Whether the growth stands above the noise, both as a slope and in all."""
        return (
            self.runs >= MINIMUM_RUNS
            and self.rise > self.noise
            and self.slope > SIGNIFICANCE * self.uncertainty
            and not self.step
        )

    def __str__(self) -> str:
        return (
            f"{size_text(round(self.slope))} per run ± {size_text(round(self.uncertainty))} over {self.runs} runs "
            f"(noise {size_text(round(self.noise))})"
        )


def fit(series: Sequence[float]) -> Growth | None:
    """Least squares through the last `WINDOW_RUNS` values, in bytes; None for fewer than three.

    Slope Σ(x-x̄)y / Σ(x-x̄)²; its standard error is √(Σr² / (n-2) / Σ(x-x̄)²) with the residuals r.
    """
    values = np.asarray(series[-WINDOW_RUNS:], dtype=np.float64)
    runs = len(values)
    if runs < 3:
        return None
    x = np.arange(runs) - (runs - 1) / 2
    slope = float(x @ values / (x @ x))
    residuals = values - values.mean() - slope * x
    squares = float(residuals @ residuals)
    uncertainty = float(np.sqrt(squares / (runs - 2) / (x @ x)))
    return Growth(runs, slope, uncertainty, float(np.ptp(residuals)), _best_step(values) < STEP_SHARE * squares)


def _best_step(values: np.ndarray) -> float:
    """Sum of squared residuals of the best series that is level, jumps once, and is level again."""
    squares = [
        index * values[:index].var() + (len(values) - index) * values[index:].var() for index in range(1, len(values))
    ]
    return float(min(squares))
