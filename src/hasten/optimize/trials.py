"""How one recipe is tried: packed and run in a workshop, judged, timed if it passes; every finding is kept.

Then which of those that were tried is chosen, and the reason for each.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

import hasten
from hasten.bench.measure import measure_model
from hasten.cache import cache_dir, read_record, write_record
from hasten.compress.result import Observer, Progress
from hasten.core import (
    Budget,
    EngineOptions,
    Format,
    Goal,
    Machine,
    Measurement,
    ModelSpec,
    Recipe,
    Stat,
    Verdict,
    Workload,
    as_json,
)
from hasten.engine.model import LanguageModel, load_packed
from hasten.errors import BudgetError, DiskError, UsageError
from hasten.machine import probe
from hasten.models.artifact import refuse_other_model, save
from hasten.models.open import open_model
from hasten.models.source import sha256_of
from hasten.optimize.calibrated import CalibratedWeights, is_calibrated, is_mixture
from hasten.quality.divergence import Divergence, Reference, Runnable, judge
from hasten.quality.text import Encoder, Text
from hasten.runtime.executor import choose_device
from hasten.weights.artifact import is_artifact
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear, pack_model, source_layout
from hasten.weights.packed_store import warn_once

if TYPE_CHECKING:
    from hasten.weights.tensors import SourceTensor

_SAMPLED_ROWS = 64
"""Rows a tensor's rounding error is computed from: with 896 columns that is 57 thousand weights."""
_CEILING_AGE_S = 24 * 3600.0
_CONTEXT, _SEQUENCES = 1024, 8  # of what is judged and timed


class Built(Runnable, Protocol):
    """A model made from a recipe, in memory: a `LanguageModel`, or what a test puts in its place."""

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the linear layers, scales included."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of linear weights one decoded token reads."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices in memory, the embedding table included."""
        ...

    def close(self) -> None: ...


class Workshop:
    """An opened model, and the device of this machine that its recipes are judged and timed on.

    Raises:
        ModelError, FormatError: `ref` cannot be opened. UsageError: it is an artifact, whose source is gone.
    """

    def __init__(self, ref: str | Path, options: EngineOptions) -> None:
        if is_artifact(ref):
            raise UsageError(
                f"{ref} is an artifact already: its source's values are gone",
                hint="give the model it was made from; plan.json in it names that",
            )
        self._ref = ref
        self.source = open_model(ref)
        self.options = options
        self.device_because = ""  # why "auto" is this device
        self._calibrated: CalibratedWeights | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def config(self) -> ModelSpec:
        return self.source.config

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {file.path.name: sha256_of(file) for file in self.source.files}

    def identity(self) -> dict[str, Any]:
        """File names and their sha256."""
        return self._identity

    @cached_property
    def _seen(self) -> Machine:
        return probe.probe(measure=False)

    @cached_property
    def _measured(self) -> Machine:
        if self.options.device == "cuda":
            return replace(self._seen, accelerators=probe.gpu_ceilings(_CEILING_AGE_S))
        return replace(self._seen, **probe.load_or_measure(_CEILING_AGE_S, self.options.threads))

    def machine(self, ceilings: bool = True) -> Machine:
        """This machine; with ceilings, which take seconds to measure, they are at most a day old."""
        return self._measured if ceilings else self._seen

    def tokenizer(self) -> Encoder:
        return self.source.tokenizer()

    @cached_property
    def _kept(self) -> dict[str, Format]:
        return {name: source_layout(self.source.tensors[name]) for name in self.config.linear_shapes()}

    def kept(self) -> Mapping[str, Format]:
        """The source's own layouts by canonical name."""
        return self._kept

    def calibrate(self, text: Text, observer: Observer) -> str:
        """Takes the calibration part of a text.

        Raises:
            MachineError: torch is not installed. UsageError: the text is too short.
        """
        self._calibrated = CalibratedWeights.of(self.source, text, observer)
        return self._calibrated.identity

    def _calibration(self) -> CalibratedWeights:
        assert self._calibrated is not None, "calibrate() comes before methods that need a text"
        return self._calibrated

    def build(self, recipe: Recipe) -> Built:
        """Packs the source by a recipe and makes it ready to run."""
        return self._running(self.packed(recipe))

    def _running(self, packed: PackedModel) -> LanguageModel:
        """With few pages on a GPU: they are taken at the start, and two models are there at once."""
        options = self.options
        if options.device != "cpu":
            context = min(_CONTEXT, self.config.context)
            options = replace(options, context=context, max_sequences=_SEQUENCES)
        return load_packed(packed, self.source, options)

    def settle(self, recipe: Recipe) -> Built | None:
        """Decide what the device "auto" is: where this recipe runs. That model; None where one was named.

        Raises:
            UsageError, MachineError: the device that was named is not there.
        """
        if self.options.device != "auto":
            choose_device(self.options.device)
            return None
        found = self._running(self.packed(recipe))
        self.options = replace(self.options, device=found.device)
        self.device_because = found.device_because
        return found

    def packed(self, recipe: Recipe) -> PackedModel:
        if recipe.is_plain:
            return pack_model(self.source, recipe, self.options.threads)
        calibration = self._calibration()
        if is_mixture(recipe) and recipe.method == "gptq":
            return calibration.mixture(recipe, self.options.threads)
        return calibration.whole(self._ref, recipe, self.options.threads)

    def swap(self, model: Built, tensors: Sequence[str], layout: Format | None, method: str = "rtn") -> None:
        """Packs single tensors anew and puts them in place."""
        for name in tensors:
            if layout is not None and is_calibrated(layout, method):
                linear = self.calibrated_linear(name, layout)
            else:
                linear = pack_linear(self.source.tensors[name], layout, threads=self.options.threads)
            cast(LanguageModel, model).replace(name, linear)

    def calibrated_linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix of a mixture, calibrated now or before; `calibrate` comes first."""
        return self._calibration().linear(name, layout)

    def error(self, tensor: str, layout: Format) -> float:
        """Squared error over squared values, on 64 rows spread over the tensor."""
        packed = pack_linear(_some_rows(self.source.tensors[tensor]), layout, threads=1)
        assert packed.relative_error is not None  # pack_linear measures it
        return packed.relative_error**2

    def measure(self, model: Built, workload: Workload, runs: int) -> Measurement:
        return measure_model(cast(LanguageModel, model), workload, runs, machine=self.machine())

    def claim(self, folder: Path) -> None:
        refuse_other_model(folder, self.source, f"rm -r {folder}")

    def save(self, model: Built, folder: Path, plan: Mapping[str, Any], report: str) -> Path:
        """The artifact: weights, tokenizer, plan, report."""
        packed = cast(LanguageModel, model).packed
        return save(folder, packed, self.source, plan, extra={"report.html": report.encode()})


def _some_rows(tensor: SourceTensor) -> SourceTensor:
    """Every n-th row of a matrix, in file order: an error does not ask which row is which."""
    rows = tensor.rows
    step = max(rows // _SAMPLED_ROWS, 1)
    data = np.ascontiguousarray(tensor.data.reshape(rows, -1)[::step])
    return replace(tensor, data=data.reshape(-1), shape=(len(data), *tensor.shape[1:]), row_order=None)


@dataclass(frozen=True)
class Candidate:
    """A recipe: size, cost in quality, speed (None: not timed), and why it was kept or not."""

    recipe: Recipe
    bits_per_weight: float
    weight_bytes: int  # one token reads
    verdict: Verdict
    measurement: Measurement | None = None
    because: str = ""
    stored_bytes: int | None = None  # in memory; None: as many as one token reads

    @property
    def passes(self) -> bool:
        """Within the budget, shown with enough text."""
        return self.verdict.status == "pass"

    def cost(self, goal: Goal) -> float:
        """What the goal makes small; only for a timed candidate, or goal `memory`.

        latency: milliseconds until one request of the workload is done. throughput: milliseconds a token of
        all sequences together. memory: bytes of stored weights.
        """
        if goal == "memory":
            return float(self.weight_bytes if self.stored_bytes is None else self.stored_bytes)
        assert self.measurement is not None
        return cost_of(self.measurement, goal)


def cost_of(measured: Measurement, goal: Goal) -> float:
    """Milliseconds of a request (latency) or of a token of the whole batch (throughput)."""
    if goal == "throughput":
        return 1000.0 / measured.decode_tok_per_s.median
    return measured.ttft_ms.median + (measured.workload.output - 1) * measured.tpot_ms.median


def measurement_from(kept: Mapping[str, Any]) -> Measurement:
    stats = ("prefill_tok_per_s", "decode_tok_per_s", "ttft_ms", "tpot_ms")
    nested = {name: Stat(**kept[name]) for name in stats}
    return Measurement(**{**kept, **nested, "workload": Workload(**kept["workload"])})


_SAME = 0.02
"""Speeds this close are a tie: a machine repeats a run no better. The tie goes to the better quality."""


def choose_candidate(candidates: Sequence[Candidate], goal: Goal, budget: Budget) -> Candidate:
    """The fastest (or smallest) candidate that passes; within 2 % of it, the one with the least KL.

    Raises:
        BudgetError: none passes; the message names the nearest one.
    """
    passing = [c for c in candidates if c.passes and (goal == "memory" or c.measurement is not None)]
    if not passing:
        raise _nothing(candidates, budget)
    fastest = min(c.cost(goal) for c in passing)
    margin = 0.0 if goal == "memory" else _SAME
    tied = [c for c in passing if c.cost(goal) <= fastest * (1 + margin)]
    return min(tied, key=lambda c: (c.verdict.kl_mean, c.cost(goal)))


def explain(
    candidates: Sequence[Candidate], chosen: Candidate, goal: Goal, budget: Budget, baseline: Measurement
) -> list[Candidate]:
    """The candidates with their reasons, in the same order."""
    return [
        replace(c, because=_chosen(c, goal, budget, baseline, candidates))
        if c is chosen
        else replace(c, because=" ".join(filter(None, (_rejected(c, chosen, goal, budget), c.because))))
        for c in candidates
    ]


def _chosen(
    chosen: Candidate, goal: Goal, budget: Budget, baseline: Measurement, candidates: Sequence[Candidate]
) -> str:
    word = {"latency": "fastest", "throughput": "highest throughput", "memory": "smallest"}[goal]
    parts = [f"chosen: {word} within {limit_of(budget)};", f"{spread(chosen.verdict)}."]
    if goal == "latency" and chosen.measurement is not None:
        request = chosen.measurement.workload
        parts.append(
            f"A request of {request.prompt} in, {request.output} out takes {chosen.cost(goal) / 1000:.2f} s, "
            f"bf16 {cost_of(baseline, goal) / 1000:.2f} s."
        )
    tied = [
        c.recipe.name
        for c in candidates
        if c is not chosen and c.passes and c.measurement is not None and c.cost(goal) < chosen.cost(goal)
    ]
    if tied and goal != "memory":
        parts.append(f"As fast as {', '.join(tied)} within 2 %, and closer to the source.")
    return " ".join([*parts, chosen.because]).strip()


def _rejected(candidate: Candidate, chosen: Candidate, goal: Goal, budget: Budget) -> str:
    verdict, limit = candidate.verdict, limit_of(budget)
    if verdict.status == "fail":
        return f"out: {spread(verdict)} is above {limit}."
    if verdict.status == "insufficient":
        return (
            f"out: {spread(verdict)} leaves {limit} undecided after {verdict.tokens:,} tokens;"
            " give more with --tokens."
        )
    if goal == "memory":
        more = candidate.cost(goal) / chosen.cost(goal) - 1
        return f"passes with {spread(verdict)}, but needs {more:.0%} more memory than {chosen.recipe.name}."
    slower = candidate.cost(goal) / chosen.cost(goal) - 1
    if slower <= 0:
        return f"passes and is as fast as {chosen.recipe.name} within 2 %, but further from the source."
    return f"passes with {spread(verdict)}, but is {slower:.0%} slower than {chosen.recipe.name}."


def percent(value: float) -> str:
    """+0.82 %, -0.30 %, +12 %: signed."""
    return f"{value * 100:+.2f} %" if abs(value) < 0.0995 else f"{value * 100:+.0f} %"


def limit_of(budget: Budget) -> str:
    """The budget as the user wrote it: +1 %."""
    return f"{budget.max_ppl_increase * 100:+.4g} %"


def spread(verdict: Verdict) -> str:
    """The perplexity increase with its interval."""
    low, high = percent(verdict.ppl_increase_low), percent(verdict.ppl_increase_high)
    return f"perplexity {percent(verdict.ppl_increase)} ({low} to {high})"


def _nothing(candidates: Sequence[Candidate], budget: Budget) -> BudgetError:
    limit = limit_of(budget)
    if not candidates:
        return BudgetError(
            f"no recipe could be tried within {limit}", hint="give a larger --max-ppl-increase"
        )
    nearest = min(candidates, key=lambda c: c.verdict.ppl_increase_high)
    tokens = nearest.verdict.tokens
    message = (
        f"no recipe is within a perplexity increase of {limit}; {nearest.recipe.name} comes nearest: "
        f"{spread(nearest.verdict)} over {tokens:,} tokens, {nearest.verdict.status}"
    )
    if nearest.verdict.ppl_increase <= budget.max_ppl_increase:  # its interval alone reaches beyond
        return BudgetError(message, hint=f"judge on more text: --tokens {tokens * 4}")
    needed = nearest.verdict.ppl_increase_high * 100
    return BudgetError(message, hint=f"allow more: --max-ppl-increase {max(needed * 1.05, 0.01):.2g}%")


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
        return self.judge(recipe, timed=True)

    def judge(self, recipe: Recipe, timed: bool = False) -> Candidate:
        """Judged, and not timed unless asked."""
        with _Lazily(self.workshop, recipe, self.observer) as model:
            candidate = self._judged(recipe, model)
            if timed and candidate.passes:
                candidate = replace(candidate, measurement=self.measured(recipe, model.get))
        self.observer(Progress("recipes", recipe.name, candidate=candidate))
        return candidate

    def measured(self, recipe: Recipe, model: Callable[[], Built]) -> Measurement:
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
            return Candidate(recipe, **{**kept, "verdict": Verdict(**kept["verdict"])})
        built = model.get()
        verdict = self._judge(recipe, built)
        found: dict[str, Any] = {
            "bits_per_weight": built.bits_per_weight,
            "weight_bytes": built.weight_bytes,
            "stored_bytes": built.stored_bytes,
            "verdict": verdict,
        }
        self.memory.write("quality", found, **key)
        return Candidate(recipe, **found)

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
