"""One recipe that was tried, and everything known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.core import Goal, Measurement, Recipe, Stat, Verdict, Workload


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
