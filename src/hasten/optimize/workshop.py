"""A model that is opened, and the device of this machine that its recipes are built, judged and timed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from hasten.bench.figures import Sample
from hasten.bench.measure import PromptRing, default_text, measurement_of_model, run_once
from hasten.compress.result import Observer
from hasten.core import EngineOptions, Format, Machine, Measurement, ModelSpec, Recipe, Workload
from hasten.engine.model import LanguageModel, load_packed
from hasten.errors import UsageError
from hasten.machine import probe
from hasten.models.artifact import refuse_other_model, save
from hasten.models.open import open_model
from hasten.models.source import sha256_of
from hasten.optimize.calibrated import CalibratedWeights, is_calibrated, is_mixture
from hasten.quality.divergence import Runnable
from hasten.quality.text import Encoder, Text
from hasten.runtime.executor import choose_device
from hasten.weights.artifact import is_artifact
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear, pack_model, source_layout

if TYPE_CHECKING:
    from hasten.weights.tensors import SourceTensor

_SAMPLED_ROWS = 64
"""Rows a tensor's rounding error is computed from: with 896 columns that is 57 thousand weights."""
_CEILING_AGE_S = 24 * 3600.0
_PROBE_SECONDS = (0.8, 0.1)  # of reading, and for each kind of arithmetic, where nothing younger is kept
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


@dataclass(frozen=True)
class Timed:
    """Runs of one model, those without that other work disturbed."""

    samples: tuple[Sample, ...]
    disturbed: int = 0
    joules_per_token: float | None = None  # of the whole machine, prompt and answer together; None: unknown


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
        known = probe.load_or_measure(_CEILING_AGE_S, self.options.threads, *_PROBE_SECONDS)
        return replace(self._seen, **known)

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

    def swap(
        self, model: Built, tensors: Sequence[str], layout: Format | None, method: str = "rtn"
    ) -> Mapping[str, Any]:
        """Packs single tensors anew and puts them in place; what was there, for `restore`."""
        before = {name: cast(LanguageModel, model).packed.linears[name] for name in tensors}
        for name in tensors:
            if layout is not None and is_calibrated(layout, method):
                linear = self.calibrated_linear(name, layout)
            else:
                linear = pack_linear(self.source.tensors[name], layout, threads=self.options.threads)
            cast(LanguageModel, model).replace(name, linear)
        return before

    def restore(self, model: Built, before: Mapping[str, Any]) -> None:
        """Put back what `swap` took out: nothing is packed again."""
        for name, linear in before.items():
            cast(LanguageModel, model).replace(name, linear)

    def calibrated_linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix of a mixture, calibrated now or before; `calibrate` comes first."""
        return self._calibration().linear(name, layout)

    def error(self, tensor: str, layout: Format) -> float:
        """Squared error over squared values, on 64 rows spread over the tensor."""
        packed = pack_linear(_some_rows(self.source.tensors[tensor]), layout, threads=1)
        assert packed.relative_error is not None  # pack_linear measures it
        return packed.relative_error**2

    @cached_property
    def _ring(self) -> PromptRing:
        return PromptRing(self.tokenizer().encode(default_text(), add_special=False))

    def run(self, model: Built, workload: Workload, number: int) -> Sample:
        """One timed run. Runs of the same number have the same prompts, whatever the recipe."""
        prompts, shared = self._ring.round(number, workload), self._ring.shared(workload)
        return run_once(cast(LanguageModel, model), prompts, workload.output, shared)

    def measurement(self, model: Built, workload: Workload, timed: Timed) -> Measurement:
        """The medians of a model's runs, beside the machine's ceilings."""
        own = cast(LanguageModel, model)
        found = measurement_of_model(own, timed.samples, workload, timed.disturbed, self.machine())
        return replace(found, joules_per_token=timed.joules_per_token)

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
