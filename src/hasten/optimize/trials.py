"""How one recipe is tried: packed and run in a workshop, and judged; every finding is kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import hasten
from hasten.cache import cache_dir, read_record, write_record
from hasten.compress.result import Observer, Progress
from hasten.core import Budget, Recipe, Verdict, as_json
from hasten.errors import DiskError
from hasten.machine.memory import available_bytes
from hasten.optimize.choice import Candidate
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.answers import Continuing, InProcess, at_least, reached, short_of
from hasten.quality.divergence import Divergence, Reference, judge
from hasten.weights.packed_store import warn_once


class SearchMemory:
    """Records of one search. `fresh` reads none of the old ones."""

    def __init__(self, key: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._key = {**key, "version": hasten.__version__}
        self._fresh = fresh
        self._written: set[Path] = set()
        self._unkept: dict[Path, Any] = {}  # what the disk did not take

    def read(self, kind: str, **key: Any) -> Any | None:
        """What was kept, or None."""
        path, whole = self._place(kind, key)
        if self._fresh and path not in self._written:
            return None
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

    def _place(self, kind: str, key: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        whole = {**self._key, "kind": kind, **as_json(key)}
        name = hashlib.sha256(json.dumps(as_json(whole), sort_keys=True).encode()).hexdigest()[:32]
        return cache_dir() / "optimize" / f"{name}.json", whole


class Clock:
    """The time a search may take. None: as long as it wants."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._began = time.monotonic()
        self.limit_s = limit_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        return float("inf") if self.limit_s is None else self.limit_s - self.spent_s

    def is_over(self) -> bool:
        return self.left_s <= 0


_ROOM = 0.5
"""Of the memory that is free: what built models may take together while nobody uses them."""


@dataclass
class Shelf:
    """Models that were built and judged and may be timed: packing them again would take seconds each."""

    workshop: Workshop
    tell: Observer
    _held: dict[str, tuple[Recipe, Built]] = field(default_factory=dict)

    def get(self, recipe: Recipe) -> Built:
        """A model of this recipe, from the shelf or built now. `put` or close it."""
        held = self._held.pop(recipe.name, None)
        if held is not None:
            if held[0] == recipe:
                return held[1]
            held[1].close()
        self.tell(Progress("recipes", f"{recipe.name}: packing"))
        return self.workshop.build(recipe)

    def put(self, recipe: Recipe, model: Built) -> None:
        """Keep a model where memory has room for it, else close it."""
        free = available_bytes()
        if self.workshop.options.device != "cpu" or (free is not None and model.stored_bytes > _ROOM * free):
            model.close()
            return
        self.drop(recipe.name)
        self._held[recipe.name] = recipe, model

    def drop(self, name: str) -> None:
        """Close a model that is not wanted any more."""
        held = self._held.pop(name, None)
        if held is not None:
            held[1].close()

    def clear(self, but: tuple[str, ...] = ()) -> None:
        """Close all models but some."""
        for name in [name for name in self._held if name not in but]:
            self.drop(name)


@dataclass(frozen=True)
class Trials:
    """What every recipe of a search is judged with."""

    workshop: Workshop
    reference: Callable[[], Reference]  # made at first use: a search that only resumes needs none
    memory: SearchMemory
    budget: Budget
    tokens: int
    observer: Observer
    shelf: Shelf
    calibrated: str | None = None  # what calibrated integers depend on

    def judge(self, recipe: Recipe) -> Candidate:
        """Judged on the text; what was judged before is not done again. Models that pass are shelved."""
        key = {**self._identity(recipe), "budget": self.budget, "tokens": self.tokens}
        kept = self.memory.read("quality", **key)
        if kept is not None:
            candidate = Candidate(recipe, **{**kept, "verdict": Verdict(**kept["verdict"])})
        else:
            candidate = self._judged_now(recipe, key)
        self.observer(Progress("recipes", recipe.name, candidate=candidate))
        return candidate

    def _judged_now(self, recipe: Recipe, key: Mapping[str, Any]) -> Candidate:
        built = self.shelf.get(recipe)
        try:
            found: dict[str, Any] = {
                "bits_per_weight": built.bits_per_weight,
                "weight_bytes": built.weight_bytes,
                "stored_bytes": built.stored_bytes,
                "verdict": self._by_tasks(recipe, built, self._judge(recipe, built)),
            }
        except BaseException:
            built.close()
            raise
        if found["verdict"].status == "pass":
            self.shelf.put(recipe, built)
        else:
            built.close()
        self.memory.write("quality", found, **key)
        return Candidate(recipe, **found)

    def _by_tasks(self, recipe: Recipe, model: Built, verdict: Verdict) -> Verdict:
        """What passed by text, held against the tasks that are asked for too."""
        if verdict.status != "pass" or not self.budget.min_tasks:
            return verdict
        wanted = dict(self.budget.min_tasks)

        def tell(task: str, done: int, total: int) -> None:
            self.observer(Progress("recipes", f"{recipe.name}: {task}", done, total))

        status, found = reached(InProcess(cast(Continuing, model)), wanted, step=tell)
        shares = {one.task: one.share for one in found}
        short = next((one for one in found if at_least(one, wanted[one.task]) != "pass"), None)
        missed = "" if short is None else short_of(short, wanted[short.task])
        return replace(verdict, status=status, task_shares=shares, missed=missed)

    def _identity(self, recipe: Recipe) -> dict[str, Any]:
        return {"recipe": recipe, "calibrated": None if recipe.is_plain else self.calibrated}

    def _judge(self, recipe: Recipe, model: Built) -> Verdict:
        """Window by window; a clear failure ends after 2, 4, 8 ... windows, nothing passes early.

        Half-way, what would not pass if the rest were like it is given up; at a quarter, what would not even
        if the rest were better by a standard deviation.
        """
        reference = self.reference()
        count = len(reference.windows)
        parts: list[Divergence] = []
        for index in range(count):
            self.observer(Progress("recipes", f"{recipe.name}: quality", index, count))
            parts.append(reference.compare(model, index))
            seen = index + 1
            if seen < count and seen & (seen - 1) == 0:
                verdict = judge(Divergence.join(parts), self.budget)
                if verdict.status == "fail" or self._is_hopeless(verdict, seen / count):
                    return verdict
        return judge(Divergence.join(parts), self.budget)

    def _is_hopeless(self, verdict: Verdict, share: float) -> bool:
        """Whether a judgement on so much of the text will hardly end within the budget."""
        rise = verdict.ppl_increase
        half = verdict.ppl_increase_high - rise
        end = rise + half * math.sqrt(share)  # where the whole text's interval would reach
        if share < 0.5:
            end -= half / 2 * math.sqrt(1 - share)
        return share >= 0.25 and end > self.budget.max_ppl_increase
