"""What may be asked, and what is refused before any work."""

from __future__ import annotations

import pytest

from hasten.bench.workload import TRAFFICS
from hasten.core import Budget
from hasten.errors import UsageError
from hasten.optimize.choice import TOGETHER, WORKLOADS, Aims


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"goal": "latncy"}, "did you mean latency?"),
        ({"goal": "cost"}, "--price-per-hour"),
        ({"budget": Budget(-0.01)}, "--max-ppl-increase"),
        ({"budget": Budget(0.01, -1.0)}, "--max-kl"),
        ({"budget": Budget(0.01, float("nan"))}, "--max-kl"),
        ({"ttft_ms": 0.0}, "--ttft"),
        ({"tpot_ms": float("inf")}, "--tpot"),
        ({"rate": -1.0}, "--rate"),
        ({"memory_bytes": 0}, "--memory"),
        ({"price_per_hour": 0.0}, "--price-per-hour"),
        ({"traffic": TRAFFICS["decide"], "ttft_ms": 400.0}, "--tpot"),
        ({"traffic": TRAFFICS["decide"], "tpot_ms": 30.0}, "--tpot"),
    ],
)
def test_what_nobody_can_meet_is_refused(values: dict[str, object], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Aims(**values)  # type: ignore[arg-type]
    assert hint in str(caught.value.hint)


def test_what_is_timed() -> None:
    assert Aims().workload == WORKLOADS["latency"]
    assert Aims(rate=2.0).workload.batch == TOGETHER
    assert Aims(rate=2.0).timed_alone.batch == 1
    support = TRAFFICS["support"]
    assert Aims(traffic=support).workload == support.typical()
    assert Aims(traffic=support).workload.shared == support.shared
    assert Aims(goal="throughput", traffic=support).workload.batch == TOGETHER
    assert Aims(goal="cost", price_per_hour=1.0).workload.batch == TOGETHER
    assert not Aims().asks_speed and Aims(tpot_ms=5).asks_speed
