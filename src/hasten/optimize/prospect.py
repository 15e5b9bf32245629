"""What is known of a recipe before it is packed, what need not be packed because it cannot win; and what a
search found in the end.

Three things are known from the shapes alone: its bytes, how its time should compare with another recipe's,
and whether it is coarser than another one everywhere. So a search asks first what tells most:

- the source's own values first: nothing that reads as many bytes can be closer to the source;
- then the middle of what is left, by predicted cost. One that does not pass takes with it all that are as
  coarse or coarser in every layer; one that passes takes all that are predicted to be slower by more than
  `SLACK`.

The prediction is by what `hasten estimate` timed on this machine, else by the bytes read. Of the 81 pairs in
predict.json where one recipe reads 15 % more bytes than the other, that one was faster in one pair, by 1 %.

A calibrated recipe is left out where rounding alone fails by more than eight times the budget: at 4 bits the
best method has a sixth of the rise that rounding has (quantise.json).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core import (
    SCHEMA_VERSION,
    Budget,
    Format,
    Machine,
    Measurement,
    ModelSpec,
    Plan,
    Recipe,
    Workload,
    as_json,
)
from hasten.errors import HastenError
from hasten.optimize.choice import Aims, Candidate, Untried
from hasten.optimize.race import SAME
from hasten.optimize.sensitivity import Sensitivity, SensitivityMap
from hasten.speed.cost import kv_token_bytes, load_of, window_of
from hasten.speed.forecast import Case, forecast
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
    untried: tuple[Untried, ...] = ()

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
            "untried": [{**as_json(u), "recipe": u.recipe.name} for u in self.untried],
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


_GAIN = 8.0  # of the best method over rounding at the same bits, with something to spare
_FIXED_BYTES = 0.5
"""A weight: what a request takes besides reading weights, in bytes that are read in that time. Over the 90
pairs of recipes in predict.json the logarithm of a ratio is then off by 0.08, by -0.015 on the mean."""
SLACK = 0.15
"""Predicted costs this close are raced; what is predicted to be dearer by more is not tried."""


@dataclass(frozen=True)
class Prospect:
    """A recipe as its shapes tell it."""

    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int  # of linear layers, one token reads
    cost: float  # predicted; compares with those of the same search alone

    def untried(self, because: str) -> Untried:
        return Untried(self.recipe, self.bits_per_weight, self.weight_bytes, because)


def prospect(
    recipe: Recipe, config: ModelSpec, kept: Mapping[str, Format], aims: Aims, pace: Pace | None
) -> Prospect:
    """Bytes, bits and the predicted cost of a recipe.

    Args:
        kept: the source's own layouts, for a recipe that keeps its values.
        pace: what was timed on this machine; None: cost goes by bytes.
    """
    shapes = config.linear_shapes()
    layouts = {name: recipe.layout_for(name) or kept[name] for name in shapes}
    size = sum(layouts[name].bytes_of(*shape) for name, shape in shapes.items())
    weights = sum(rows * cols for rows, cols in shapes.values())
    bits = sum(layouts[name].bits_per_weight * rows * cols for name, (rows, cols) in shapes.items()) / weights
    cost = size + kv_bytes(config, recipe.kv != "bf16", aims.workload) + _FIXED_BYTES * weights
    if pace is not None and aims.goal not in ("memory", "energy"):
        spelled = Recipe(recipe.name, layers=layouts, default=Format.of(16), kv=recipe.kv)
        cost = _predicted(spelled, config, aims, pace) or cost
    return Prospect(recipe, bits, size, cost)


def kv_bytes(config: ModelSpec, is_int8: bool, work: Workload) -> float:
    """Of keys and values, that a step in the middle of all answers reads."""
    context = work.prompt + work.output / 2
    mixers = [block.mixer for block in config.blocks]
    return work.batch * sum(kv_token_bytes(m, is_int8) * min(window_of(m), context) for m in mixers)


def _predicted(recipe: Recipe, config: ModelSpec, aims: Aims, pace: Pace) -> float | None:
    """Milliseconds of the workload; None: the pace cannot tell."""
    work = aims.workload
    case = Case(work, work.shared / work.prompt)
    try:
        found = forecast(config, recipe, case, pace, load=load_of(config, recipe))
    except HastenError:
        return None
    return found.whole_ms


def is_coarser(one: Recipe, other: Recipe, names: Sequence[str], kept: Mapping[str, Format]) -> bool:
    """Whether a recipe has at most the bits of another in every layer, found in the same way."""
    if one.method != other.method or (one.kv == "bf16" and other.kv != "bf16"):
        return False
    pairs = [(one.layout_for(name), other.layout_for(name), kept[name]) for name in names]
    return all(
        theirs is None or (ours or own).bits_per_weight <= theirs.bits_per_weight
        for ours, theirs, own in pairs
    ) and any(ours is not None for ours, _, _ in pairs)


Judge = Callable[[Recipe], Candidate | None]


@dataclass
class Sieve:
    """Tries recipes in the order that tells most, and leaves out what cannot win any more."""

    prospects: list[Prospect]
    names: Sequence[str]  # of the linear layers
    kept: Mapping[str, Format]
    judge: Judge  # None: it could not be tried
    budget: Budget
    is_over: Callable[[], bool]  # the time is up

    def run(self) -> tuple[list[Candidate], list[Untried]]:
        """What was tried, in the order of the recipes, and what was left out."""
        self._left = list(self.prospects)
        self._tried: list[Candidate] = []
        self._out: list[Untried] = []
        while self._left:
            if self._tried and self.is_over():
                self._out += [p.untried("not tried: the time limit came first.") for p in self._left]
                break
            one = self._next()
            self._left.remove(one)
            found = self.judge(one.recipe)
            if found is None:
                continue
            self._tried.append(found)
            self._sift(one, found)
        place = {p.recipe.name: number for number, p in enumerate(self.prospects)}
        self._tried.sort(key=lambda c: place[c.recipe.name])
        self._out.sort(key=lambda u: place[u.recipe.name])
        return self._tried, self._out

    def _next(self) -> Prospect:
        own = next((p for p in self._left if _keeps(p.recipe)), None)
        return own or sorted(self._left, key=lambda p: p.cost)[len(self._left) // 2]

    def _sift(self, one: Prospect, found: Candidate) -> None:
        for other in list(self._left):
            because = self._hopeless(one, found, other)
            if because:
                self._left.remove(other)
                self._out.append(other.untried(because))

    def _hopeless(self, one: Prospect, found: Candidate, other: Prospect) -> str | None:
        """Why another recipe cannot win once one was judged; None: it may."""
        name = one.recipe.name
        if not found.passes and is_coarser(other.recipe, one.recipe, self.names, self.kept):
            return f"not tried: {name} does not pass, and this has no more bits in any layer."
        rise, most = found.verdict.ppl_increase_low, self.budget.max_ppl_increase
        if other.recipe.method != "rtn" and rise > _GAIN * most and self._same_layouts(one, other):
            return (
                f"not tried: {name} is {rise / most:.0f} times over the budget, more than calibration mends."
            )
        if not found.passes:
            return None
        least = (1 - SAME) * one.weight_bytes
        if _keeps(one.recipe) and other.weight_bytes >= least and other.recipe.kv == one.recipe.kv:
            return f"not tried: it reads as much as {name}, which keeps the source's own values."
        dearer = other.cost / one.cost - 1
        if dearer > SLACK:
            return f"not tried: predicted to cost {dearer:.0%} more than {name}, which passes."
        return None

    def _same_layouts(self, one: Prospect, other: Prospect) -> bool:
        return all(one.recipe.layout_for(n) == other.recipe.layout_for(n) for n in self.names)


def _keeps(recipe: Recipe) -> bool:
    """Whether a recipe keeps the source's values as they are."""
    return recipe.default is None and recipe.head is None and not recipe.layers


def worth_racing(passing: Sequence[Candidate], cost_of: Callable[[Candidate], float]) -> Iterator[Candidate]:
    """Those whose predicted cost is near the least of all that pass."""
    least = min(map(cost_of, passing), default=0.0)
    return (c for c in passing if cost_of(c) <= least * (1 + SLACK))
