"""The choice and its reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import one
from hasten.core import Budget, Goal, Measurement, Recipe, Verdict, Workload
from hasten.errors import BudgetError
from hasten.optimize.trials import (
    Candidate,
    choose_candidate,
    explain,
    limit_of,
    measurement_from,
    percent,
)

BUDGET = Budget(0.01)


def measured(decode: float, prefill: float = 1000.0, workload: Workload | None = None) -> Measurement:
    asked = workload or Workload()
    ttft = 1000 * asked.prompt / prefill
    return Measurement(
        "t", "1", "f", 1, one(prefill), one(decode), one(ttft), one(1000 / decode), None, asked
    )


def candidate(
    name: str,
    decode: float | None,
    status: str = "pass",
    kl: float = 0.005,
    size: int = 100,
    high: float = 0.008,
) -> Candidate:
    verdict = Verdict(status, 8.0, 8.0, high / 2, 0.0, high, kl, kl * 9, 0.95, 8192)  # type: ignore[arg-type]
    return Candidate(
        replace(Recipe.parse("w4"), name=name),
        4.5,
        size,
        verdict,
        None if decode is None else measured(decode),
    )


def test_the_fastest_within_the_budget() -> None:
    some = [candidate("a", 90), candidate("b", 120), candidate("c", None, "fail"), candidate("d", 100)]
    assert choose_candidate(some, "latency", BUDGET).recipe.name == "b"


def test_latency_is_the_whole_request() -> None:
    slow_start = replace(candidate("a", 130), measurement=measured(130, prefill=300))
    assert choose_candidate([slow_start, candidate("b", 120)], "latency", BUDGET).recipe.name == "b"
    assert choose_candidate([slow_start, candidate("b", 120)], "throughput", BUDGET).recipe.name == "a"


def test_a_tie_goes_to_the_better_quality() -> None:
    some = [candidate("a", 101, kl=0.006), candidate("b", 100, kl=0.001), candidate("c", 90, kl=0.0001)]
    assert choose_candidate(some, "latency", BUDGET).recipe.name == "b"


def test_memory_asks_what_is_stored_and_not_what_a_token_reads() -> None:
    small_table = replace(candidate("a", None, size=90), stored_bytes=100)
    large_table = replace(candidate("b", None, size=80), stored_bytes=120)
    some = [small_table, large_table]
    assert choose_candidate(some, "memory", BUDGET).recipe.name == "a"
    _, other = explain(some, small_table, "memory", BUDGET, measured(10))
    assert "needs 20% more memory than a" in other.because


@pytest.mark.parametrize("goal", ["latency", "throughput", "memory"])
def test_what_fails_or_is_undecided_is_never_chosen(goal: Goal) -> None:
    some = [
        candidate("a", 500, "fail", size=1),
        candidate("b", 400, "insufficient", size=2),
        candidate("c", 10, size=99),
    ]
    assert choose_candidate(some, goal, BUDGET).recipe.name == "c"


def test_memory_takes_the_smallest() -> None:
    some = [candidate("a", 100, size=90, kl=0.009), candidate("b", 200, size=91, kl=0.001)]
    assert choose_candidate(some, "memory", BUDGET).recipe.name == "a"


def test_nothing_within_the_budget_names_the_nearest() -> None:
    some = [candidate("far", None, "fail", high=0.09), candidate("near", None, "fail", high=0.03)]
    with pytest.raises(BudgetError, match="near comes nearest") as caught:
        choose_candidate(some, "latency", BUDGET)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "allow more: --max-ppl-increase 3.2%"


def test_nothing_decided_asks_for_more_text() -> None:
    with pytest.raises(BudgetError) as caught:
        choose_candidate([candidate("a", None, "insufficient", high=0.014)], "latency", BUDGET)
    assert caught.value.hint == "judge on more text: --tokens 32768"


def test_nothing_at_all() -> None:
    with pytest.raises(BudgetError):
        choose_candidate([], "latency", BUDGET)


def test_every_candidate_gets_a_reason() -> None:
    some = [
        candidate("fast", 101, kl=0.006),
        candidate("near", 100, kl=0.001),
        candidate("slow", 50),
        candidate("bad", None, "fail", high=0.09),
        candidate("unclear", None, "insufficient", high=0.012),
    ]
    told = explain(some, choose_candidate(some, "latency", BUDGET), "latency", BUDGET, measured(15))
    reasons = {c.recipe.name: c.because for c in told}
    assert [c.recipe.name for c in told] == [c.recipe.name for c in some]
    assert reasons["near"].startswith("chosen: fastest within +1 %")
    assert "As fast as fast within 2 %" in reasons["near"]
    assert "further from the source" in reasons["fast"]
    assert "slower than near" in reasons["slow"]
    assert reasons["bad"].startswith("out:")
    assert "undecided after 8,192 tokens" in reasons["unclear"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0082, "+0.82 %"), (-0.001, "-0.10 %"), (0.0, "+0.00 %"), (1.5, "+150 %")]
)
def test_percent(value: float, shown: str) -> None:
    assert percent(value) == shown


def test_limits_are_shown_as_written() -> None:
    assert [limit_of(Budget(x)) for x in (0.01, 0.005, 0.0, 0.125)] == ["+1 %", "+0.5 %", "+0 %", "+12.5 %"]


def test_records_come_back_as_they_were() -> None:
    from hasten.core import as_json

    one_of_each = candidate("a", 90)
    assert measurement_from(as_json(one_of_each.measurement)) == one_of_each.measurement
    assert Verdict(**as_json(one_of_each.verdict)) == one_of_each.verdict
