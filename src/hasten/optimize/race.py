"""Models timed against each other: in turn, on the same prompts, until it is clear which is the fastest.

One after another would compare moments of the machine and not models. So every round runs each of them once
on the round's prompts, in an order that turns round from one to the next, and what counts is the ratio of two
costs within a round: what slows a round for everybody cancels. A round in which one was disturbed (its rate
far below its usual one) counts for nobody, is taken again and is reported.

Beside a busy process the ratios still scatter, and whoever is chosen by them alone is chosen by chance. What
is known without noise is the prediction: a ratio from bytes and shapes, which is off by some hundredths. The
two are joined as two measurements of one thing, each with the weight of its precision (the posterior of a
normal prior). On a quiet machine the rounds decide, as they are three to ten times as precise; where they
tell little, the prediction does, and does so in each run.

After each round, who is clearly slower leaves: its joined ratio to the fastest is above the limit of a tie by
two standard deviations. So the last rounds are spent on those that are close (racing: Maron and Moore, 1994).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hasten.bench.figures import Ratio, Sample, disturbed, percentile
from hasten.bench.measure import rates_of

SAME = 0.02
"""Costs this close are a tie: a machine repeats a run no better."""
LEAST = 3  # rounds before everything is settled
_MOST = 4  # times as many at most
_PACER = 2  # rounds of who is timed and not raced
_SPARE = 6  # rounds that may be taken again because of other work
_RESAMPLES = 400
_PREDICTION = 0.08
"""Standard deviation of the logarithm of a predicted ratio over the 90 pairs of recipes in predict.json, the
noise of what was measured there included: 0.074 by what was timed on the machine, 0.077 by bytes."""
_FINEST = 0.005  # no few rounds are more precise than that, however alike they are
_FIRST_ROUNDS = 0.1  # deviation of a single ratio, where two rounds cannot tell it


@dataclass(frozen=True)
class Lap:
    """One run of one model."""

    sample: Sample
    joules: float | None = None


@dataclass(frozen=True)
class Racer:
    """One model at the start."""

    name: str
    run: Callable[[int], Lap]  # the run of a round
    is_pacer: bool = False  # is timed in two rounds and then leaves; nobody is compared with it


@dataclass
class Standing:
    """What is known of one model."""

    laps: dict[int, Lap] = field(default_factory=dict)  # by round
    disturbed: int = 0
    ratio: Ratio | None = None  # its cost over another one's, as measured; None: it was never beside it
    believed: float | None = None  # its cost over the fastest one's, measurement and prediction joined

    def kept(self) -> tuple[Lap, ...]:
        return tuple(self.laps.values())


Cost = Callable[[Lap], float]


def race(
    racers: Sequence[Racer],
    cost: Cost,
    *,
    predicted: Mapping[str, float] | None = None,
    least: int = LEAST,
    say: Callable[[str], None] = lambda _: None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Standing]:
    """Rounds until all but those that tie with the fastest have left.

    Args:
        racers: at least one, with names of their own.
        cost: of one run, smaller is better.
        predicted: cost of each by its shapes, in any unit; None: nothing is known.
        least: rounds that everybody is timed for, but for who is far behind. There are four times as many
            at most, those apart that are taken again.
        say: told what happens.
        is_over: the time is up: the rounds that were taken must do, at least one.

    Returns:
        By name, with what is known of each against the fastest.
    """
    track = _Track(racers, cost, least, predicted or {})
    number = 0
    while track.running and number < _MOST * least + track.spare_used():
        number += 1
        track.round(number, say)
        if is_over():
            break
        track.part(say)
    return track.standings()


@dataclass(frozen=True)
class _Belief:
    """The logarithm of a ratio of costs, and its standard deviation."""

    value: float
    deviation: float

    def joined(self, other: _Belief) -> _Belief:
        """Two independent measurements of one thing, each by its precision."""
        ours, theirs = self.deviation**-2, other.deviation**-2
        value = (self.value * ours + other.value * theirs) / (ours + theirs)
        return _Belief(value, (ours + theirs) ** -0.5)


_TIE = math.log(1 + SAME)


class _Track:
    def __init__(
        self, racers: Sequence[Racer], cost: Cost, least: int, predicted: Mapping[str, float]
    ) -> None:
        self._cost, self._least, self._predicted = cost, least, predicted
        self.running = list(racers)
        self._raced = [racer.name for racer in racers if not racer.is_pacer]
        self._all: dict[str, Standing] = {racer.name: Standing() for racer in racers}
        self._repeated = 0

    def spare_used(self) -> int:
        return min(self._repeated, _SPARE)

    def round(self, number: int, say: Callable[[str], None]) -> None:
        """Everybody once; the order turns round."""
        turned = self.running if number % 2 else self.running[::-1]
        for racer in turned:
            self._all[racer.name].laps[number] = racer.run(number)
        hit = [racer.name for racer in self.running if self._drops(racer.name)]
        if hit:
            self._repeated += 1
            say(f"other work disturbed {', '.join(hit)}: one more round")

    def _drops(self, name: str) -> bool:
        """Drop rounds in which a model was disturbed, for all it is compared with; whether there were."""
        one = self._all[name]
        slow = disturbed([rates_of(lap.sample) for lap in one.laps.values()])
        hit = [number for number, is_slow in zip(list(one.laps), slow, strict=True) if is_slow]
        if not hit or len(hit) == len(one.laps) or self._repeated >= _SPARE:
            return False
        one.disturbed += len(hit)
        beside = (
            [racer.name for racer in self.running if not racer.is_pacer] if name in self._raced else [name]
        )
        for other in beside:
            laps = self._all[other].laps
            for number in hit:
                if len(laps) > 1:
                    laps.pop(number, None)
        return True

    def part(self, say: Callable[[str], None]) -> None:
        """Let those go that have nothing left to win; all, once nothing is open."""
        for racer in list(self.running):
            if racer.is_pacer and len(self._all[racer.name].laps) >= min(self._least, _PACER):
                self.running.remove(racer)
        names = [racer.name for racer in self.running if not racer.is_pacer]
        ahead = self._ahead(names)
        if ahead is None:
            return
        for racer in list(self.running):
            if racer.name == ahead or racer.is_pacer or len(self._ratios(racer.name, ahead)) < 2:
                continue
            known = self._belief(racer.name, ahead)
            if known is not None and known.value - 2 * known.deviation > _TIE:
                self._note(racer.name, ahead)
                self.running.remove(racer)
                say(f"{racer.name} is slower than {ahead}")
        names = [racer.name for racer in self.running if not racer.is_pacer]
        if len(self.running) == len(names) and self._is_settled(names, ahead):
            self.running.clear()

    def _is_settled(self, names: Sequence[str], ahead: str) -> bool:
        """One is left, or all that are left tie for sure."""
        if len(self._all[ahead].laps) < self._least:
            return False
        known = [self._belief(name, ahead) for name in names if name != ahead]
        return all(one is not None and one.value + 2 * one.deviation < _TIE for one in known)

    def _ahead(self, names: Iterable[str]) -> str | None:
        """The one with the least median cost over its runs."""
        known = {
            name: statistics.median(map(self._cost, self._all[name].kept()))
            for name in names
            if self._all[name].laps
        }
        return min(known, key=lambda name: known[name], default=None)

    def _belief(self, name: str, ahead: str) -> _Belief | None:
        """What rounds and prediction say together; None: no round that both took."""
        logs = [math.log(ratio) for ratio in self._ratios(name, ahead)]
        if not logs:
            return None
        deviation = _FIRST_ROUNDS / math.sqrt(len(logs)) if len(logs) < 3 else _deviation(logs)
        measured = _Belief(statistics.median(logs), max(deviation, _FINEST))
        ours, theirs = self._predicted.get(name), self._predicted.get(ahead)
        if not ours or not theirs:
            return measured
        return measured.joined(_Belief(math.log(ours / theirs), _PREDICTION))

    def _ratios(self, name: str, ahead: str) -> list[float]:
        """Round by round, of the rounds that both took."""
        ours, theirs = self._all[name].laps, self._all[ahead].laps
        return [self._cost(ours[n]) / self._cost(theirs[n]) for n in ours if n in theirs]

    def _note(self, name: str, ahead: str) -> None:
        """Keep what is known of one against another."""
        if ratios := self._ratios(name, ahead):
            self._all[name].ratio = _median_ratio(ratios)
        known = self._belief(name, ahead)
        if known is not None:
            self._all[name].believed = math.exp(known.value)

    def standings(self) -> dict[str, Standing]:
        """All of them; who left keeps what was known then."""
        last = max((len(self._all[name].laps) for name in self._raced), default=0)
        stayed = [name for name in self._raced if len(self._all[name].laps) == last]
        ahead = self._ahead(stayed)
        for name in stayed:
            if ahead is not None and self._all[name].believed is None:
                self._note(name, ahead)
        least = min((one.believed for one in self._all.values() if one.believed is not None), default=1.0)
        for one in self._all.values():
            if one.believed is not None:
                one.believed /= least
        return self._all


def _deviation(logs: Sequence[float]) -> float:
    """Standard deviation of their median, by bootstrap; put right for few values."""
    draw, count = random.Random(0), len(logs)
    found = [statistics.median(draw.choices(logs, k=count)) for _ in range(_RESAMPLES)]
    return statistics.pstdev(found) * math.sqrt(count / (count - 1))


def _median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median of paired ratios with a 95 % bootstrap interval; of two or less, all there is."""
    middle = percentile(ratios, 0.5)
    if len(ratios) < 3:
        return Ratio(middle, min(ratios), max(ratios), len(ratios))
    draw = random.Random(0)
    found = [percentile(draw.choices(ratios, k=len(ratios)), 0.5) for _ in range(_RESAMPLES)]
    return Ratio(middle, percentile(found, 0.025), percentile(found, 0.975), len(ratios))


def apart(costs: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    """Ratios of models that were timed one after another, each with an interval from its own runs.

    Where memory holds one at a time. Rounds are not paired, so what the machine did meanwhile is in it.
    """
    ahead = min(costs, key=lambda name: statistics.median(costs[name]))
    draw, found = random.Random(0), {}
    for name, ours in costs.items():
        drawn = [
            percentile(draw.choices(ours, k=len(ours)), 0.5)
            / percentile(draw.choices(costs[ahead], k=len(costs[ahead])), 0.5)
            for _ in range(_RESAMPLES)
        ]
        middle = statistics.median(ours) / statistics.median(costs[ahead])
        low, high = percentile(drawn, 0.025), percentile(drawn, 0.975)
        found[name] = (
            Ratio(middle, low, high, len(ours)) if name != ahead else Ratio(1.0, 1.0, 1.0, len(ours))
        )
    return found
