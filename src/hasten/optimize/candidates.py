"""A recipe that was tried: what is known of it, which one is chosen, and the reason for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.core import Budget, Goal, Measurement, Recipe, Stat, Verdict, Workload
from hasten.errors import BudgetError


@dataclass(frozen=True)
class Candidate:
    """A recipe: size, cost in quality, speed (None: not timed), and why it was kept or not."""

    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int
    verdict: Verdict
    measurement: Measurement | None = None
    because: str = ""

    @property
    def passes(self) -> bool:
        """Within the budget, shown with enough text."""
        return self.verdict.status == "pass"

    def cost(self, goal: Goal) -> float:
        """What the goal makes small; only for a timed candidate, or goal `memory`.

        latency: milliseconds until one request of the workload is done. throughput: milliseconds a token of
        all sequences together. memory: bytes of weights.
        """
        if goal == "memory":
            return float(self.weight_bytes)
        assert self.measurement is not None
        return cost_of(self.measurement, goal)


def cost_of(measured: Measurement, goal: Goal) -> float:
    """Milliseconds of a request (latency) or of a token of the whole batch (throughput)."""
    if goal == "throughput":
        return 1000.0 / measured.decode_tok_per_s.median
    return measured.ttft_ms.median + (measured.workload.output - 1) * measured.tpot_ms.median


def verdict_from(kept: Mapping[str, Any]) -> Verdict:
    """A Verdict out of its JSON."""
    return Verdict(**kept)


def measurement_from(kept: Mapping[str, Any]) -> Measurement:
    """A Measurement out of its JSON."""
    stats = ("prefill_tok_per_s", "decode_tok_per_s", "ttft_ms", "tpot_ms")
    nested = {name: Stat(**kept[name]) for name in stats}
    return Measurement(**{**kept, **nested, "workload": Workload(**kept["workload"])})


_SAME = 0.02
"""Speeds this close are a tie: a machine repeats a run no better. The tie goes to the better quality."""


def choose_candidate(candidates: Sequence[Candidate], goal: Goal, budget: Budget) -> Candidate:
    """The fastest (or smallest) candidate that passes; within 2 % of it, the one with the least KL.

    Raises:
        BudgetError: none passes; the message names the nearest one.
    """
    passing = [c for c in candidates if c.passes and (goal == "memory" or c.measurement is not None)]
    if not passing:
        raise _nothing(candidates, budget)
    fastest = min(c.cost(goal) for c in passing)
    margin = 0.0 if goal == "memory" else _SAME
    tied = [c for c in passing if c.cost(goal) <= fastest * (1 + margin)]
    return min(tied, key=lambda c: (c.verdict.kl_mean, c.cost(goal)))


def explain(
    candidates: Sequence[Candidate], chosen: Candidate, goal: Goal, budget: Budget, baseline: Measurement
) -> list[Candidate]:
    """The candidates with their reasons, in the same order."""
    return [
        replace(c, because=_chosen(c, goal, budget, baseline, candidates))
        if c is chosen
        else replace(c, because=" ".join(filter(None, (_rejected(c, chosen, goal, budget), c.because))))
        for c in candidates
    ]


def _chosen(
    chosen: Candidate, goal: Goal, budget: Budget, baseline: Measurement, candidates: Sequence[Candidate]
) -> str:
    word = {"latency": "fastest", "throughput": "highest throughput", "memory": "smallest"}[goal]
    parts = [f"chosen: {word} within {limit_of(budget)};", f"{spread(chosen.verdict)}."]
    if goal == "latency" and chosen.measurement is not None:
        request = chosen.measurement.workload
        parts.append(
            f"A request of {request.prompt} in, {request.output} out takes {chosen.cost(goal) / 1000:.2f} s, "
            f"bf16 {cost_of(baseline, goal) / 1000:.2f} s."
        )
    tied = [
        c.recipe.name
        for c in candidates
        if c is not chosen and c.passes and c.measurement is not None and c.cost(goal) < chosen.cost(goal)
    ]
    if tied and goal != "memory":
        parts.append(f"As fast as {', '.join(tied)} within 2 %, and closer to the source.")
    return " ".join([*parts, chosen.because]).strip()


def _rejected(candidate: Candidate, chosen: Candidate, goal: Goal, budget: Budget) -> str:
    verdict, limit = candidate.verdict, limit_of(budget)
    if verdict.status == "fail":
        return f"out: {spread(verdict)} is above {limit}."
    if verdict.status == "insufficient":
        return (
            f"out: {spread(verdict)} leaves {limit} undecided after {verdict.tokens:,} tokens;"
            " give more with --tokens."
        )
    if goal == "memory":
        more = candidate.weight_bytes / chosen.weight_bytes - 1
        return f"passes with {spread(verdict)}, but needs {more:.0%} more memory than {chosen.recipe.name}."
    slower = candidate.cost(goal) / chosen.cost(goal) - 1
    if slower <= 0:
        return f"passes and is as fast as {chosen.recipe.name} within 2 %, but further from the source."
    return f"passes with {spread(verdict)}, but is {slower:.0%} slower than {chosen.recipe.name}."


def percent(value: float) -> str:
    """+0.82 %, -0.30 %, +12 %: signed."""
    return f"{value * 100:+.2f} %" if abs(value) < 0.0995 else f"{value * 100:+.0f} %"


def limit_of(budget: Budget) -> str:
    """The budget as the user wrote it: +1 %."""
    return f"{budget.max_ppl_increase * 100:+.4g} %"


def spread(verdict: Verdict) -> str:
    """The perplexity increase with its interval."""
    low, high = percent(verdict.ppl_increase_low), percent(verdict.ppl_increase_high)
    return f"perplexity {percent(verdict.ppl_increase)} ({low} to {high})"


def _nothing(candidates: Sequence[Candidate], budget: Budget) -> BudgetError:
    limit = limit_of(budget)
    if not candidates:
        return BudgetError(
            f"no recipe could be tried within {limit}", hint="give a larger --max-ppl-increase"
        )
    nearest = min(candidates, key=lambda c: c.verdict.ppl_increase_high)
    tokens = nearest.verdict.tokens
    message = (
        f"no recipe is within a perplexity increase of {limit}; {nearest.recipe.name} comes nearest: "
        f"{spread(nearest.verdict)} over {tokens:,} tokens, {nearest.verdict.status}"
    )
    if nearest.verdict.ppl_increase <= budget.max_ppl_increase:  # its interval alone reaches beyond
        return BudgetError(message, hint=f"judge on more text: --tokens {tokens * 4}")
    needed = nearest.verdict.ppl_increase_high * 100
    return BudgetError(message, hint=f"allow more: --max-ppl-increase {max(needed * 1.05, 0.01):.2g}%")
