"""What fits: settings for a budget, workers, admission, the choice of a device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyvsr.memory import budget
from steadyvsr.memory.budget import Need, Occupant
from steadyvsr.memory.reading import WHOLE_DEVICE, Figure, OtherProcess, Reading, exact

MIB, GIB = 1 << 20, 1 << 30


def card(name: str, free: float, total: float = 24, others=()) -> Reading:
    used = Figure(int((total - free) * GIB), "NVML", WHOLE_DEVICE)
    return Reading(name, used=used, total=exact(int(total * GIB), "NVML"), others=tuple(others))


def test_a_need_adds_its_sources_and_names_them() -> None:
    need = Need(weights=2 * GIB, state=GIB, activations=GIB)
    assert need.tensors == 4 * GIB
    assert str(need) == "4.00 GiB (weights 2.00 GiB, state 1.00 GiB, activations 1.00 GiB)"


@given(st.integers(1, 40))
def test_fit_takes_the_first_setting_that_fits_and_keeps_what_it_tried(gib: int) -> None:
    settings = [None, 1024, 512, 256]
    needs = {None: 30 * GIB, 1024: 16 * GIB, 512: 8 * GIB, 256: 4 * GIB}
    fit = budget.fit(gib * GIB, settings, lambda tile: Need(activations=needs[tile]))
    fitting = [tile for tile in settings if needs[tile] <= gib * GIB]
    assert fit.setting == (fitting[0] if fitting else None)
    assert [tile for tile, _ in fit.tried] == (settings[: settings.index(fitting[0]) + 1] if fitting else settings)
    assert fit.fits is bool(fitting) and (fitting or fit.need.tensors == 4 * GIB)


def test_a_budget_below_the_weights_is_refused_with_both_amounts() -> None:
    with pytest.raises(ValueError, match="own weights, 6.00 GiB; got 4.00 GiB"):
        budget.fit(4 * GIB, [None], lambda tile: Need(), weights=6 * GIB)


def test_no_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one setting"):
        budget.fit(GIB, [], lambda tile: Need())


WORKERS = [(11, 16, 1), (11, 24, 2), (11, 8, 0), (5, 16, 3), (12, 24, 1)]


@pytest.mark.parametrize(("footprint", "card_gib", "expected"), WORKERS)
def test_workers_that_fit_on_a_card(footprint: int, card_gib: int, expected: int) -> None:
    assert budget.workers(footprint * GIB, card_gib * GIB) == expected


def test_workers_without_a_footprint_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0; got 0"):
        budget.workers(0, GIB)


def test_what_fits_may_be_loaded() -> None:
    admission = budget.may_load(4 * GIB, card("cuda:0", free=5))
    assert admission.allowed and admission.short == 0
    assert str(admission) == "cuda:0: needs 4.00 GiB, 5.00 GiB free (NVML)"


def test_what_does_not_fit_names_what_is_in_the_way_largest_first() -> None:
    reading = card("cuda:0", free=5, others=[OtherProcess(4242, "blender", 7 * GIB)])
    residents = [Occupant("CLIP", GIB), Occupant("Wan", 6 * GIB)]
    admission = budget.may_load(10 * GIB, reading, residents)
    assert not admission.allowed and admission.short == 5 * GIB
    assert [item.name for item in admission.in_the_way] == ["blender (pid 4242)", "Wan", "CLIP"]
    assert "5.00 GiB short · in the way: blender (pid 4242) 7.00 GiB (stays), Wan 6.00 GiB, CLIP" in str(admission)


def test_a_card_that_cannot_be_read_is_not_called_free() -> None:
    admission = budget.may_load(GIB, Reading("xpu:0"))
    assert not admission.allowed and "cannot be read" in str(admission)


CHOICES = [
    ([("cuda:0", 4), ("cuda:1", 9)], False, "cuda:1"),
    ([("cuda:0", 12), ("cuda:1", 9)], False, "cuda:0"),
    ([("cuda:0", 4), ("cuda:1", 5)], True, "cpu"),
    ([], True, "cpu"),
]


@pytest.mark.parametrize(("cards", "cpu_allowed", "expected"), CHOICES)
def test_the_card_with_the_most_measured_free_memory_that_fits_is_chosen(cards, cpu_allowed, expected) -> None:
    choice = budget.choose_device(6 * GIB, [card(name, free) for name, free in cards], cpu_allowed=cpu_allowed)
    assert choice.device == expected
    assert all(name in choice.reason for name, _ in cards) if expected == "cpu" else "NVML" in choice.reason


def test_where_nothing_fits_and_the_cpu_is_forbidden_each_card_is_named() -> None:
    with pytest.raises(ValueError, match="cuda:0 4.00 GiB free; cuda:1 5.00 GiB free"):
        budget.choose_device(6 * GIB, [card("cuda:0", 4), card("cuda:1", 5)], cpu_allowed=False)


def test_a_card_whose_free_memory_is_unknown_is_not_chosen() -> None:
    assert budget.choose_device(GIB, [Reading("xpu:0"), card("cuda:0", 2)], cpu_allowed=False).device == "cuda:0"
