"""Which group gets which width: a knapsack.

Decoding is memory-bound, so the bytes read a token are the predicted time: on the development machine 4.5 and
5.7 bits a weight took the same time a byte to 0.3 % (README). Timing each layout instead was tried; on a
machine that is not quiet it measures the others' load, and mixtures then avoid the wrong widths.

Harms of separate groups add up to first order, as their errors are independent. So: the fewest bytes whose
summed harm stays within a limit, a multiple-choice knapsack. Solved by dynamic programming over harm in 8,192
steps, each harm rounded up: the limit is never exceeded, and with 100 groups at most 1.2 % of it is left
unused. Takes about 0.1 s for 100 groups of 6 choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.core import Format

_STEPS = 8192


@dataclass(frozen=True)
class Choice:
    """One layout a group may get."""

    layout: Format | None  # None: the source's values are kept
    bytes: int
    harm: float  # predicted KL divergence it adds, nats


def lightest(menus: Sequence[Sequence[Choice]], limit: float) -> list[Choice] | None:
    """One choice a group with the fewest bytes, their harms together at most `limit`; None if there is no
    such set.

    Among equal bytes the smaller harm wins.
    """
    if limit < 0:
        return None
    step = max(limit / _STEPS, 1e-30)  # a limit of zero leaves harmless choices alone
    best = np.zeros(_STEPS + 1)  # best[u]: fewest bytes of the groups so far with at most u steps of harm
    taken: list[np.ndarray] = []
    for menu in menus:
        options = _sensible(menu)
        table = np.full((len(options), _STEPS + 1), np.inf)
        for row, choice in enumerate(options):
            used = _steps(choice, step)
            if used <= _STEPS:
                table[row, used:] = best[: _STEPS + 1 - used] + choice.bytes
        taken.append(table.argmin(axis=0))
        best = table.min(axis=0)
    if not np.isfinite(best[_STEPS]):
        return None
    return _walk_back(menus, taken, step, int(np.flatnonzero(best == best[_STEPS])[0]))


def gentlest(menus: Sequence[Sequence[Choice]], most_bytes: float) -> list[Choice] | None:
    """One choice a group with the least summed harm in at most `most_bytes`; None if nothing is so small.

    The other side of `lightest`: the limit in harm is halved until the lightest set just fits. Costs 40 of
    its runs.
    """
    low, high = 0.0, sum(max(c.harm for c in menu) for menu in menus) * 1.02 + 1e-30
    best = lightest(menus, high)
    if best is None or sum(c.bytes for c in best) > most_bytes:
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5 if low > 0 else high / 4
        found = lightest(menus, middle)
        if found is not None and sum(c.bytes for c in found) <= most_bytes:
            best, high = found, middle
        else:
            low = middle
        if high < 1e-12 or (low > 0 and high / low < 1.0005):
            break
    return best


def _walk_back(
    menus: Sequence[Sequence[Choice]], taken: list[np.ndarray], step: float, left: int
) -> list[Choice]:
    chosen: list[Choice] = []
    for menu, rows in zip(reversed(menus), reversed(taken), strict=True):
        choice = _sensible(menu)[int(rows[left])]
        left -= _steps(choice, step)
        chosen.append(choice)
    return chosen[::-1]


def _steps(choice: Choice, step: float) -> int:
    """Harm in whole steps, rounded up; the slack keeps a harm of exactly `limit` at the last step."""
    return max(0, int(np.ceil(choice.harm / step * (1 - 1e-12))))


def _sensible(menu: Sequence[Choice]) -> list[Choice]:
    """The choices for which no other is both cheaper and less harmful, least harm first."""
    kept: list[Choice] = []
    for choice in sorted(menu, key=lambda c: (c.harm, c.bytes)):
        if not kept or choice.bytes < kept[-1].bytes:
            kept.append(choice)
    return kept
