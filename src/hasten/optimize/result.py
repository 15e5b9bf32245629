"""What a search found: the plan, what was tried and left out, and the record that is kept of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core import SCHEMA_VERSION, Machine, Measurement, Plan, Recipe, as_json
from hasten.optimize.choice import Candidate, Untried
from hasten.optimize.sensitivity import Sensitivity, SensitivityMap


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the source in bf16 on the same engine: 2.0 is half the time."""

    decode: float
    prefill: float
    ttft: float


@dataclass(frozen=True)
class Baseline:
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
    untried: tuple[Untried, ...] = ()

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
            "candidates": [{**as_json(c), "recipe": c.recipe.name} for c in self.candidates],
            "untried": [{**as_json(u), "recipe": u.recipe.name} for u in self.untried],
            "chosen": self.chosen.recipe.name,
            "artifact": str(self.artifact),
            "speedup": as_json(self.speedup),
        }


def remarks(drawn: SensitivityMap, recipe: Recipe) -> tuple[str, ...]:
    """What the sensitivity map said and what the recipe made of it, one sentence each."""
    sensitivities = drawn.groups
    measured = sorted((s for s in sensitivities if s.harm > 0), key=lambda s: s.harm)
    if not measured:
        return ()
    least, most = measured[0], measured[-1]
    said = (
        f"4 bits hurt {most.group.name} most (KL {most.harm:.2g}) and {least.group.name} least "
        f"(KL {least.harm:.2g}); all groups together {sum(s.harm for s in measured):.2g}, if they add up."
    )
    if drawn.error is not None:
        said += f" Other widths are predicted from that, {drawn.error:.0%} off where they were measured too."
    if not recipe.name.startswith("mix"):
        return (said,)
    counts = Counter(layout_name(recipe, s) for s in sensitivities)
    made = ", ".join(f"{count} at {name}" for name, count in sorted(counts.items(), key=lambda kv: -kv[1]))
    how = {"rtn": "", "best": " Its integers were found by GPTQ, layer after layer."}
    by = how.get(recipe.method, f" Its integers were found by {recipe.method.upper()}.")
    return (said, f"The mixture gives each of {len(sensitivities)} groups a width: {made}.{by}")


def disturbances(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Which timings other work on this machine disturbed, in one sentence; nothing where none was."""
    found = [
        f"{c.recipe.name} ({c.measurement.disturbed_rounds})"
        for c in candidates
        if c.measurement is not None and c.measurement.disturbed_rounds
    ]
    if not found:
        return ()
    return (f"Other work on this machine disturbed rounds, which were taken again: {', '.join(found)}.",)


def layout_name(recipe: Recipe, sensitivity: Sensitivity) -> str:
    """`w5`, or `source` where the values are kept."""
    layout = recipe.layout_for(sensitivity.group.tensors[0])
    return "source" if layout is None else str(layout)


def map_record(drawn: SensitivityMap, recipe: Recipe) -> dict[str, Any]:
    """The map as plain JSON values: the method of its integers, the error of its predictions, and one object
    a group with the KL at 4 bits as measured, at all widths as predicted, and the width a recipe gives it."""
    groups = [
        {
            "group": s.group.name,
            "kl_at_4_bits": s.harm,
            "kl": {str(c.layout): c.harm for c in s.menu if c.layout is not None},
            "kl_measured": {str(c.layout): c.harm for c in drawn.checks if c.group == s.group.name},
            "layout": layout_name(recipe, s),
        }
        for s in drawn.groups
    ]
    return {"sensitivity": groups, "sensitivity_method": drawn.method, "sensitivity_error": drawn.error}
