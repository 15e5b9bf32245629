"""plan.json: the record of a search, of which the report and the table are views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hasten
from hasten.core import Budget, Goal, Recipe, as_json
from hasten.optimize.candidate import Candidate
from hasten.optimize.result import OptimizeResult
from hasten.optimize.sensitivity import Sensitivity, SensitivityMap
from hasten.quality.text import Text


@dataclass(frozen=True)
class Circumstances:
    """What a search was asked and what it judged on."""

    goal: Goal
    budget: Budget
    text: Text
    tokens: int  # judged at most
    runs: int  # timed


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


def map_json(drawn: SensitivityMap, recipe: Recipe) -> list[dict[str, Any]]:
    """The map as plain JSON values, one object a group: KL at 4 bits as measured, at all widths as predicted,
    and the width a recipe gives it."""
    return [
        {
            "group": s.group.name,
            "kl_at_4_bits": s.harm,
            "kl": {str(c.layout): c.harm for c in s.menu if c.layout is not None},
            "kl_measured": {str(c.layout): c.harm for c in drawn.checks if c.group == s.group.name},
            "layout": layout_name(recipe, s),
        }
        for s in drawn.groups
    ]


def record(result: OptimizeResult, drawn: SensitivityMap, asked: Circumstances) -> dict[str, Any]:
    """Everything worth keeping of a search, as plain JSON values."""
    return {
        **as_json(result.plan),
        "goal": asked.goal,
        "budget": as_json(asked.budget),
        "machine": as_json(result.machine),
        "versions": {"hasten": hasten.__version__, "python": result.machine.python},
        "text": {"name": asked.text.name, "sha256": asked.text.sha256, "tokens": asked.tokens},
        "runs": asked.runs,
        "sensitivity": map_json(drawn, result.chosen.recipe),
        "sensitivity_method": drawn.method,
        "sensitivity_error": drawn.error,
        "search": result.to_json(),
    }
