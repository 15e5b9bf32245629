"""plan.json: the record of a search, of which the report and the table are views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hasten
from hasten.core import Budget, Goal, Recipe, as_json
from hasten.optimize.result import OptimizeResult
from hasten.optimize.sensitivity import Sensitivity
from hasten.quality.text import Text


@dataclass(frozen=True)
class Circumstances:
    """What a search was asked and what it judged on."""

    goal: Goal
    budget: Budget
    text: Text
    tokens: int  # judged at most
    runs: int  # timed


def remarks(sensitivities: Sequence[Sensitivity], recipe: Recipe) -> tuple[str, ...]:
    """What the sensitivity map said and what the recipe made of it, one sentence each."""
    measured = sorted((s for s in sensitivities if s.harm > 0), key=lambda s: s.harm)
    if not measured:
        return ()
    least, most = measured[0], measured[-1]
    said = (
        f"4 bits hurt {most.group.name} most (KL {most.harm:.2g}) and {least.group.name} least "
        f"(KL {least.harm:.2g}); all groups together {sum(s.harm for s in measured):.2g}, if they add up."
    )
    if not recipe.name.startswith("mix"):
        return (said,)
    counts = Counter(layout_name(recipe, s) for s in sensitivities)
    made = ", ".join(f"{count} at {name}" for name, count in sorted(counts.items(), key=lambda kv: -kv[1]))
    return (said, f"The mixture gives each of {len(sensitivities)} groups a width: {made}.")


def layout_name(recipe: Recipe, sensitivity: Sensitivity) -> str:
    """`w5`, or `source` where the values are kept."""
    layout = recipe.layout_for(sensitivity.group.tensors[0])
    return "source" if layout is None else str(layout)


def record(
    result: OptimizeResult, sensitivities: Sequence[Sensitivity], asked: Circumstances
) -> dict[str, Any]:
    """Everything worth keeping of a search, as plain JSON values."""
    return {
        **as_json(result.plan),
        "goal": asked.goal,
        "budget": as_json(asked.budget),
        "machine": as_json(result.machine),
        "versions": {"hasten": hasten.__version__, "python": result.machine.python},
        "text": {"name": asked.text.name, "sha256": asked.text.sha256, "tokens": asked.tokens},
        "runs": asked.runs,
        "sensitivity": [
            {
                "group": s.group.name,
                "kl_at_4_bits": s.harm,
                "layout": layout_name(result.chosen.recipe, s),
            }
            for s in sensitivities
        ],
        "search": result.to_json(),
    }
