"""What a search is asked for, which of the recipes that were tried is chosen, and the reason for each.

The rule, in this order: what is asked for is kept (quality, speed, memory, load); among those that keep it
the best by the goal; among those within 2 % of it the one closest to the source; among equally close ones the
smallest. How much two differ is what the race measured and the prediction, each by its precision
(`hasten.optimize.race`): so a machine that is disturbed now and then does not choose by chance.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from hasten.bench.figures import Ratio
from hasten.bench.workload import Traffic
from hasten.core import Budget, Goal, Measurement, Recipe, Verdict, Workload
from hasten.errors import BudgetError, UsageError
from hasten.optimize.race import SAME
from hasten.speed.forecast import BUSY

TOGETHER = 8
"""Answers at once, where many count: throughput, cost, and what a rate of requests is held against."""

WORKLOADS: dict[Goal, Workload] = {
    "latency": Workload(prompt=512, output=128, batch=1),
    "throughput": Workload(prompt=128, output=64, batch=TOGETHER),
    "memory": Workload(prompt=512, output=128, batch=1),
    "cost": Workload(prompt=128, output=64, batch=TOGETHER),
    "energy": Workload(prompt=512, output=128, batch=1),
}
"""What speed is measured on, by goal, where no workload is named."""


@dataclass(frozen=True)
class Aims:
    """Everything asked of a search. None: nothing is asked."""

    budget: Budget = field(default_factory=Budget)
    goal: Goal = "latency"
    traffic: Traffic | None = None
    ttft_ms: float | None = None  # the first token of a request alone, median
    tpot_ms: float | None = None  # from a token to the next, median
    memory_bytes: int | None = None  # weights, keys and values, buffers and the process, at the peak
    rate: float | None = None  # requests a second of the workload that one copy carries
    price_per_hour: float | None = None  # of the machine, in any currency

    def __post_init__(self) -> None:
        if self.goal not in get_args(Goal):
            near = difflib.get_close_matches(str(self.goal), get_args(Goal), n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"unknown goal {self.goal!r}", hint=f"{meant}use one of {', '.join(get_args(Goal))}"
            )
        rise = self.budget.max_ppl_increase
        if not math.isfinite(rise) or rise < 0:
            raise UsageError(
                f"a perplexity increase of {rise * 100:g} % is no budget", hint="use --max-ppl-increase 1%"
            )
        self._need_positive()
        if self.goal == "cost" and self.price_per_hour is None:
            raise UsageError(
                "what a token costs depends on what the machine costs", hint="add --price-per-hour 1.20"
            )
        self._need_no_contradiction()

    def _need_positive(self) -> None:
        kl = self.budget.max_kl
        for flag, value, example in (
            ("--ttft", self.ttft_ms, "500ms"),
            ("--tpot", self.tpot_ms, "50ms"),
            ("--memory", self.memory_bytes, "2GB"),
            ("--rate", self.rate, "2"),
            ("--price-per-hour", self.price_per_hour, "1.20"),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{flag} must be above 0, got {value:g}", hint=f"use {flag} {example}")
        if kl is not None and not 0 <= kl < math.inf:
            raise UsageError(f"--max-kl must be 0 nats or more, got {kl:g}", hint="use --max-kl 0.01")

    def _need_no_contradiction(self) -> None:
        """A deadline of the workload that the two times asked for would break together."""
        asked = self.traffic
        if asked is None or asked.deadline_ms is None:
            return
        output = asked.output.median
        whole = (self.ttft_ms or 0.0) + (output - 1) * (self.tpot_ms or 0.0)
        if whole > asked.deadline_ms:
            raise UsageError(
                f"--ttft and --tpot allow {whole:.0f} ms for an answer of {output} tokens, and the workload "
                f"{asked.name} has a deadline of {asked.deadline_ms:g} ms",
                hint=f"leave them out, or use --tpot {asked.deadline_ms / (2 * output):.3g}ms",
            )

    @property
    def workload(self) -> Workload:
        """What is timed."""
        if self.traffic is None:
            found = WORKLOADS[self.goal]
            return found if self.rate is None else replace(found, batch=TOGETHER)
        many = self.goal in ("throughput", "cost") or self.rate is not None
        return self.traffic.typical(TOGETHER if many else 1)

    @property
    def timed_alone(self) -> Workload:
        """The same request with nobody beside it: what --ttft and --tpot are asked of."""
        return replace(self.workload, batch=1)

    @property
    def asks_speed(self) -> bool:
        """Whether a recipe must be timed to know whether it will do."""
        return any(value is not None for value in (self.ttft_ms, self.tpot_ms, self.rate))


def cost_of(measured: Measurement, goal: Goal) -> float:
    """What a goal makes small, of a measurement.

    Milliseconds of a request (latency, memory), of a token of the whole batch (throughput, cost), joules of a
    token (energy).
    """
    if goal in ("throughput", "cost"):
        return 1e3 * seconds_of(measured) / (measured.workload.batch * measured.workload.output)
    if goal == "energy":
        assert measured.joules_per_token is not None, "the meter was asked for before anything was timed"
        return measured.joules_per_token
    return measured.ttft_ms.median + (measured.workload.output - 1) * measured.tpot_ms.median


def seconds_of(measured: Measurement) -> float:
    """From asking to the last token of all sequences."""
    work = measured.workload
    tokens = work.batch * (work.output - 1)
    return measured.ttft_ms.median / 1e3 + tokens / measured.decode_tok_per_s.median


def carried(measured: Measurement) -> float:
    """Requests a second that one copy carries without long waiting: `BUSY` of what it does without pause."""
    return BUSY * measured.workload.batch / seconds_of(measured)


def price_of(measured: Measurement, per_hour: float) -> float:
    """What a million tokens of answers cost where the machine is busy all the time."""
    tokens = measured.workload.batch * measured.workload.output / seconds_of(measured)
    return per_hour / 3600 / tokens * 1e6


@dataclass(frozen=True)
class Candidate:
    """A recipe: size, cost in quality, speed (None: not timed), and why it was kept or not."""

    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int  # one token reads
    verdict: Verdict
    measurement: Measurement | None = None
    because: str = ""
    stored_bytes: int | None = None  # in memory; None: as many as one token reads
    memory_bytes: int | None = None  # of the whole process at its peak on the workload, predicted
    ratio: Ratio | None = None  # its cost over another one's, as the race measured it
    believed: float | None = None  # its cost over the fastest one's: race and prediction joined
    alone: Measurement | None = None  # one request with nobody beside it, where the workload is many

    @property
    def passes(self) -> bool:
        """Within the quality budget, shown with enough text."""
        return self.verdict.status == "pass"

    @property
    def size(self) -> int:
        """Bytes of all matrices in memory."""
        return self.weight_bytes if self.stored_bytes is None else self.stored_bytes

    def cost(self, goal: Goal) -> float:
        """What the goal makes small; only for a timed candidate, or goal `memory`, where it is bytes."""
        if goal == "memory":
            return float(self.size)
        assert self.measurement is not None
        return cost_of(self.measurement, goal)


@dataclass(frozen=True)
class Untried:
    """A recipe that could not win, and how that was known without it being tried."""

    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int
    because: str


@dataclass(frozen=True)
class Miss:
    """One thing asked for that a recipe does not keep."""

    said: str
    excess: float  # beyond what is asked, as a share of it: 0.5 is half as much again


def misses(candidate: Candidate, aims: Aims) -> tuple[Miss, ...]:
    """What a candidate does not keep of what is asked; what is not known of it is not missed."""
    return tuple(_misses(candidate, aims))


def _misses(candidate: Candidate, aims: Aims) -> Iterator[Miss]:
    verdict, budget = candidate.verdict, aims.budget
    if verdict.status != "pass":
        yield from _quality_misses(verdict, budget)
    alone = candidate.alone or candidate.measurement
    memory = candidate.memory_bytes
    if memory is not None and aims.memory_bytes is not None and memory > aims.memory_bytes:
        yield _miss(f"needs {_mb(memory)}, {_mb(aims.memory_bytes)} asked", memory, aims.memory_bytes)
    if alone is not None:
        for asked, stat, what in (
            (aims.ttft_ms, alone.ttft_ms, "first token"),
            (aims.tpot_ms, alone.tpot_ms, "a token"),
        ):
            if asked is not None and stat.median > asked:
                yield _miss(f"{what} {stat.median:.4g} ms, {asked:.4g} ms asked", stat.median, asked)
    if aims.rate is not None and candidate.measurement is not None:
        found = carried(candidate.measurement)
        if found < aims.rate:
            yield _miss(f"carries {found:.3g} requests/s, {aims.rate:.3g} asked", aims.rate, found)


def _quality_misses(verdict: Verdict, budget: Budget) -> Iterator[Miss]:
    if verdict.missed:  # tasks are asked of what passed by text
        wanted, shares = dict(budget.min_tasks or ()), verdict.task_shares or {}
        task = verdict.missed.partition(":")[0]
        yield _miss(verdict.missed, wanted.get(task, 1.0), max(shares.get(task) or 0.0, 1e-3))
        return
    high, limit = verdict.ppl_increase_high, budget.max_ppl_increase
    most = verdict.kl_mean if verdict.kl_mean_high is None else verdict.kl_mean_high
    misses_kl = budget.max_kl is not None and most > budget.max_kl
    if high > limit or not misses_kl:
        undecided = verdict.status == "insufficient"
        how = f"leaves {limit_of(budget)} undecided" if undecided else f"is above {limit_of(budget)}"
        yield Miss(f"{spread(verdict)} {how}", (high - limit) / max(limit, 1e-3))
    if budget.max_kl is not None and misses_kl:
        said = f"KL {verdict.kl_mean:.2g}" + (f" (up to {most:.2g})" if most > verdict.kl_mean else "")
        yield _miss(f"{said}, {budget.max_kl:.2g} asked", most, budget.max_kl)


def _miss(said: str, got: float, asked: float) -> Miss:
    return Miss(said, got / asked - 1 if asked > 0 else float("inf"))


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def choose_candidate(candidates: Sequence[Candidate], aims: Aims) -> Candidate:
    """The best by the rule above.

    Raises:
        BudgetError: none keeps what is asked; the message names the nearest ones and what each misses.
    """
    goal = aims.goal
    keeping = [
        c
        for c in candidates
        if not misses(c, aims)
        and c.passes
        and (c.measurement is not None or (goal == "memory" and not aims.asks_speed))
    ]
    if not keeping:
        raise _nothing(candidates, aims)
    best = _best(keeping, goal)
    tied = [c for c in keeping if c is best or _ties(c, best, goal)]
    return min(tied, key=lambda c: (c.verdict.kl_mean, c.size, c.cost(goal)))


def _best(keeping: Sequence[Candidate], goal: Goal) -> Candidate:
    """The cheapest: by what is believed where all were raced together, else by what was measured."""
    if goal != "memory" and all(c.believed is not None for c in keeping):
        return min(keeping, key=lambda c: c.believed or 0.0)
    return min(keeping, key=lambda c: c.cost(goal))


def _ties(candidate: Candidate, best: Candidate, goal: Goal) -> bool:
    """Whether a candidate costs no more than a tie allows."""
    return _over(candidate, best, goal) <= (0.0 if goal == "memory" else SAME)


def _over(candidate: Candidate, best: Candidate, goal: Goal) -> float:
    """How much more a candidate costs, as a share."""
    if goal != "memory" and candidate.believed is not None and best.believed is not None:
        return candidate.believed / best.believed - 1
    return candidate.cost(goal) / best.cost(goal) - 1


def explain(
    candidates: Sequence[Candidate], chosen: Candidate, aims: Aims, baseline: Measurement
) -> list[Candidate]:
    """The candidates with their reasons, in the same order."""
    return [
        replace(c, because=_chosen(c, aims, baseline, candidates))
        if c is chosen
        else replace(c, because=" ".join(filter(None, (_rejected(c, chosen, aims), c.because))))
        for c in candidates
    ]


_WORDS = {
    "latency": "fastest",
    "throughput": "highest throughput",
    "memory": "smallest",
    "cost": "cheapest",
    "energy": "least energy",
}


def _chosen(chosen: Candidate, aims: Aims, baseline: Measurement, candidates: Sequence[Candidate]) -> str:
    goal, budget = aims.goal, aims.budget
    parts = [f"chosen: {_WORDS[goal]} within {limits_of(budget)};", f"{spread(chosen.verdict)}."]
    if chosen.verdict.task_shares:
        shares = chosen.verdict.task_shares.items()
        parts.append(f"Right answers: {', '.join(f'{task} {share or 0.0:.0%}' for task, share in shares)}.")
    measured = chosen.measurement
    if goal == "latency" and measured is not None:
        request = measured.workload
        parts.append(
            f"A request of {request.prompt} in, {request.output} out takes {chosen.cost(goal) / 1000:.2f} s, "
            f"bf16 {cost_of(baseline, goal) / 1000:.2f} s."
        )
    if measured is not None:
        parts += _served(measured, baseline, aims)
    if goal != "memory":
        timed = [c for c in candidates if c is not chosen and c.measurement is not None]
        tied = [c for c in timed if not misses(c, aims) and _over(c, chosen, goal) <= 0]
        if tied:
            names = ", ".join(c.recipe.name for c in tied)
            parts.append(f"Within 2 % of {names}, and it is closer to the source.")
    return " ".join([*parts, chosen.because]).strip()


def _rounds(ratio: Ratio) -> str:
    return (
        f"{ratio.n} round{'s' * (ratio.n > 1)} side by side measured {ratio.median - 1:+.1%} "
        f"({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
    )


def _served(measured: Measurement, baseline: Measurement, aims: Aims) -> Iterator[str]:
    """What it costs, what it carries, and whether users of the workload wait too long."""
    if aims.price_per_hour is not None:
        ours, theirs = (price_of(one, aims.price_per_hour) for one in (measured, baseline))
        yield (
            f"A million tokens cost {ours:.3g} at {aims.price_per_hour:.4g} an hour, in bf16 {theirs:.3g}, "
            "on a machine that is never idle."
        )
    if aims.rate is not None:
        yield f"One copy carries {carried(measured):.3g} requests/s of this workload."
    if aims.goal == "energy" and measured.joules_per_token is not None:
        yield f"It takes {measured.joules_per_token:.3g} J a token."
    if aims.traffic is not None and measured.workload.batch == 1:
        whole = 1e3 * seconds_of(measured)
        held = aims.traffic.in_time(measured.ttft_ms.median, measured.tpot_ms.median, whole)
        yield (
            f"A request in the middle of {aims.traffic.name} takes {whole:.0f} ms, "
            f"{'in time for' if held else 'too late for'} its users when the machine is idle."
        )


def _rejected(candidate: Candidate, chosen: Candidate, aims: Aims) -> str:
    verdict, goal = candidate.verdict, aims.goal
    missed = misses(candidate, aims)
    if missed:
        said = "out: " + "; ".join(miss.said for miss in missed)
        if verdict.status == "insufficient" and not verdict.missed:
            what = (
                "give more with --tokens"
                if verdict.ppl_increase < aims.budget.max_ppl_increase
                else "given up"
            )
            return f"{said} after {verdict.tokens:,} tokens; {what}."
        return said + "."
    if goal == "memory":
        more = candidate.cost(goal) / chosen.cost(goal) - 1
        return f"passes with {spread(verdict)}, but needs {more:.0%} more memory than {chosen.recipe.name}."
    if candidate.measurement is None:
        return f"passes with {spread(verdict)}."
    slower = _over(candidate, chosen, goal)
    shown = "" if candidate.ratio is None else f": {_rounds(candidate.ratio)}, joined with the prediction"
    if _ties(candidate, chosen, goal):
        return (
            f"passes and is as fast as {chosen.recipe.name} within 2 %, but further from the source{shown}."
        )
    worse = "slower" if goal in ("latency", "throughput") else "dearer"
    return f"passes with {spread(verdict)}, but is {slower:.0%} {worse} than {chosen.recipe.name}{shown}."


def percent(value: float) -> str:
    """+0.82 %, -0.30 %, +12 %: signed."""
    return f"{value * 100:+.2f} %" if abs(value) < 0.0995 else f"{value * 100:+.0f} %"


def limit_of(budget: Budget) -> str:
    """The budget of perplexity as the user wrote it: +1 %."""
    return f"{budget.max_ppl_increase * 100:+.4g} %"


def limits_of(budget: Budget) -> str:
    """All of a quality budget: `+1 %`, or `+1 % and KL 0.01 and json 0.9`."""
    limits = [limit_of(budget)]
    if budget.max_kl is not None:
        limits.append(f"KL {budget.max_kl:.2g}")
    return " and ".join([*limits, *(f"{task} {share:.3g}" for task, share in budget.min_tasks or ())])


def spread(verdict: Verdict) -> str:
    """The perplexity increase with its interval."""
    low, high = percent(verdict.ppl_increase_low), percent(verdict.ppl_increase_high)
    return f"perplexity {percent(verdict.ppl_increase)} ({low} to {high})"


_NEAREST = 3


def _nothing(candidates: Sequence[Candidate], aims: Aims) -> BudgetError:
    budget = aims.budget
    if not candidates:
        return BudgetError(
            f"no recipe could be tried within {limits_of(budget)}", hint="give a larger --max-ppl-increase"
        )
    if not any(c.passes or c.verdict.missed for c in candidates) and budget.max_kl is None:
        return _too_coarse(candidates, budget)
    missed = {c.recipe.name: misses(c, aims) for c in candidates}
    near = sorted(
        (c for c in candidates if missed[c.recipe.name]),
        key=lambda c: (sum(miss.excess for miss in missed[c.recipe.name]), c.size),
    )[:_NEAREST]
    lines = [f"{c.recipe.name}: {'; '.join(miss.said for miss in missed[c.recipe.name])}" for c in near]
    return BudgetError(
        "no recipe keeps all that is asked; the nearest:\n  " + "\n  ".join(lines),
        hint=f"allow what {near[0].recipe.name} needs, or take a faster machine or a smaller model"
        if near
        else "give a longer --time-limit",
    )


def _too_coarse(candidates: Sequence[Candidate], budget: Budget) -> BudgetError:
    """Perplexity alone keeps every recipe out."""
    nearest = min(candidates, key=lambda c: c.verdict.ppl_increase_high)
    tokens = nearest.verdict.tokens
    message = (
        f"no recipe is within a perplexity increase of {limit_of(budget)}; {nearest.recipe.name} comes "
        f"nearest: {spread(nearest.verdict)} over {tokens:,} tokens, {nearest.verdict.status}"
    )
    if nearest.verdict.ppl_increase <= budget.max_ppl_increase:  # its interval alone reaches beyond
        return BudgetError(message, hint=f"judge on more text: --tokens {tokens * 4}")
    needed = nearest.verdict.ppl_increase_high * 100
    return BudgetError(message, hint=f"allow more: --max-ppl-increase {max(needed * 1.05, 0.01):.2g}%")
