"""The closed loop: try recipes, draw a mixture, race what passed, choose, write.

What a search ends with is plan.json, its record, of which the report and the table are views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import hasten
from hasten.bench.calibrate import kept
from hasten.compress.result import Observer, Progress, silent
from hasten.core import Budget, EngineOptions, Estimate, Machine, Measurement, Plan, Recipe, as_json
from hasten.errors import BudgetError, DeviceLost, MachineError, UsageError
from hasten.optimize.calibrated import Made, mixture_name
from hasten.optimize.choice import (
    Aims,
    Candidate,
    Untried,
    choose_candidate,
    explain,
    limit_of,
    misses,
    spread,
)
from hasten.optimize.mixture import Mixing
from hasten.optimize.prospect import (
    Baseline,
    OptimizeResult,
    Prospect,
    Sieve,
    disturbances,
    kv_bytes,
    map_record,
    prospect,
    remarks,
    worth_racing,
)
from hasten.optimize.sensitivity import SensitivityMap, uniform
from hasten.optimize.trials import Clock, SearchMemory, Shelf, Timing, Trials
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.divergence import Reference
from hasten.quality.text import Text, default_text, text_from_file, windows
from hasten.report.optimized import optimized_page
from hasten.speed.cost import on_gpu
from hasten.speed.forecast import estimate
from hasten.speed.pace import Pace

BASELINE = Recipe.parse("bf16")
_MIXTURE_SECONDS = 120.0  # for the comparisons of the map behind `mix:P%`
_CALIBRATION_S = 600.0
"""A time limit below this leaves calibrated methods out: one model takes them minutes on two cores."""
_KV_SHARE = 0.1
"""Of what a step reads: below it, keys and values in 8 bits save less than 5 % and are not tried."""


@dataclass(frozen=True)
class Effort:
    """How much is measured; the defaults fit two minutes for half a billion weights on two cores."""

    tokens: int = 4096  # judged
    runs: int = 3  # timed at least, after a warm-up
    sensitivity_seconds: float = 20.0
    time_limit_s: float | None = None  # of the whole search; None: as long as it takes

    def __post_init__(self) -> None:
        if self.time_limit_s is not None and not 0 < self.time_limit_s < float("inf"):
            raise UsageError(
                f"--time-limit must be above 0 s, got {self.time_limit_s:g}", hint="use --time-limit 2m"
            )


def optimize(
    ref: str | Path,
    max_ppl_increase: float = 0.01,
    goal: str = "latency",
    out: str | Path | None = None,
    *,
    aims: Aims | None = None,
    threads: int | None = None,
    text: str | Path | None = None,
    effort: Effort | None = None,
    fresh: bool = False,
    calibrate: bool = True,
    observer: Observer = silent,
    device: str = "cpu",
    gpu_memory: str | float | None = None,
    broken: Mapping[str, str] | None = None,
) -> OptimizeResult:
    """Finds the fastest recipe whose perplexity rises by at most `max_ppl_increase`, and writes it as an
    artifact.

    Args:
        ref: a GGUF file, a Hugging Face folder, a hub id, or `demo`.
        max_ppl_increase: the budget against the source in bf16: 0.01 is +1 %.
        goal: `latency` (time of one request of 512 in, 128 out), `throughput` (8 sequences at once), `memory`
            (bytes) or `energy` (joules a token).
        out: the artifact's folder; default NAME.hasten here.
        aims: everything that can be asked, instead of the two above: more budgets, a workload, `cost`.
        threads: default, the cores this process may use.
        text: a UTF-8 file to judge on; default, the prose and code of `pydoc_data.topics`.
        effort: how many tokens are judged and runs timed, and how long all may take.
        fresh: ignore what an earlier search found.
        calibrate: try calibrated integers too, where torch is installed: `w4-best`, and a mixture by GPTQ.
            Costs minutes the first time; what was calibrated is kept.
        observer: told of every step.
        device: what recipes are judged and timed on, `cpu`, `cuda` or `auto`; which are tried follows it.
        gpu_memory: as `EngineOptions.gpu_memory`, for each of the two models that are loaded at a time.
        broken: recipes that are not tried because they ended a process before, and how. In this process a
            recipe that crashes takes everything with it; the command line runs the search in one of its own.

    Raises:
        MachineError: `device` is "cuda", and there is no usable GPU; energy is asked for and not readable.
        BudgetError: no recipe is within the budget.
        UsageError: a budget, goal or text that cannot be used.
        ModelError, DiskError: the source cannot be opened, the artifact cannot be written, or one of another
            model stands there.
    """
    from hasten.models.source import file_name_of

    aims = aims or asked(max_ppl_increase, goal)
    observer(Progress("reference", "opening the model"))
    workshop, judged = opened(ref, EngineOptions(threads=threads, device=device, gpu_memory=gpu_memory), text)
    place = Path(out) if out is not None else Path(f"{file_name_of(workshop.name)}.hasten")
    workshop.claim(place)
    source = workshop.settle(BASELINE)
    if workshop.device_because:
        observer(
            Progress("reference", f"--device auto is {workshop.options.device}: {workshop.device_because}")
        )
    search = Search(workshop, aims, judged, effort or Effort(), fresh, observer, calibrate, broken or {})
    search.begin_with(source)
    return search.run(place)


def opened(ref: str | Path, options: EngineOptions, text: str | Path | None) -> tuple[Workshop, Text]:
    """The model, and the text that recipes are judged on.

    Raises:
        UsageError: a text that cannot be read, or a model that is an artifact.
        ModelError: the model cannot be opened.
    """
    judged = text_from_file(text) if text is not None else default_text()
    return Workshop(ref, options), judged


def asked(max_ppl_increase: float, goal: str) -> Aims:
    """The aims of a quality budget and a goal.

    Raises:
        UsageError: a negative or infinite budget, an unknown goal.
    """
    return Aims(Budget(max_ppl_increase), goal)  # type: ignore[arg-type]  # checked there


@dataclass
class Search:
    """One run of the loop over one source."""

    workshop: Workshop
    aims: Aims
    text: Text
    effort: Effort
    fresh: bool = False
    observer: Observer = silent
    calibrate: bool = True
    broken: Mapping[str, str] = field(default_factory=dict)
    _source: Built | None = field(default=None, init=False)
    _left_out: list[str] = field(default_factory=list, init=False)  # what was not done, one sentence each

    def __post_init__(self) -> None:
        self.clock = Clock(self.effort.time_limit_s)

    def run(self, out: Path) -> OptimizeResult:
        try:
            self.timing.check()
            candidates, untried = self._uniform()
            candidates += self._mixture(candidates)
            candidates += self._narrow_cache(candidates)
            start, candidates = self._raced(candidates)
            chosen = choose_candidate(candidates, self.aims)
            candidates = explain(candidates, chosen, self.aims, start)
            baseline = Baseline(start, max(candidates, key=lambda c: c.verdict.tokens).verdict.ppl_source)
            return self._write(out, baseline, candidates, untried, chosen.recipe)
        finally:
            self.close()

    def mixture(self) -> Candidate:
        """The cheapest mixture within the budget, judged and not timed; if none passes, the nearest.

        Where there is nothing to mix, it keeps the source's values.
        """
        name = mixture_name(self.aims.budget)
        kept = self.trials.judge(Recipe(name))
        found = self.mixing.fit([kept])
        if found is None or (kept.passes and not found.passes):
            return replace(kept, because="Nothing narrower than the source's own values was found.")
        return found

    def begin_with(self, source: Built | None) -> None:
        """Take the source in bf16, where it is loaded already."""
        self._source = source

    def close(self) -> None:
        """Give all models back; a second call does nothing."""
        self.shelf.clear()
        if self._source is not None:
            self._source.close()
            self._source = None

    # What a search works with -------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> SearchMemory:
        """What earlier runs found on the same source, text and machine."""
        machine = self.workshop.machine(ceilings=False)  # `mix:P%` times nothing and needs none
        key = {
            "source": self.workshop.identity(),
            "text": self.text.sha256,
            "cpu": machine.cpu,
            "isa": machine.isa,
            "threads": self.workshop.options.threads or machine.cores,
        }
        if self.workshop.options.device != "cpu":
            key |= {"device": self.workshop.options.device, "gpus": machine.gpus}
        return SearchMemory(key, fresh=self.fresh)

    @cached_property
    def shelf(self) -> Shelf:
        return Shelf(self.workshop, self.observer)

    @cached_property
    def trials(self) -> Trials:
        return Trials(
            workshop=self.workshop,
            reference=lambda: self._reference,
            memory=self.memory,
            budget=self.aims.budget,
            tokens=self.effort.tokens,
            observer=self.observer,
            shelf=self.shelf,
            calibrated=self.calibrated,
        )

    @cached_property
    def timing(self) -> Timing:
        return Timing(self.workshop, self.aims, self.effort.runs, self.shelf, self.observer, self.clock)

    @cached_property
    def _reference(self) -> Reference:
        cut = windows(self.text.evaluation, self.workshop.tokenizer(), tokens=self.effort.tokens)
        reference = Reference(self._bf16(), cut)
        for index in range(len(cut)):
            self.observer(Progress("reference", "bf16: quality", index, len(cut)))
            reference.hidden(index)
        return reference

    def _bf16(self) -> Built:
        if self._source is None:
            self.observer(Progress("reference", "bf16: packing"))
            self._source = self.workshop.build(BASELINE)
        return self._source

    @cached_property
    def calibrated(self) -> str | None:
        """What calibrated integers depend on; None where none are tried."""
        return self._calibration[0]

    @cached_property
    def _calibration(self) -> tuple[str | None, str]:
        """What calibrated integers depend on, or why there are none."""
        if not self.calibrate:
            return None, "calibration was switched off"
        limit = self.effort.time_limit_s
        if limit is not None and limit < _CALIBRATION_S:
            return None, f"they take minutes, and the time limit is {limit:.0f} s"
        try:
            return self.workshop.calibrate(self.text, self.observer), ""
        except (MachineError, UsageError) as why:
            return None, why.message

    @cached_property
    def mixing(self) -> Mixing:
        return Mixing(
            workshop=self.workshop,
            source=self._bf16,
            text=self.text,
            memory=self.memory,
            trials=self.trials,
            budget=self.aims.budget,
            seconds=self.effort.sensitivity_seconds,
            observer=self.observer,
            calibrated=self.calibrated,
            is_over=self.clock.is_over,
        )

    @cached_property
    def _pace(self) -> Pace | None:
        """What `hasten estimate` timed on this machine."""
        options = self.workshop.options
        return kept(options.threads) if options.device == "cpu" else None

    # What is tried ------------------------------------------------------------------------------------------

    def prospects(self) -> list[Prospect]:
        """The fixed recipes of the device, as their shapes tell them."""
        shapes = self.workshop.config.linear_shapes()
        widest = max(self.workshop.kept()[name].bits_per_weight for name in shapes)
        recipes = uniform(widest, self.calibrated is not None, self.workshop.options.device)
        return [self.prospect(recipe) for recipe in recipes]

    def prospect(self, recipe: Recipe) -> Prospect:
        return prospect(recipe, self.workshop.config, self.workshop.kept(), self.aims, self._pace)

    def _uniform(self) -> tuple[list[Candidate], list[Untried]]:
        names = tuple(self.workshop.config.linear_shapes())
        sieve = Sieve(
            self.prospects(), names, self.workshop.kept(), self._attempt, self.aims.budget, self.clock.is_over
        )
        return sieve.run()

    def _attempt(self, recipe: Recipe) -> Candidate | None:
        """Judged; None where the device has no room for it beside the source, or it ended a process."""
        if self._is_broken(recipe.name):
            return None
        with self._unless_full(f"{recipe.name} was not tried"):
            return self.trials.judge(recipe)
        return None

    def _is_broken(self, name: str) -> bool:
        if name not in self.broken:
            return False
        self._left_out.append(f"{name} was given up: {self.broken[name]}.")
        return True

    def _mixture(self, judged: Sequence[Candidate]) -> list[Candidate]:
        if self._is_broken(mixture_name(self.aims.budget)):
            return []
        if self.clock.left_s < 2 * self.effort.sensitivity_seconds:
            self._left_out.append("No mixture was tried: the time limit came first.")
            return []
        if self._map is not None:
            with self._unless_full("No mixture was tried"):
                found = self.mixing.fit(judged)
                return [] if found is None else [found]
        return []

    def _narrow_cache(self, judged: Sequence[Candidate]) -> list[Candidate]:
        """The best so far with keys and values in 8 bits, where those are much of what a step reads."""
        passing = [c for c in judged if c.passes and c.recipe.kv == "bf16"]
        if not passing or self.clock.is_over() or self.workshop.options.device != "cpu":
            return []
        best = min(passing, key=lambda c: self.prospect(c.recipe).cost)
        keys = kv_bytes(self.workshop.config, False, self.aims.workload)
        share = keys / (keys + best.weight_bytes)
        if share < _KV_SHARE:
            self._left_out.append(
                f"Keys and values are {share:.1%} of what a step reads here: 8 bits for them were not tried."
            )
            return []
        recipe = replace(best.recipe, name=f"{best.recipe.name}-kv8", kv="int8")
        found = self._attempt(recipe)
        return [] if found is None else [found]

    @cached_property
    def _map(self) -> SensitivityMap | None:
        """The map of harms; None where the device has no room to draw it."""
        with self._unless_full("No mixture was tried"):
            return self.mixing.map
        return None

    @contextmanager
    def _unless_full(self, otherwise: str) -> Iterator[None]:
        """Goes on where the device has no room for what is done inside; the plan then says `otherwise`."""
        try:
            yield
        except DeviceLost:
            raise
        except MachineError as why:
            self._left_out.append(f"{otherwise}: {why.message}.")

    def _raced(self, candidates: list[Candidate]) -> tuple[Measurement, list[Candidate]]:
        """The start's speed, and the candidates, those timed that may be chosen."""
        known = [replace(c, memory_bytes=self.timing.memory_bytes(c)) for c in candidates]
        passing = [c for c in known if not misses(c, self.aims)]
        if not passing:
            choose_candidate(known, self.aims)  # raises BudgetError, which says what each of them misses
        costs = {c.recipe.name: self.prospect(c.recipe).cost for c in passing}
        finalists = list(worth_racing(passing, lambda c: costs[c.recipe.name]))
        if self.aims.goal == "memory" and not self.aims.asks_speed:
            finalists = [min(passing, key=lambda c: c.size)]
        start, timed = self.timing.race(self._bf16(), finalists, costs)
        assert start is not None
        rest = [c for c in passing if c.recipe.name not in timed]
        if rest and all(misses(c, self.aims) for c in timed.values()):  # none is fast enough: look at all
            _, more = self.timing.race(None, rest, costs)
            timed |= {name: replace(c, ratio=None, believed=None) for name, c in more.items()}
        least = min(costs.values())
        return start, [
            timed.get(c.recipe.name) or _untimed(c, costs.get(c.recipe.name, least) / least) for c in known
        ]

    # What is written ----------------------------------------------------------------------------------------

    def _estimate(self, chosen: Candidate) -> Estimate | None:
        """What the speed model says of the chosen recipe, to be held against the measurement."""
        shapes = self.workshop.config.linear_shapes()
        knows = all(layout is not None for layout in map(chosen.recipe.layout_for, shapes))
        try:
            return estimate(
                self.workshop.config,
                self._ceilings(chosen.recipe),
                self.aims.workload,
                chosen.recipe,
                weight_bytes=chosen.weight_bytes,
                pace=self._pace if knows else None,
            )
        except MachineError:
            return None  # ceilings were not measured: unknown

    def _ceilings(self, recipe: Recipe) -> Machine:
        """The machine, with the ceilings of what computes."""
        machine = self.workshop.machine()
        if self.workshop.options.device != "cuda":
            return machine
        return on_gpu(machine, recipe.name.startswith("fp8"))

    def _write(
        self,
        out: Path,
        baseline: Baseline,
        candidates: Sequence[Candidate],
        untried: Sequence[Untried],
        recipe: Recipe,
    ) -> OptimizeResult:
        self.observer(Progress("artifact", f"writing {out}"))
        drawn = self.__dict__.get("_map") or SensitivityMap(())  # a map that was not drawn is not drawn now
        chosen = next(c for c in candidates if c.recipe == recipe)
        plan = Plan(
            model=self.workshop.name,
            recipe=recipe,
            options=self.workshop.options,
            measurement=chosen.measurement,
            verdict=chosen.verdict,
            estimate=self._estimate(chosen),
            because=(
                chosen.because,
                *remarks(drawn, chosen.recipe),
                *disturbances(candidates),
                *self.uncalibrated(),
                *self._left_out,
            ),
        )
        machine, tried = self.workshop.machine(), tuple(candidates)
        result = OptimizeResult(machine, baseline, tried, chosen, plan, out.absolute(), tuple(untried))
        whole = self._record(result, drawn)
        model = self.shelf.get(recipe)
        try:
            self.workshop.save(model, out, whole, optimized_page(whole))
        finally:
            model.close()
        return result

    def _record(self, result: OptimizeResult, drawn: SensitivityMap) -> dict[str, Any]:
        """Everything worth keeping of a search, as plain JSON values."""
        return {
            **as_json(result.plan),
            "goal": self.aims.goal,
            "budget": as_json(self.aims.budget),
            "aims": as_json(self.aims),
            "machine": as_json(result.machine),
            "versions": {"hasten": hasten.__version__, "python": result.machine.python},
            "text": self.judged_on(),
            "runs": self.effort.runs,
            "seconds": self.clock.spent_s,
            **map_record(drawn, result.chosen.recipe),
            "search": result.to_json(),
        }

    def judged_on(self) -> dict[str, Any]:
        """The text, as a record names it, and how many of its tokens are judged at most."""
        return {"name": self.text.name, "sha256": self.text.sha256, "tokens": self.effort.tokens}

    def uncalibrated(self) -> tuple[str, ...]:
        """Why no calibrated integers were tried, where none were."""
        if self.calibrated is not None:
            return ()
        return (f"Integers are rounded to nearest, no calibrated ones were tried: {self._calibration[1]}.",)


def _untimed(candidate: Candidate, ratio: float) -> Candidate:
    """One that passes and was not raced says why."""
    if not candidate.passes or ratio <= 1:
        return candidate
    why = f"Predicted to cost {ratio - 1:.0%} more than the cheapest that passes: not timed."
    return replace(candidate, because=" ".join(filter(None, (why, candidate.because))))


def made_mixture(
    ref: str | Path, budget: Budget, text: Text, tokens: int, observer: Observer, threads: int | None
) -> Made:
    """The recipe `mix:P%` of a model: its cheapest mixture within a budget, judged on `tokens` at most.

    Raises:
        BudgetError: no mixture is within the budget.
        ModelError, UsageError: as `optimize`.
    """
    workshop = Workshop(ref, EngineOptions(threads=threads))
    effort = Effort(tokens=tokens, sensitivity_seconds=_MIXTURE_SECONDS)
    search = Search(workshop, Aims(budget), text, effort, observer=observer)
    try:
        chosen = search.mixture()
    finally:
        search.close()
    if not chosen.passes:
        raise _no_mixture(chosen, budget)
    drawn = search.mixing.map
    plan = {
        "budget": as_json(budget),
        "verdict": as_json(chosen.verdict),
        "text": search.judged_on(),
        "because": [chosen.because, *remarks(drawn, chosen.recipe), *search.uncalibrated()],
        **map_record(drawn, chosen.recipe),
    }
    return Made(workshop.packed(chosen.recipe), workshop.source, plan)


def _no_mixture(nearest: Candidate, budget: Budget) -> BudgetError:
    needed = nearest.verdict.ppl_increase_high * 105
    return BudgetError(
        f"no mixture is within a perplexity increase of {limit_of(budget)}; the nearest: "
        f"{spread(nearest.verdict)} over {nearest.verdict.tokens:,} tokens",
        hint=f"allow more: mix:{max(needed, 0.01):.2g}%",
    )
