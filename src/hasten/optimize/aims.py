"""What a search is asked for: quality, speed, memory and load that must be kept; what is made small; on what.

Refused here, before anything is opened: values that nobody can meet or that contradict one another.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, replace
from typing import get_args

from hasten.bench.workload import Traffic
from hasten.core import Budget, Goal, Measurement, Workload
from hasten.errors import UsageError
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
