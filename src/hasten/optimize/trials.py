"""How recipes are tried: each packed in a workshop and judged, those that may win timed in turn; all findings
are kept."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import hasten
from hasten.bench.figures import Ratio, Sample, steady
from hasten.bench.measure import EnergyMeter, rates_of
from hasten.cache import cache_dir, read_record, write_record
from hasten.compress.result import Observer, Progress
from hasten.core import Budget, Measurement, Recipe, Verdict, Workload, as_json
from hasten.errors import DiskError
from hasten.machine.memory import available_bytes
from hasten.optimize.choice import Aims, Candidate
from hasten.optimize.race import Cost, Lap, Racer, Standing, apart, race
from hasten.optimize.workshop import Built, Timed, Workshop
from hasten.quality.answers import Continuing, InProcess, at_least, reached, short_of
from hasten.quality.divergence import Divergence, Reference, judge
from hasten.speed.forecast import Case, memory_of
from hasten.weights.packed_store import warn_once

_RACE_ROOM = 0.7
"""A share of the free memory: the models of a race may take so much together; larger ones are timed one after
another."""
_SHELF_ROOM = 0.5
"""A share of the free memory: a model that nobody uses is kept if it takes no more."""
_WARM_UP = 8  # tokens
START = "bf16"


@dataclass(frozen=True)
class Timing:
    """Everything that models are timed with."""

    workshop: Workshop
    aims: Aims
    runs: int
    shelf: Shelf
    tell: Observer
    clock: Clock

    def check(self) -> None:
        """Before any work.

        Raises:
            MachineError: energy is asked for, and cannot be read here.
        """
        _ = self._meter

    @cached_property
    def _meter(self) -> EnergyMeter | None:
        """Energy is read where it is asked for."""
        if self.aims.goal != "energy":
            return None
        return EnergyMeter(gpus=self.workshop.options.device == "cuda")

    def memory_bytes(self, candidate: Candidate) -> int | None:
        """What the process takes at its peak on the workload, predicted; None on a GPU."""
        if self.workshop.options.device != "cpu":
            return None
        case = Case(self.aims.workload)
        return memory_of(self.workshop.config, candidate.recipe, case, stored=candidate.size).total

    def race(
        self, start: Built | None, finalists: Sequence[Candidate], predicted: Mapping[str, float]
    ) -> tuple[Measurement | None, dict[str, Candidate]]:
        """The start's speed, and the finalists with theirs.

        Args:
            start: the source in bf16, which is timed and not raced; None: it was timed before.
            finalists: may be none.
            predicted: cost of each by its shapes, in one unit.
        """
        if self._fits(finalists):
            return self._together(start, finalists, predicted)
        return self._one_by_one(start, finalists)

    def _fits(self, finalists: Sequence[Candidate]) -> bool:
        """Whether all finalists can be in memory at once, beside the source."""
        if self.workshop.options.device != "cpu":
            return False  # memory for keys and values is taken at the start there
        free = available_bytes()
        return free is None or sum(c.size for c in finalists) <= _RACE_ROOM * free

    def _together(
        self, start: Built | None, finalists: Sequence[Candidate], predicted: Mapping[str, float]
    ) -> tuple[Measurement | None, dict[str, Candidate]]:
        with self._built(finalists) as models:
            entered = {START: start, **models} if start is not None else dict(models)
            racers = [self._racer(name, model, name == START) for name, model in entered.items()]
            standings = race(
                racers,
                _cost_of(self.aims),
                predicted=predicted,
                least=self.runs,
                say=self._say,
                is_over=self.clock.is_over,
            )
            found = {name: self._measured(entered[name], one) for name, one in standings.items()}
            alone = {name: self._alone(model) for name, model in models.items()}
        timed = _timed(finalists, found, {name: one.ratio for name, one in standings.items()}, alone)
        return found.get(START), {
            name: replace(c, believed=standings[name].believed) for name, c in timed.items()
        }

    def _one_by_one(
        self, start: Built | None, finalists: Sequence[Candidate]
    ) -> tuple[Measurement | None, dict[str, Candidate]]:
        """Each with its rounds behind one another, where memory holds no two of them."""
        cost = _cost_of(self.aims)
        standings: dict[str, Standing] = {}
        found: dict[str, Measurement] = {}
        alone: dict[str, Measurement | None] = {}
        if start is not None:
            found[START] = self._measured(start, self._block(START, start))
        for one in finalists:
            with self._built([one]) as models:
                name, model = one.recipe.name, models[one.recipe.name]
                standings[name] = self._block(name, model)
                found[name] = self._measured(model, standings[name])
                alone[name] = self._alone(model)
        costs = {name: [cost(lap) for lap in standing.kept()] for name, standing in standings.items()}
        return found.get(START), _timed(finalists, found, apart(costs) if costs else {}, alone)

    def _block(self, name: str, model: Built) -> Standing:
        racer = self._racer(name, model, False)
        found = steady(racer.run, lambda lap: rates_of(lap.sample), self.runs, self._say)
        return Standing(dict(enumerate(found.rounds)), found.disturbed)

    @contextmanager
    def _built(self, finalists: Sequence[Candidate]) -> Iterator[Mapping[str, Built]]:
        """The finalists' models, warm; back on the shelf afterwards."""
        models: dict[str, tuple[Recipe, Built]] = {}
        self.shelf.clear(tuple(c.recipe.name for c in finalists))
        try:
            for one in finalists:
                models[one.recipe.name] = one.recipe, self.shelf.get(one.recipe)
            yield {name: model for name, (_, model) in models.items()}
        except BaseException:
            for _, model in models.values():
                model.close()
            raise
        for recipe, model in models.values():
            self.shelf.put(recipe, model)

    def _racer(self, name: str, model: Built, is_pacer: bool) -> Racer:
        work = self.aims.workload
        self.tell(Progress("recipes", f"{name}: speed"))
        self.workshop.run(model, replace(work, output=min(_WARM_UP, work.output)), 0)

        def run(number: int) -> Lap:
            self.tell(Progress("recipes", f"{name}: speed", number))
            return self._lap(model, work, number)

        return Racer(name, run, is_pacer)

    def _lap(self, model: Built, work: Workload, number: int) -> Lap:
        if self._meter is None:
            return Lap(self.workshop.run(model, work, number))
        before = self._meter.read()
        sample = self.workshop.run(model, work, number)
        return Lap(sample, self._meter.joules(before, self._meter.read()))

    def _measured(self, model: Built, standing: Standing) -> Measurement:
        laps = standing.kept()
        used = [lap.joules / _tokens(lap.sample) for lap in laps if lap.joules is not None]
        timed = Timed(
            tuple(lap.sample for lap in laps), standing.disturbed, statistics.median(used) if used else None
        )
        return self.workshop.measurement(model, self.aims.workload, timed)

    def _alone(self, model: Built) -> Measurement | None:
        """One request with nobody beside it, where times are asked for and the workload is many at once."""
        aims, work = self.aims, self.aims.timed_alone
        if work == aims.workload or (aims.ttft_ms is None and aims.tpot_ms is None):
            return None
        found = steady(lambda number: self.workshop.run(model, work, number), rates_of, self.runs, self._say)
        return self.workshop.measurement(model, work, Timed(found.rounds, found.disturbed))

    def _say(self, text: str) -> None:
        self.tell(Progress("race", text))


def _timed(
    finalists: Sequence[Candidate],
    found: Mapping[str, Measurement],
    ratios: Mapping[str, Ratio | None],
    alone: Mapping[str, Measurement | None],
) -> dict[str, Candidate]:
    names = [c.recipe.name for c in finalists]
    return {
        name: replace(c, measurement=found[name], ratio=ratios.get(name), alone=alone.get(name))
        for name, c in zip(names, finalists, strict=True)
    }


def _cost_of(aims: Aims) -> Cost:
    """Of one run: seconds of all of it, or joules a token."""
    if aims.goal == "energy":
        return lambda lap: (lap.joules or 0.0) / _tokens(lap.sample)
    return lambda lap: lap.sample.whole_s


def _tokens(sample: Sample) -> int:
    """Tokens that were generated."""
    return sum(map(len, sample.ids))


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
        if self.workshop.options.device != "cpu" or (
            free is not None and model.stored_bytes > _SHELF_ROOM * free
        ):
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
