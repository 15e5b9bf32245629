"""Rounds that other work disturbed: found, taken again, and counted.

On a shared machine other processes can only slow a round down. So the fastest half of the rounds tells what
the engine does undisturbed, and a round far below it measured the neighbours. Throwing such rounds away in
silence would hide how noisy the machine is: every result says how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from hasten.bench.stats import percentile

T = TypeVar("T")

SHARE = 0.75
"""A round with a rate below this share of the typical one was disturbed. Undisturbed rounds on the machines
seen so far lie within 10 % of each other; one busy neighbour on two cores costs 40 %."""


@dataclass(frozen=True)
class Steady(Generic[T]):
    """Rounds in the order they were taken, without the disturbed ones where enough others are left."""

    rounds: tuple[T, ...]
    disturbed: int  # how many of all that were taken
    trusted: bool  # False: too few undisturbed ones came, so that all are in `rounds`


def steady(
    take: Callable[[int], T],
    rates: Callable[[T], Sequence[float]],
    runs: int,
    say: Callable[[str], None] = lambda _: None,
) -> Steady[T]:
    """Take rounds until `runs` of them are undisturbed, at most twice as many as that.

    Args:
        take: takes round `number`, from 1 on. A number is never used twice.
        rates: a round's rates; the same figures in the same places in every round, larger is faster.
        runs: how many are wanted.
        say: told when a round is repeated.
    """
    taken: list[T] = []
    slow: list[bool] = []
    while len(taken) < runs or (sum(not s for s in slow) < runs and len(taken) < 2 * runs):
        taken.append(take(len(taken) + 1))
        slow = disturbed([rates(one) for one in taken])
        if len(taken) >= runs and sum(not s for s in slow) < runs and len(taken) < 2 * runs:
            say(f"{sum(slow)} of {len(taken)} rounds were disturbed by other work: one more")
    good = [one for one, s in zip(taken, slow, strict=True) if not s]
    trusted = len(good) >= runs
    return Steady(tuple(good[-runs:] if trusted else taken), sum(slow), trusted)


def disturbed(rates: Sequence[Sequence[float]]) -> list[bool]:
    """For each round, whether one of its rates is below SHARE of that figure's typical one.

    Typical is the median of the fastest half of the rounds.
    """
    typical = [_typical(column) for column in zip(*rates, strict=True)]
    return [any(rate < SHARE * usual for rate, usual in zip(row, typical, strict=True)) for row in rates]


def _typical(values: Sequence[float]) -> float:
    fastest = sorted(values, reverse=True)[: (len(values) + 1) // 2]
    return percentile(fastest, 0.5)
