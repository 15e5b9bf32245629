"""The closed loop: measure the start, try recipes, draw a mixture, choose, write.

What a search ends with is plan.json, its record, of which the report and the table are views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

import hasten
from hasten.bench.calibrate import kept
from hasten.compress.result import Observer, Progress, silent
from hasten.core import (
    SCHEMA_VERSION,
    Budget,
    EngineOptions,
    Estimate,
    Goal,
    Machine,
    Measurement,
    Plan,
    Recipe,
    Workload,
    as_json,
)
from hasten.errors import BudgetError, DeviceLost, MachineError, UsageError
from hasten.optimize.calibrated import Made, mixture_name
from hasten.optimize.mixture import Mixing
from hasten.optimize.sensitivity import Sensitivity, SensitivityMap, uniform
from hasten.optimize.trials import (
    Built,
    Candidate,
    SearchMemory,
    Trials,
    Workshop,
    choose_candidate,
    explain,
    limit_of,
    slow_readers,
    spread,
)
from hasten.quality.divergence import Reference
from hasten.quality.text import Text, default_text, text_from_file, windows
from hasten.report.optimized import optimized_page
from hasten.speed.cost import on_gpu
from hasten.speed.forecast import estimate
from hasten.speed.pace import Pace


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


WORKLOADS: dict[Goal, Workload] = {
    "latency": Workload(prompt=512, output=128, batch=1),
    "throughput": Workload(prompt=128, output=64, batch=8),
    "memory": Workload(prompt=512, output=128, batch=1),
}
"""What speed is measured on, by goal."""

_BASELINE = Recipe.parse("bf16")
_MIXTURE_SECONDS = 120.0  # for the comparisons of the map behind `mix:P%`


@dataclass(frozen=True)
class Effort:
    """How much is measured; the defaults fit three minutes for half a billion weights on two cores."""

    tokens: int = 4096  # judged
    runs: int = 3  # timed, after a warm-up
    sensitivity_seconds: float = 30.0


def optimize(
    ref: str | Path,
    max_ppl_increase: float = 0.01,
    goal: Goal = "latency",
    out: str | Path | None = None,
    *,
    threads: int | None = None,
    text: str | Path | None = None,
    effort: Effort | None = None,
    fresh: bool = False,
    calibrate: bool = True,
    observer: Observer = silent,
    device: str = "cpu",
    gpu_memory: str | float | None = None,
) -> OptimizeResult:
    """Finds the fastest recipe whose perplexity rises by at most `max_ppl_increase`, and writes it as an
    artifact.

    Args:
        ref: a GGUF file, a Hugging Face folder, a hub id, or `demo`.
        max_ppl_increase: the budget against the source in bf16: 0.01 is +1 %.
        goal: `latency` (time of one request of 512 in, 128 out), `throughput` (8 sequences decoding) or
            `memory` (bytes).
        out: the artifact's folder; default NAME.hasten here.
        threads: default, the cores this process may use.
        text: a UTF-8 file to judge on; default, the prose and code of `pydoc_data.topics`.
        effort: how many tokens are judged and runs timed.
        fresh: ignore what an earlier search found.
        calibrate: try calibrated integers too, where torch is installed: `w4-best`, and a mixture by GPTQ.
            Costs minutes the first time; what was calibrated is kept.
        observer: told of every step.
        device: what recipes are judged and timed on, `cpu`, `cuda` or `auto`; which are tried follows it.
        gpu_memory: as `EngineOptions.gpu_memory`, for each of the two models that are loaded at a time.

    Raises:
        MachineError: `device` is "cuda", and there is no usable GPU.
        BudgetError: no recipe is within the budget.
        UsageError: a budget, goal or text that cannot be used.
        ModelError, DiskError: the source cannot be opened, the artifact cannot be written, or one of another
            model stands there.
    """
    from hasten.models.source import file_name_of

    check(max_ppl_increase, goal)
    judged = text_from_file(text) if text is not None else default_text()
    observer(Progress("reference", "opening the model"))
    workshop = Workshop(ref, EngineOptions(threads=threads, device=device, gpu_memory=gpu_memory))
    place = Path(out) if out is not None else Path(f"{file_name_of(workshop.name)}.hasten")
    workshop.claim(place)
    source = workshop.settle(_BASELINE)
    if workshop.device_because:
        observer(
            Progress("reference", f"--device auto is {workshop.options.device}: {workshop.device_because}")
        )
    search = Search(
        workshop, Budget(max_ppl_increase), goal, judged, effort or Effort(), fresh, observer, calibrate
    )
    search.begin_with(source)
    return search.run(place)


def check(max_ppl_increase: float, goal: str) -> None:
    """Refuses what no search could meet.

    Raises:
        UsageError: a negative or infinite budget, an unknown goal.
    """
    if not np.isfinite(max_ppl_increase) or max_ppl_increase < 0:
        raise UsageError(
            f"a perplexity increase of {max_ppl_increase * 100:g} % is no budget",
            hint="use --max-ppl-increase 1%",
        )
    if goal not in get_args(Goal):
        raise UsageError(f"unknown goal {goal!r}", hint=f"use one of {', '.join(get_args(Goal))}")


@dataclass
class Search:
    """One run of the loop over one source."""

    workshop: Workshop
    budget: Budget
    goal: Goal
    text: Text
    effort: Effort
    fresh: bool = False
    observer: Observer = silent
    calibrate: bool = True
    _source: Built | None = field(default=None, init=False)
    _left_out: list[str] = field(default_factory=list, init=False)  # what did not fit, one sentence each

    def run(self, out: Path) -> OptimizeResult:
        try:
            start = self.trials.measured(_BASELINE, self._bf16)
            candidates = self._uniform()
            mixture = self._mixture(candidates)
            candidates += [mixture] if mixture is not None else []
            for place in slow_readers(candidates):
                candidates[place] = self.trials.again(candidates[place])
            chosen = choose_candidate(candidates, self.goal, self.budget)
            candidates = explain(candidates, chosen, self.goal, self.budget, start)
            baseline = Baseline(start, max(candidates, key=lambda c: c.verdict.tokens).verdict.ppl_source)
            result = self._write(out, baseline, candidates, chosen.recipe)
        finally:
            self.close()
        self.memory.finish()
        return result

    def mixture(self) -> Candidate:
        """The cheapest mixture within the budget, judged and not timed; if none passes, the nearest.

        Where there is nothing to mix, it keeps the source's values.
        """
        name = mixture_name(self.budget)
        kept = self.trials.judge(Recipe(name))
        found = self.mixing.fit([kept])
        if found is None or (kept.passes and not found.passes):
            return replace(kept, because="Nothing narrower than the source's own values was found.")
        return found

    def begin_with(self, source: Built | None) -> None:
        """Take the source in bf16, where it is loaded already."""
        self._source = source

    def close(self) -> None:
        """Give the source in bf16 back; a second call does nothing."""
        if self._source is not None:
            self._source.close()
            self._source = None

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
    def trials(self) -> Trials:
        return Trials(
            workshop=self.workshop,
            reference=lambda: self._reference,
            memory=self.memory,
            budget=self.budget,
            workload=WORKLOADS[self.goal],
            runs=self.effort.runs,
            tokens=self.effort.tokens,
            observer=self.observer,
            calibrated=self.calibrated,
        )

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
            self._source = self.workshop.build(_BASELINE)
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
            budget=self.budget,
            seconds=self.effort.sensitivity_seconds,
            observer=self.observer,
            calibrated=self.calibrated,
        )

    def _uniform(self) -> list[Candidate]:
        shapes = self.workshop.config.linear_shapes()
        widest = max(self.workshop.kept()[name].bits_per_weight for name in shapes)
        recipes = uniform(widest, self.calibrated is not None, self.workshop.options.device)
        return [found for recipe in recipes if (found := self._attempt(recipe)) is not None]

    def _attempt(self, recipe: Recipe) -> Candidate | None:
        """Judged, and timed if it passes; None where the device has no room for it beside the source."""
        with self._unless_full(f"{recipe.name} was not tried"):
            return self.trials.attempt(recipe)
        return None

    def _mixture(self, judged: Sequence[Candidate]) -> Candidate | None:
        mixture = None
        if self._map is not None:
            with self._unless_full("No mixture was tried"):
                mixture = self.mixing.fit(judged)
        if mixture is not None and mixture.passes:
            mixture = replace(mixture, measurement=self.trials.attempt(mixture.recipe).measurement)
        return mixture

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

    def _estimate(self, chosen: Candidate) -> Estimate | None:
        """What the speed model says of the chosen recipe, to be held against the measurement."""
        try:
            return estimate(
                self.workshop.config,
                self._ceilings(chosen.recipe),
                WORKLOADS[self.goal],
                chosen.recipe,
                weight_bytes=chosen.weight_bytes,
                pace=self._timed(chosen.recipe),
            )
        except MachineError:
            return None  # ceilings were not measured: unknown

    def _timed(self, recipe: Recipe) -> Pace | None:
        """What `hasten estimate` timed on this machine, where it did and the recipe's formats are known."""
        options = self.workshop.options
        knows = all(
            layout is not None for layout in map(recipe.layout_for, self.workshop.config.linear_shapes())
        )
        return kept(options.threads) if options.device == "cpu" and knows else None

    def _ceilings(self, recipe: Recipe) -> Machine:
        """The machine, with the ceilings of what computes."""
        machine = self.workshop.machine()
        if self.workshop.options.device != "cuda":
            return machine
        return on_gpu(machine, recipe.name.startswith("fp8"))

    def _write(
        self, out: Path, baseline: Baseline, candidates: Sequence[Candidate], recipe: Recipe
    ) -> OptimizeResult:
        self.observer(Progress("artifact", f"writing {out}"))
        drawn = self._map or SensitivityMap(())
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
                *remarks(drawn, recipe),
                *disturbances(candidates),
                *self.uncalibrated(),
                *self._left_out,
            ),
        )
        machine = self.workshop.machine()
        result = OptimizeResult(machine, baseline, tuple(candidates), chosen, plan, out.absolute())
        whole = self._record(result, drawn)
        model = self.workshop.build(recipe)
        try:
            self.workshop.save(model, out, whole, optimized_page(whole))
        finally:
            model.close()
        return result

    def _record(self, result: OptimizeResult, drawn: SensitivityMap) -> dict[str, Any]:
        """Everything worth keeping of a search, as plain JSON values."""
        return {
            **as_json(result.plan),
            "goal": self.goal,
            "budget": as_json(self.budget),
            "machine": as_json(result.machine),
            "versions": {"hasten": hasten.__version__, "python": result.machine.python},
            "text": self.judged_on(),
            "runs": self.effort.runs,
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
    search = Search(workshop, budget, "latency", text, effort, observer=observer)
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
