"""The mixture: widths by group that together just meet the budget.

The knapsack needs a limit in KL, the user gives one in perplexity, and summed harms are a first-order
prediction. So uniform recipes of the same method that were judged already calibrate the first limit (without
one, perplexity is taken to rise by what KL does, which holds where the text is what the model expects), the
mixture is judged as a whole, and the limit moves until the mixture passes with little to spare. Trying three
or four mixtures on the same text and keeping the best that passes is a selection; the whole 95 % interval has
to be within the budget, not its middle, which leaves room for it.

Decoding is memory-bound, so the bytes read a token are the predicted time: on the development machine 4.5 and
5.7 bits a weight took the same time a byte to 0.3 % (peers.json). Timing each layout instead was tried; on a
machine that is not quiet it measures the others' load, and mixtures then avoid the wrong widths.

Harms of separate groups add up to first order, as their errors are independent. So: the fewest bytes whose
summed harm stays within a limit, a multiple-choice knapsack. Solved by dynamic programming over harm in 8,192
steps, each harm rounded up: the limit is never exceeded, and with 100 groups at most 1.2 % of it is left
unused. Takes about 0.1 s for 100 groups of 6 choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hasten.compress.result import Observer
from hasten.core import Budget, Recipe
from hasten.optimize.calibrated import mixture_name, split
from hasten.optimize.choice import Candidate, percent
from hasten.optimize.sensitivity import Check, Choice, Harms, Sensitivity, SensitivityMap, draw, measure_harms
from hasten.optimize.trials import SearchMemory, Trials
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.text import Text
from hasten.weights import format_named

_STEPS = 8192


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


_FIRST_AIM = 0.6  # of the budget where no interval is known yet: the rest is for it
_FIRST_REACH = 0.93  # of the budget: where the first try's interval should end, as far as others' widths tell
_NEXT_AIM = 0.95
_GOOD_ENOUGH = 0.85  # of the budget used: another try gains less than it costs
_LEAST_GAIN = 0.02  # of the bytes: nor does a try for less than a tie of speeds
_TRIES = 4
_FEW_TRIES = 1  # of a method that takes minutes a model
_LESS_LOSS = (
    1.15  # that method's limit over the other one's: KL 0.0251 for 0.0311 at 4 bits (quantise.json), and room
)

Try = Callable[[Recipe], Candidate]


@dataclass(frozen=True)
class Point:
    """A limit in predicted KL and the perplexity increase that came of it (the interval's upper end)."""

    harm: float
    reach: float


def predicted_harm(recipe: Recipe, sensitivities: Sequence[Sensitivity]) -> float | None:
    """Summed harm of any recipe, nats; None where a group's layout was not on the menu."""
    harms = [s.harm_of(recipe.layout_for(s.group.tensors[0])) for s in sensitivities]
    return None if any(h is None for h in harms) else sum(h for h in harms if h is not None)


def mixture_recipe(
    name: str, sensitivities: Sequence[Sensitivity], choices: Sequence[Choice], method: str = "rtn"
) -> Recipe:
    layers = {
        tensor: choice.layout
        for s, choice in zip(sensitivities, choices, strict=True)
        if choice.layout is not None
        for tensor in s.group.tensors
    }
    return Recipe(name=name, default=None, layers=layers, method=method)


def fit_mixture(
    drawn: SensitivityMap,
    judged: Sequence[Candidate],
    budget: Budget,
    attempt: Try,
    tokens: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Candidate | None:
    """The lightest mixture that passes, of up to four; the nearest if none does; None where there is nothing
    to mix.

    Args:
        drawn: the map, measured with the method that the mixture's integers are found by.
        judged: uniform recipes with their verdicts; those of the same method calibrate the first limit.
        budget: what the whole mixture has to meet.
        attempt: packs and judges a recipe.
        tokens: of a full judgement, to know how far an interval from fewer would narrow.
        is_over: asked before another try: the time is up.
    """
    limit = _first_limit(drawn, judged, budget, tokens)
    if limit is None:
        return None
    plain = (
        c for c in judged if not (c.recipe.default or c.recipe.head or c.recipe.layers)
    )  # source's values
    kept = min((reach(c, tokens) for c in plain), default=0.0)
    return _best(_closing_in(drawn, budget, attempt, tokens, limit, Point(0.0, kept), is_over=is_over))


def refine_mixture(
    drawn: SensitivityMap, found: Candidate, budget: Budget, attempt: Try, tokens: int, method: str
) -> Candidate:
    """The lightest mixture by a better method that takes minutes, from where another one's search ended.

    One is tried, as much narrower as the method loses less; where it fails, the other one's stays.

    Args: as for `fit_mixture`, and
        found: a mixture by the map's method, which is returned where none that is tried is lighter or better.
        method: of the mixtures to try.
    """
    limit = predicted_harm(found.recipe, drawn.groups)
    assert limit is not None, "a mixture is made of the menu"
    better = replace(drawn, method=method)
    tried = _closing_in(better, budget, attempt, tokens, limit * _LESS_LOSS, Point(0.0, 0.0), _FEW_TRIES)
    best = _best([found, *tried])
    assert best is not None
    return best


def _closing_in(
    drawn: SensitivityMap,
    budget: Budget,
    attempt: Try,
    tokens: int,
    limit: float,
    below: Point,
    tries: int = _TRIES,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Candidate]:
    """Mixtures at limits that come ever nearer to the budget; `below` is a point within it."""
    name, above = mixture_name(budget), None
    tried: list[Candidate] = []
    for _ in range(tries):
        if tried and is_over():
            break
        choices = lightest([s.menu for s in drawn.groups], limit)
        if choices is None:
            break
        size = sum(choice.bytes for choice in choices)
        if any(c.passes and size > (1 - _LEAST_GAIN) * c.weight_bytes for c in tried):
            break
        recipe = mixture_recipe(name, drawn.groups, choices, drawn.method)
        if not recipe.layers or any(recipe.layers == c.recipe.layers for c in tried):
            break
        candidate = attempt(recipe)
        tried.append(candidate)
        point = Point(limit, reach(candidate, tokens))
        if not candidate.passes:
            above = point if above is None or point.harm < above.harm else above
        elif point.harm > below.harm:
            below = point
        if candidate.passes and point.reach >= _GOOD_ENOUGH * budget.max_ppl_increase:
            break
        limit = _next_limit(below, above, budget)
    return tried


def reach(candidate: Candidate, tokens: int) -> float:
    """Upper end of the interval as `tokens` tokens would show it: it narrows with their root."""
    verdict = candidate.verdict
    half = verdict.ppl_increase_high - verdict.ppl_increase
    return verdict.ppl_increase + half * math.sqrt(min(1.0, verdict.tokens / tokens))


def _first_aim(judged: Sequence[Candidate], budget: Budget, tokens: int) -> float:
    """The rise that leaves room for its interval.

    A difference of losses scatters with the root of the divergence, which the rise grows with. So the width
    of a recipe that was judged tells that of another: half = k * sqrt(rise), and rise + half is to be within.
    """
    most = budget.max_ppl_increase
    known = [
        (v.ppl_increase_high - v.ppl_increase) / math.sqrt(v.ppl_increase) * math.sqrt(v.tokens / tokens)
        for v in (c.verdict for c in judged)
        if v.ppl_increase > 0.2 * most > 0
    ]
    if not known:
        return _FIRST_AIM * most
    k = min(known)  # few tokens have an interval that is wider than that root
    root = (math.sqrt(k * k + 4 * _FIRST_REACH * most) - k) / 2
    return max(root * root, 0.25 * most)


def _first_limit(
    drawn: SensitivityMap, judged: Sequence[Candidate], budget: Budget, tokens: int
) -> float | None:
    """Predicted KL that should cost the first aim, on the line through a judged recipe."""
    aim = _first_aim(judged, budget, tokens)
    known = [
        (harm, c.verdict.ppl_increase)
        for c in judged
        if (harm := predicted_harm(c.recipe, drawn.groups)) is not None
        and (harm == 0.0 or c.recipe.method == drawn.method)
    ]
    start = min((rise for harm, rise in known if harm == 0.0), default=0.0)
    uniform = [(harm, rise) for harm, rise in known if harm > 0]
    if not uniform:
        return aim - start if aim > start else None
    points = [(harm, rise) for harm, rise in uniform if rise > aim]
    if not points:
        return None  # the narrowest uniform recipe is within the budget: a mixture could only be wider
    harm, rise = min(points, key=lambda point: point[1])
    share = (aim - start) / (rise - start) if rise > start else 0.0
    return harm * share if share > 0 else None


def _next_limit(below: Point, above: Point | None, budget: Budget) -> float:
    """On the line through what passed and what did not; never beyond three times what passed."""
    aim = _NEXT_AIM * budget.max_ppl_increase
    if above is None:
        slope = below.reach / below.harm if below.reach > 0 else 0.0
        return min(aim / slope, 3 * below.harm) if slope > 0 else 3 * below.harm
    share = (aim - below.reach) / (above.reach - below.reach) if above.reach > below.reach else 0.5
    return below.harm + min(max(share, 0.1), 0.9) * (above.harm - below.harm)


def _best(tried: Sequence[Candidate]) -> Candidate | None:
    if not tried:
        return None
    passing = [c for c in tried if c.passes]
    best = (
        min(passing, key=lambda c: (c.weight_bytes, c.verdict.kl_mean))
        if passing
        else min(tried, key=lambda c: c.verdict.ppl_increase_high)
    )
    rises = ", ".join(f"{c.bits_per_weight:.2f} bits {percent(c.verdict.ppl_increase)}" for c in tried)
    return replace(best, because=f"Mixtures tried: {rises}.")


@dataclass
class Mixing:
    """Everything a mixture is made with; its integers are found by `method`."""

    workshop: Workshop
    source: Callable[[], Built]  # the source in bf16, made at first use
    text: Text
    memory: SearchMemory
    trials: Trials
    budget: Budget
    seconds: float  # for the map's comparisons
    observer: Observer
    calibrated: str | None = None  # what calibrated integers depend on; None: there are none
    is_over: Callable[[], bool] = lambda: False  # the time of the search is up: no further try

    @property
    def method(self) -> str:
        """How the mixture's integers are found: calibrated where that is possible."""
        return "rtn" if self.calibrated is None else "gptq"

    @cached_property
    def map(self) -> SensitivityMap:
        """Every group's harm at every width; measured once for a source, text and method."""
        key = {"method": self.method, "calibrated": self.calibrated}
        kept = self.memory.read("harms", **key)
        if kept is None:
            harms = measure_harms(
                self.workshop,
                self.source(),
                split(self.text.calibration)[1],
                seconds=self.seconds,
                observer=self.observer,
                method=self.method,
            )
            self.memory.write("harms", harms, **key)
        else:
            harms = harms_from(kept)
        return draw(self.workshop, harms, method=self.method)

    def fit(self, judged: Sequence[Candidate] = ()) -> Candidate | None:
        """The cheapest mixture within the budget, or the nearest to it; None where there is nothing to mix.

        With torch, widths are searched with matrices that GPTQ finds one by one, each a read once it was
        found; the best of them is then made layer after layer, which takes minutes and loses less.

        Args:
            judged: uniform recipes with their verdicts.
        """
        tokens = max((c.verdict.tokens for c in judged), default=self.trials.tokens)
        found = fit_mixture(self.map, judged, self.budget, self.trials.judge, tokens, self.is_over)
        if found is None or self.calibrated is None:
            return found
        return refine_mixture(self.map, found, self.budget, self.trials.judge, tokens, "best")


def harms_from(kept: Any) -> Harms:
    checks = (Check(c["group"], format_named(c["layout"]), c["harm"]) for c in kept["checks"])
    return Harms(tuple(kept["at_probe"]), tuple(checks))
