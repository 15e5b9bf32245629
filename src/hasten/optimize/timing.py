"""The candidates that passed, timed side by side, and what each of them takes of memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from hasten.bench.figures import Ratio, Sample, steady
from hasten.bench.measure import rates_of
from hasten.compress.result import Observer, Progress
from hasten.core import Measurement, Recipe, Workload
from hasten.machine.energy import EnergyMeter
from hasten.machine.memory import available_bytes
from hasten.optimize.aims import Aims
from hasten.optimize.choice import Candidate
from hasten.optimize.race import Cost, Lap, Racer, Standing, apart, race
from hasten.optimize.trials import Clock, Shelf
from hasten.optimize.workshop import Built, Timed, Workshop
from hasten.speed.forecast import Case, memory_of

_ROOM = 0.7
"""Of the memory that is free: what all models of a race may take; else one after another is timed."""
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
        return free is None or sum(c.size for c in finalists) <= _ROOM * free

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
    return lambda lap: lap.sample.ttft_s + lap.sample.decode_s


def _tokens(sample: Sample) -> int:
    """Tokens that were generated."""
    return sum(map(len, sample.ids))
