"""How good a prediction was, and what the next one should assume."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import Estimate, Machine, Measurement, ModelConfig, Recipe
from hasten.speed.estimate import Efficiency, estimate


@dataclass(frozen=True)
class EstimateError:
    """Predicted over measured, less one: +0.10 promised 10 % too much. None where nothing was measured."""

    decode: float | None
    prefill: float | None
    ttft: float | None


def error(predicted: Estimate, measured: Measurement) -> EstimateError:
    """Compare a prediction with the medians of a measurement of the same workload."""
    return EstimateError(
        decode=_relative(predicted.decode_tok_per_s, measured.decode_tok_per_s.median),
        prefill=_relative(predicted.prefill_tok_per_s, measured.prefill_tok_per_s.median),
        ttft=_relative(predicted.ttft_ms, measured.ttft_ms.median),
    )


def efficiency(
    config: ModelConfig, machine: Machine, recipe: Recipe, measured: Measurement, isa: str | None = None
) -> Efficiency:
    """The fractions of the ceilings that one measurement reached, to predict others with.

    Decode gives `read` where it is bound by memory, prefill gives `linear`; attention keeps its ratio to
    `linear`. A decode bound by arithmetic says nothing about reading and leaves `read` at its default.

    Raises:
        MachineError: the machine's ceilings were not measured.
        UsageError: the recipe's bytes are not known and the measurement does not carry them.
    """
    start = Efficiency(read=1.0, linear=1.0, attention=Efficiency.attention / Efficiency.linear)
    full = estimate(
        config,
        machine,
        measured.workload,
        recipe,
        weight_bytes=measured.weight_bytes,
        efficiency=start,
        isa=isa,
    )
    linear = measured.prefill_tok_per_s.median / full.prefill_tok_per_s
    read = measured.decode_tok_per_s.median / full.decode_tok_per_s
    return Efficiency(
        read=read if full.bound == "memory" else Efficiency.read,
        linear=linear,
        attention=linear * start.attention,
    )


def _relative(predicted: float, measured: float) -> float | None:
    return predicted / measured - 1 if measured > 0 else None
