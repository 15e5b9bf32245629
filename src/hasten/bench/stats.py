"""Medians, percentiles and ratios of a handful of runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.core import Stat
from hasten.errors import UsageError


def percentile(values: Sequence[float], fraction: float) -> float:
    """Value at `fraction` (0..1) of the sorted values, linear between neighbours (NumPy's default rule)."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def stat(values: Sequence[float]) -> Stat:
    """Median, 10th and 90th percentile of a figure's runs.

    Raises:
        UsageError: there is no run.
    """
    if not values:
        raise UsageError("a figure needs at least one run, got none", hint="give --runs 1 or more")
    return Stat(
        median=percentile(values, 0.5),
        p10=percentile(values, 0.1),
        p90=percentile(values, 0.9),
        n=len(values),
    )


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians with its 95 % interval."""

    median: float
    low: float
    high: float
    n: int  # paired rounds


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = 2000, seed: int = 0
) -> Ratio:
    """Median of `ours` over median of `theirs`, where entry i of both was measured in the same round.

    The interval is a percentile bootstrap over rounds (Efron 1979): whole rounds are drawn, so what slows a
    round for everybody cancels. With fewer than five rounds it is narrow by chance; read it with n.

    Raises:
        UsageError: no round, or lists of different length.
    """
    if not ours or len(ours) != len(theirs):
        raise UsageError(
            f"a paired ratio needs as many runs on both sides, got {len(ours)} and {len(theirs)}",
            hint="measure both engines in the same rounds",
        )
    draw = random.Random(seed)
    rounds = range(len(ours))
    ratios = []
    for _ in range(resamples):
        picks = [draw.choice(rounds) for _ in rounds]
        top = percentile([ours[i] for i in picks], 0.5)
        ratios.append(top / percentile([theirs[i] for i in picks], 0.5))
    return Ratio(
        median=percentile(ours, 0.5) / percentile(theirs, 0.5),
        low=percentile(ratios, 0.025),
        high=percentile(ratios, 0.975),
        n=len(ours),
    )
