"""The recipe `mix:P%`: the cheapest mixture within a perplexity increase, searched once and kept."""

from __future__ import annotations

from pathlib import Path

from hasten.core import Budget, EngineOptions, Recipe, as_json
from hasten.errors import BudgetError
from hasten.optimize.calibrated import torch_is_here
from hasten.optimize.candidate import Candidate
from hasten.optimize.choose import limit_of, spread
from hasten.optimize.made import Asked, Made, artifact_of, kept_artifact
from hasten.optimize.mixture import mixture_name
from hasten.optimize.progress import Observer
from hasten.optimize.record import map_json, remarks
from hasten.quality.text import Text, default_text
from hasten.recipe import Method

_TOKENS = 8192  # judged: what `hasten eval` reads unless told otherwise
_SECONDS = 120.0  # for the map's comparisons


def mixture_of(
    ref: str | Path,
    budget: Budget,
    observer: Observer,
    *,
    keep: bool = True,
    threads: int | None = None,
) -> Path:
    """The folder of a mixture's artifact.

    Its integers are found by GPTQ; where torch is not installed, and no such mixture was kept before, they
    are rounded to nearest, and plan.json says so.

    Raises:
        BudgetError: no mixture is within the budget.
        ModelError, DiskError, UsageError: as `hasten.optimize`.
    """
    text = default_text()
    asked = _asked(budget, text, "gptq")
    if not torch_is_here():
        found = kept_artifact(ref, asked) if keep else None
        if found is not None:
            return found
        asked = _asked(budget, text, "rtn")
    return artifact_of(ref, asked, lambda: _made(ref, budget, text, observer, threads), keep=keep)


def _asked(budget: Budget, text: Text, method: Method) -> Asked:
    return Asked(
        Recipe(mixture_name(budget), method=method),
        text,
        {"mix": budget.max_ppl_increase, "judged": _TOKENS},
    )


def _made(ref: str | Path, budget: Budget, text: Text, observer: Observer, threads: int | None) -> Made:
    from hasten.optimize.engine_workshop import EngineWorkshop
    from hasten.optimize.search import Effort, Search

    workshop = EngineWorkshop(ref, EngineOptions(threads=threads))
    effort = Effort(tokens=_TOKENS, sensitivity_seconds=_SECONDS)
    search = Search(workshop, budget, "latency", text, effort, observer=observer)
    try:
        chosen = search.mixture()
    finally:
        search.close()
    if not chosen.passes:
        raise _nothing(chosen, budget)
    drawn = search.mixing.map
    plan = {
        "budget": as_json(budget),
        "verdict": as_json(chosen.verdict),
        "text": {"name": text.name, "sha256": text.sha256, "tokens": _TOKENS},
        "because": [chosen.because, *remarks(drawn, chosen.recipe), *search.uncalibrated()],
        "sensitivity": map_json(drawn, chosen.recipe),
        "sensitivity_method": drawn.method,
        "sensitivity_error": drawn.error,
    }
    return Made(workshop.packed(chosen.recipe), workshop.source, plan)


def _nothing(nearest: Candidate, budget: Budget) -> BudgetError:
    needed = nearest.verdict.ppl_increase_high * 105
    return BudgetError(
        f"no mixture is within a perplexity increase of {limit_of(budget)}; the nearest: "
        f"{spread(nearest.verdict)} over {nearest.verdict.tokens:,} tokens",
        hint=f"allow more: mix:{max(needed, 0.01):.2g}%",
    )
