"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core import Format
from hasten.optimize.mixture import lightest
from hasten.optimize.sensitivity import Choice
from mixture import gentlest

CHOICES = st.builds(
    Choice,
    layout=st.sampled_from([None, Format.of(4), Format.of(5), Format.of(8)]),
    bytes=st.integers(1, 1000),
    harm=st.one_of(st.just(0.0), st.floats(1e-6, 0.1)),
)
MENUS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=5)


def by_brute_force(menus: Sequence[Sequence[Choice]], limit: float) -> int | None:
    sizes = [
        sum(c.bytes for c in combination)
        for combination in itertools.product(*menus)
        if math.fsum(c.harm for c in combination) <= limit
    ]
    return min(sizes, default=None)


@settings(max_examples=150, deadline=None)
@given(MENUS, st.floats(1e-4, 0.3))
def test_lightest_within_the_rounding_of_its_steps(menus: list[list[Choice]], limit: float) -> None:
    found = lightest(menus, limit)
    rounding = limit * len(menus) / 8192
    safe, free = by_brute_force(menus, limit - rounding), by_brute_force(menus, limit)
    if found is None:
        assert safe is None
        return
    assert len(found) == len(menus)
    assert all(choice in menu for choice, menu in zip(found, menus, strict=True))
    assert math.fsum(c.harm for c in found) <= limit * (1 + 1e-9)
    size = sum(c.bytes for c in found)
    assert free is not None
    assert size >= free
    assert safe is None or size <= safe


def test_a_limit_of_nothing_keeps_what_is_harmless() -> None:
    menus = [[Choice(None, 100, 0.0), Choice(Format.of(4), 40, 1e-9)], [Choice(None, 80, 0.0)]]
    assert lightest(menus, 0.0) == [menus[0][0], menus[1][0]]
    assert lightest(menus, 1e-9) == [menus[0][1], menus[1][0]]
    assert lightest(menus, -1.0) is None


def test_harm_that_does_not_fit_is_no_answer() -> None:
    assert lightest([[Choice(Format.of(4), 40, 0.2)]], 0.1) is None


def test_the_whole_limit_can_be_used() -> None:
    menu = [Choice(None, 100, 0.0), Choice(Format.of(4), 40, 0.1)]
    assert lightest([menu], 0.1) == [menu[1]]


def test_worse_and_heavier_is_never_taken() -> None:
    menu = [Choice(None, 100, 0.0), Choice(Format.of(8), 120, 0.01), Choice(Format.of(5), 60, 0.02)]
    for limit in (0.0, 0.015, 0.02, 1.0):
        assert menu[1] not in (lightest([menu], limit) or ())


def test_a_hundred_groups_are_quick_and_tight() -> None:
    menus = [
        [Choice(None, 850, 0.0)]
        + [Choice(Format.of(b), 100 * b, 0.001 * (1 + g % 7) * 4.0 ** (4 - b)) for b in (4, 5, 6)]
        for g in range(100)
    ]
    found = lightest(menus, 0.1)
    assert found is not None
    assert 0.097 < math.fsum(c.harm for c in found) <= 0.1


@settings(max_examples=80, deadline=None)
@given(MENUS, st.integers(1, 4000))
def test_gentlest_is_within_the_bytes_and_near_the_least_harm(menus: list[list[Choice]], most: int) -> None:
    found = gentlest(menus, most)
    fitting = [c for c in itertools.product(*menus) if sum(choice.bytes for choice in c) <= most]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(choice.bytes for choice in found) <= most
    least = min(math.fsum(choice.harm for choice in c) for c in fitting)
    assert math.fsum(choice.harm for choice in found) <= least * 1.01 + 1e-9
