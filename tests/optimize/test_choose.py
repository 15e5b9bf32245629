"""The choice and its reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes import one
from hasten.bench.figures import Ratio
from hasten.bench.workload import TRAFFICS
from hasten.core import Budget, Goal, Measurement, Recipe, Verdict, Workload
from hasten.errors import BudgetError
from hasten.optimize.choice import (
    Aims,
    Candidate,
    carried,
    choose_candidate,
    explain,
    limit_of,
    misses,
    percent,
    price_of,
)

BUDGET = Budget(0.01)
LATENCY, THROUGHPUT, MEMORY = Aims(BUDGET), Aims(BUDGET, "throughput"), Aims(BUDGET, "memory")


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
    assert choose_candidate(some, LATENCY).recipe.name == "b"


def test_latency_is_the_whole_request() -> None:
    slow_start = replace(candidate("a", 130), measurement=measured(130, prefill=300))
    assert choose_candidate([slow_start, candidate("b", 120)], LATENCY).recipe.name == "b"
    quick_start = replace(candidate("a", 130), measurement=measured(130, prefill=990))
    assert choose_candidate([quick_start, candidate("b", 120)], LATENCY).recipe.name == "a"


def test_a_tie_goes_to_the_better_quality() -> None:
    some = [candidate("a", 101, kl=0.006), candidate("b", 100, kl=0.001), candidate("c", 90, kl=0.0001)]
    assert choose_candidate(some, LATENCY).recipe.name == "b"


def test_memory_asks_what_is_stored_and_not_what_a_token_reads() -> None:
    small_table = replace(candidate("a", None, size=90), stored_bytes=100)
    large_table = replace(candidate("b", None, size=80), stored_bytes=120)
    some = [small_table, large_table]
    assert choose_candidate(some, MEMORY).recipe.name == "a"
    _, other = explain(some, small_table, MEMORY, measured(10))
    assert "needs 20% more memory than a" in other.because


@pytest.mark.parametrize("goal", ["latency", "throughput", "memory"])
def test_what_fails_or_is_undecided_is_never_chosen(goal: Goal) -> None:
    some = [
        candidate("a", 500, "fail", size=1),
        candidate("b", 400, "insufficient", size=2),
        candidate("c", 10, size=99),
    ]
    assert choose_candidate(some, Aims(BUDGET, goal)).recipe.name == "c"


def test_memory_takes_the_smallest() -> None:
    some = [candidate("a", 100, size=90, kl=0.009), candidate("b", 200, size=91, kl=0.001)]
    assert choose_candidate(some, MEMORY).recipe.name == "a"


def test_nothing_within_the_budget_names_the_nearest() -> None:
    some = [candidate("far", None, "fail", high=0.09), candidate("near", None, "fail", high=0.03)]
    with pytest.raises(BudgetError, match="near comes nearest") as caught:
        choose_candidate(some, LATENCY)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "allow more: --max-ppl-increase 3.2%"


def test_nothing_decided_asks_for_more_text() -> None:
    with pytest.raises(BudgetError) as caught:
        choose_candidate([candidate("a", None, "insufficient", high=0.014)], LATENCY)
    assert caught.value.hint == "judge on more text: --tokens 32768"


def test_nothing_at_all() -> None:
    with pytest.raises(BudgetError):
        choose_candidate([], LATENCY)


def test_every_candidate_gets_a_reason() -> None:
    some = [
        candidate("fast", 101, kl=0.006),
        candidate("near", 100, kl=0.001),
        candidate("slow", 50),
        candidate("bad", None, "fail", high=0.09),
        candidate("unclear", None, "insufficient", high=0.012),
    ]
    told = explain(some, choose_candidate(some, LATENCY), LATENCY, measured(15))
    reasons = {c.recipe.name: c.because for c in told}
    assert [c.recipe.name for c in told] == [c.recipe.name for c in some]
    assert reasons["near"].startswith("chosen: fastest within +1 %")
    assert "Within 2 % of fast, and it is closer to the source" in reasons["near"]
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
    assert Verdict(**as_json(one_of_each.verdict)) == one_of_each.verdict


def raced(name: str, decode: float, believed: float, kl: float) -> Candidate:
    """With what a race measured, joined with the prediction."""
    return replace(candidate(name, decode, kl=kl), ratio=Ratio(1.04, 1.01, 1.07, 12), believed=believed)


def test_what_differs_by_less_than_a_tie_goes_to_quality_and_then_to_size() -> None:
    """Either comes out faster from run to run; the choice does not follow that, but what is believed."""
    first = [raced("coarse", 104, 1.0, 0.005), raced("fine", 100, 1.015, 0.001)]
    second = [raced("coarse", 100, 1.01, 0.005), raced("fine", 101, 1.0, 0.001)]
    assert {choose_candidate(some, LATENCY).recipe.name for some in (first, second)} == {"fine"}
    _, fine = explain(first, first[1], LATENCY, measured(15))
    assert "Within 2 % of coarse, and it is closer to the source." in fine.because
    clear = [raced("coarse", 90, 1.0, 0.005), raced("fine", 92, 1.07, 0.001)]
    assert choose_candidate(clear, LATENCY).recipe.name == "coarse"
    _, slower = explain(clear, clear[0], LATENCY, measured(15))
    assert "is 7% slower than coarse: 12 rounds side by side measured +4.0%" in slower.because
    alike = [replace(c, verdict=first[0].verdict) for c in first]
    small = [alike[0], replace(alike[1], stored_bytes=50)]
    assert choose_candidate(small, LATENCY).recipe.name == "fine"


@pytest.mark.parametrize(
    ("aims", "said"),
    [
        (Aims(BUDGET, ttft_ms=400), "first token 512 ms, 400 ms asked"),
        (Aims(BUDGET, tpot_ms=9), "a token 10 ms, 9 ms asked"),
        (Aims(BUDGET, memory_bytes=10**8), "needs 200 MB, 100 MB asked"),
        (Aims(BUDGET, rate=5.0), "carries 0.477 requests/s, 5 asked"),
    ],
)
def test_what_is_asked_is_kept_or_named(aims: Aims, said: str) -> None:
    one = replace(candidate("a", 100), memory_bytes=2 * 10**8)
    assert [miss.said for miss in misses(one, aims)] == [said]
    with pytest.raises(BudgetError) as caught:
        choose_candidate([one, candidate("b", None, "fail", high=0.09)], aims)
    assert f"a: {said}" in caught.value.message and "b: perplexity" in caught.value.message
    assert caught.value.exit_code == 3 and "allow what " in str(caught.value.hint)
    loose = Aims(BUDGET, ttft_ms=513, tpot_ms=10.1, memory_bytes=2 * 10**8, rate=0.4)
    assert choose_candidate([one], loose) is one


def test_times_are_asked_of_a_request_alone() -> None:
    many = replace(candidate("a", 100), alone=measured(400, prefill=4000))
    assert not misses(many, Aims(BUDGET, ttft_ms=200, tpot_ms=3))


def test_what_it_costs_carries_and_who_waits() -> None:
    work = Workload(100, 11, 4)
    one = measured(100, workload=work)
    whole = 0.1 + 40 / 100
    assert carried(one) == pytest.approx(0.85 * 4 / whole)
    assert price_of(one, 3.6) == pytest.approx(0.001 / (44 / whole) * 1e6)
    aims = Aims(BUDGET, price_per_hour=3.6, traffic=TRAFFICS["decide"])
    chosen = candidate("a", 100)
    (told,) = explain([chosen], chosen, aims, measured(15))
    assert "A million tokens cost" in told.because
    assert "too late for its users" in told.because
