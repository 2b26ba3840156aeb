"""Growth over runs: planted leaks are found with their slope, and noise, steps and level series are not reported."""

from __future__ import annotations

import numpy as np
import pytest
from steadyvsr.memory import leak

MIB = 1 << 20
NOISE = 4 * MIB


def planted(generator: np.random.Generator, runs: int, slope: float) -> np.ndarray:
    return 500 * MIB + slope * np.arange(runs) + generator.uniform(-NOISE, NOISE, runs)


def reported(series: np.ndarray) -> bool:
    """Whether any prefix of the series, as it grows run by run, is reported."""
    return any(leak.fit(series[:runs]).leaking for runs in range(leak.MINIMUM_RUNS, len(series) + 1))


def test_a_leak_of_1_mib_per_run_in_noise_of_4_mib_is_reported_by_run_12() -> None:
    generator = np.random.default_rng(7)
    found = sum(reported(planted(generator, 12, MIB)) for _ in range(300))
    assert found >= 285


def test_the_planted_slope_is_given_without_bias_and_within_its_uncertainty() -> None:
    generator = np.random.default_rng(8)
    fits = [leak.fit(planted(generator, 12, MIB)) for _ in range(300)]
    assert abs(np.mean([fit.slope for fit in fits]) / MIB - 1) < 0.03  # two standard errors of the mean of 300
    covered = np.mean([abs(fit.slope - MIB) < 2 * fit.uncertainty for fit in fits])
    assert 0.88 < covered < 0.99  # Student's t with 10 degrees of freedom: 93 % within 2 standard errors


def test_the_slope_is_within_20_percent_from_run_20_on() -> None:
    # At run 12 the noise itself leaves only 7 of 10 series within 20 %: one standard error is 0.19 MiB there.
    generator = np.random.default_rng(9)
    slopes = [leak.fit(planted(generator, 20, MIB)).slope / MIB for _ in range(300)]
    assert np.mean(np.abs(np.array(slopes) - 1) < 0.2) >= 0.95


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_of_1000_series_without_a_leak_at_most_1_percent_are_reported(kind: str) -> None:
    generator = np.random.default_rng(11)
    false = 0
    for _ in range(1000):
        noise = generator.uniform(-NOISE, NOISE, 40) if kind == "uniform" else generator.normal(0, NOISE / 2, 40)
        false += reported(500 * MIB + noise)
    assert false <= 10


def test_a_series_without_noise_is_reported_exactly() -> None:
    growth = leak.fit([100 + 7 * run for run in range(12)])
    assert growth.leaking and growth.slope == pytest.approx(7) and growth.rise == pytest.approx(77)


@pytest.mark.parametrize("at", [1, 3, 6, 10])
def test_one_step_is_no_leak(at: int) -> None:
    series = [0.0] * at + [100 * MIB] * (14 - at)
    assert leak.fit(series).step and not reported(np.array(series))


def test_a_level_series_and_a_shrinking_one_are_no_leak() -> None:
    assert not leak.fit([5 * MIB] * 20).leaking
    assert not leak.fit([(20 - run) * MIB for run in range(20)]).leaking


def test_only_the_last_runs_count() -> None:
    series = [run * 50 * MIB for run in range(10)] + [450 * MIB] * leak.WINDOW_RUNS
    assert leak.fit(series).runs == leak.WINDOW_RUNS and leak.fit(series).slope == 0


def test_fewer_than_three_runs_have_no_line_and_fewer_than_twelve_no_alarm() -> None:
    assert leak.fit([1, 2]) is None
    assert not leak.fit([run * MIB for run in range(11)]).leaking and leak.fit([run * MIB for run in range(12)]).leaking
