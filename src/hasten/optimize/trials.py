"""How one recipe is tried: packed, judged, timed if it passes; every finding is kept on disk."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hasten
from hasten.cache import cache_dir, read_record, write_record
from hasten.compress.result import Observer, Progress
from hasten.core import Budget, Measurement, Recipe, Verdict, Workload, as_json
from hasten.errors import DiskError
from hasten.optimize.candidates import Candidate, measurement_from, verdict_from
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.divergence import Divergence, Reference
from hasten.quality.judge import judge
from hasten.weights.packed_store import warn_once


class SearchMemory:
    """Records of one search. `fresh` reads none of the old ones."""

    def __init__(self, key: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._key = {**key, "version": hasten.__version__}
        self._fresh = fresh
        self._written: set[Path] = set()
        self._speeds: list[Path] = []
        self._unkept: dict[Path, Any] = {}  # what the disk did not take

    def read(self, kind: str, **key: Any) -> Any | None:
        """What was kept, or None."""
        path, whole = self._place(kind, key)
        if self._fresh and path not in self._written:
            return None
        if kind == "speed":
            self._speeds.append(path)
        return self._unkept[path] if path in self._unkept else read_record(path, whole)

    def write(self, kind: str, value: Any, **key: Any) -> None:
        """Keeps a finding: for later searches too, where the cache can be written."""
        path, whole = self._place(kind, key)
        try:
            write_record(path, whole, value)
            self._unkept.pop(path, None)
        except (DiskError, OSError) as error:
            warn_once("search", f"what the search finds is not kept: {error}")
            self._unkept[path] = as_json(value)
        self._written.add(path)
        if kind == "speed":
            self._speeds.append(path)

    def finish(self) -> None:
        """The search is done: its speeds are of the past."""
        for path in self._speeds:
            with suppress(OSError):
                path.unlink()

    def _place(self, kind: str, key: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        whole = {**self._key, "kind": kind, **as_json(key)}
        name = hashlib.sha256(json.dumps(as_json(whole), sort_keys=True).encode()).hexdigest()[:32]
        return cache_dir() / "optimize" / f"{name}.json", whole


_USUAL_READ = 0.6
"""Below this share of the usual read rate a timing is doubted: unpacking makes recipes differ by less."""


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
        kept = self.memory.read("speed", **self._speed_key(recipe))
        return self._timed(recipe, model()) if kept is None else measurement_from(kept)

    def again(self, candidate: Candidate) -> Candidate:
        """Timed once more; the faster of both stays, because other work can only slow a timing down."""
        before = candidate.measurement
        assert before is not None
        with _Lazily(self.workshop, candidate.recipe, self.observer) as model:
            found = self._timed(candidate.recipe, model.get())
        if found.decode_tok_per_s.median <= before.decode_tok_per_s.median:
            self.memory.write("speed", before, **self._speed_key(candidate.recipe))
            return candidate
        again = replace(
            candidate, measurement=replace(found, disturbed_rounds=found.disturbed_rounds + self.runs)
        )
        self.observer(Progress("recipes", f"{candidate.recipe.name}: was disturbed", candidate=again))
        return again

    def _timed(self, recipe: Recipe, built: Built) -> Measurement:
        self.observer(Progress("recipes", f"{recipe.name}: speed"))
        found = self.workshop.measure(built, self.workload, self.runs)
        self.memory.write("speed", found, **self._speed_key(recipe))
        return found

    def _speed_key(self, recipe: Recipe) -> dict[str, Any]:
        return {**self._identity(recipe), "workload": self.workload, "runs": self.runs}

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


def slow_readers(candidates: Sequence[Candidate]) -> list[int]:
    """Places of the candidates that read their weights far more slowly than the others: disturbed, perhaps.

    Decode reads all weights once a step, so bytes times steps is a rate that all recipes of one model share
    within some tenths. Needs three timed candidates to know what is usual.
    """
    rates = {
        place: c.weight_bytes * c.measurement.decode_tok_per_s.median
        for place, c in enumerate(candidates)
        if c.measurement is not None
    }
    if len(rates) < 3:
        return []
    usual = statistics.median(rates.values())
    return [place for place, rate in rates.items() if rate < _USUAL_READ * usual]


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
