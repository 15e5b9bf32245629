"""What a search ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core import SCHEMA_VERSION, Machine, Measurement, Plan, as_json
from hasten.optimize.candidate import Candidate

_VERDICT = ("status", "ppl_increase", "kl_mean", "kl_p99", "top1_agreement", "tokens")


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the source in bf16 on the same engine: 2.0 is half the time."""

    decode: float
    prefill: float
    ttft: float


@dataclass(frozen=True)
class Baseline:
    """The source in bf16 on the same engine."""

    measurement: Measurement
    ppl: float
    bits_per_weight: float = 16.0


@dataclass(frozen=True)
class OptimizeResult:
    """Everything that was tried, what was chosen and where it lies."""

    machine: Machine
    baseline: Baseline
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    plan: Plan
    artifact: Path

    @property
    def model(self) -> str:
        """The source's name."""
        return self.plan.model

    @property
    def speedup(self) -> Speedup:
        """The chosen recipe over the baseline, medians."""
        ours, start = self.chosen.measurement, self.baseline.measurement
        assert ours is not None
        return Speedup(
            decode=ours.decode_tok_per_s.median / start.decode_tok_per_s.median,
            prefill=ours.prefill_tok_per_s.median / start.prefill_tok_per_s.median,
            ttft=start.ttft_ms.median / ours.ttft_ms.median,
        )

    def to_json(self) -> dict[str, Any]:
        """The record: plain JSON values, units in the keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": as_json(self.machine),
            "model": self.model,
            "baseline": {"recipe": "bf16", **as_json(self.baseline)},
            "candidates": [_candidate(c) for c in self.candidates],
            "chosen": self.chosen.recipe.name,
            "artifact": str(self.artifact),
            "speedup": as_json(self.speedup),
        }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    verdict = as_json(candidate.verdict)
    first = {key: verdict.pop(key) for key in _VERDICT}
    return {
        "recipe": candidate.recipe.name,
        "bits_per_weight": candidate.bits_per_weight,
        "weight_bytes": candidate.weight_bytes,
        "measurement": as_json(candidate.measurement),
        "verdict": {**first, **verdict},
        "because": candidate.because,
    }
