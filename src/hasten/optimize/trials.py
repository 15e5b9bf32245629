"""Tries one recipe: packs it, judges it, and times it if it is within the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hasten.core import Budget, Measurement, Recipe, Verdict, Workload
from hasten.optimize.candidate import Candidate, measurement_from, verdict_from
from hasten.optimize.memory import SearchMemory
from hasten.optimize.progress import Observer, Progress
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.divergence import Divergence, Reference
from hasten.quality.judge import judge


@dataclass(frozen=True)
class Trials:
    """What every recipe of a search is tried with."""

    workshop: Workshop
    reference: Callable[[], Reference]  # made at first use: a search that only resumes needs none
    memory: SearchMemory
    budget: Budget
    workload: Workload
    runs: int
    tokens: int
    observer: Observer
    calibrated: str | None = None  # what calibrated integers depend on

    def attempt(self, recipe: Recipe) -> Candidate:
        """Judged, and timed if it passes. What is in memory already is not done again."""
        with _Lazily(self.workshop, recipe, self.observer) as model:
            candidate = self._judged(recipe, model)
            if candidate.passes:
                candidate = replace(candidate, measurement=self.measured(recipe, model.get))
        self.observer(Progress("recipes", recipe.name, candidate=candidate))
        return candidate

    def judge(self, recipe: Recipe) -> Candidate:
        """Judged, not timed."""
        with _Lazily(self.workshop, recipe, self.observer) as model:
            candidate = self._judged(recipe, model)
        self.observer(Progress("recipes", recipe.name, candidate=candidate))
        return candidate

    def measured(self, recipe: Recipe, model: Callable[[], Built]) -> Measurement:
        """Speed of a recipe on the workload."""
        key = {**self._identity(recipe), "workload": self.workload, "runs": self.runs}
        kept = self.memory.read("speed", **key)
        if kept is not None:
            return measurement_from(kept)
        built = model()
        self.observer(Progress("recipes", f"{recipe.name}: speed"))
        found = self.workshop.measure(built, self.workload, self.runs)
        self.memory.write("speed", found, **key)
        return found

    def _identity(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": recipe, "calibrated": None if recipe.is_plain else self.calibrated}

    def _judged(self, recipe: Recipe, model: _Lazily) -> Candidate:
        key = {**self._identity(recipe), "budget": self.budget, "tokens": self.tokens}
        kept = self.memory.read("quality", **key)
        if kept is not None:
            return Candidate(
                recipe, kept["bits_per_weight"], kept["weight_bytes"], verdict_from(kept["verdict"])
            )
        built = model.get()
        verdict = self._judge(recipe, built)
        found = Candidate(recipe, built.bits_per_weight, built.weight_bytes, verdict)
        value = {
            "bits_per_weight": found.bits_per_weight,
            "weight_bytes": found.weight_bytes,
            "verdict": verdict,
        }
        self.memory.write("quality", value, **key)
        return found

    def _judge(self, recipe: Recipe, model: Built) -> Verdict:
        """Window by window; a clear failure ends after 2, 4, 8 ... windows, nothing passes early."""
        reference = self.reference()
        count = len(reference.windows)
        parts: list[Divergence] = []
        for index in range(count):
            self.observer(Progress("recipes", f"{recipe.name}: quality", index, count))
            parts.append(reference.compare(model, index))
            seen = index + 1
            if seen < count and seen & (seen - 1) == 0:
                verdict = judge(Divergence.join(parts), self.budget)
                if verdict.status == "fail":
                    return verdict
        return judge(Divergence.join(parts), self.budget)


class _Lazily:
    """A model that is built when it is first needed and closed at the end."""

    def __init__(self, workshop: Workshop, recipe: Recipe, tell: Observer) -> None:
        self._workshop, self._recipe, self._tell = workshop, recipe, tell
        self._model: Built | None = None

    def get(self) -> Built:
        if self._model is None:
            self._tell(Progress("recipes", f"{self._recipe.name}: packing"))
            self._model = self._workshop.build(self._recipe)
        return self._model

    def __enter__(self) -> _Lazily:
        return self

    def __exit__(self, *_: object) -> None:
        if self._model is not None:
            self._model.close()
