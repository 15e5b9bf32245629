"""`hasten.compress`: a model through the steps of a recipe: rotate, prune, distil, quantise; an artifact."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from hasten.compress.calibration import TOKENS
from hasten.compress.job import Job, Means, fitted, notes
from hasten.compress.recipe_file import recipe_from, write_recipe
from hasten.compress.result import Compressed, Observer, Progress, StageClock, Step, silent
from hasten.core import Recipe, as_json
from hasten.errors import UsageError
from hasten.machine.memory import peak_rss_bytes
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.recipe import PRUNINGS, Pruning
from hasten.weights.artifact import is_artifact
from hasten.weights.packed import PackedModel, pack_model

if TYPE_CHECKING:
    from hasten.compress.compressed_module import CompressedModule
    from hasten.compress.distil.trainer import Distilled
    from hasten.compress.module import Inputs, Module
    from hasten.compress.module_recipe import ModuleRecipe

Told = tuple[list[str], dict[str, Any]]
"""What a step says of itself: lines for people, and the record."""


def carried_out(job: Job) -> Compressed:
    """A job through every step; nothing is written but what a stopped run goes on from.

    Raises:
        ModelError: a weight, an activation or the loss of distilling is not finite; the layer is named.
        UsageError: a part of the recipe turns out not to fit the model.
        MachineError, DiskError: no such device; the work folder cannot be written.
    """
    began = time.monotonic()
    steps = _Steps(job)
    with _threads(job):
        packed = steps.run()
    found = list(steps.notes) + list(notes(packed.recipe, steps.source.config))
    text = job.text
    return Compressed(
        None,
        packed,
        steps.source,
        packed.recipe,
        packed.bits_per_weight,
        time.monotonic() - began,
        peak_rss_bytes(),
        tuple(steps.done),
        None if text is None else {"name": text.name, "tokens": text.tokens, "sha256": text.sha256},
        tuple(found),
    )


class _Steps:
    """One run: `source` is the model as it is by now."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source = job.source
        self.done: list[Step] = []
        self.notes: list[str] = []
        self._learned: Distilled | None = None
        self._packed: PackedModel | None = None

    def run(self) -> PackedModel:
        """All of them; the packed model."""
        recipe = self.job.recipe
        if recipe.rotate:
            self._step("rotate", self._rotate)
        for pruning in recipe.prune:
            self._step(f"prune {pruning.kind}", partial(self._prune, pruning))
        if recipe.distil is not None:
            self._step("distil", self._distil)
        final, gone = fitted(self.job.asked, self.job.source.config, self.source.config)
        self.notes += gone
        final = replace(final, rotate=False, prune=(), distil=None)
        self._step("quantise", partial(self._quantise, final))
        assert self._packed is not None
        return replace(self._packed, recipe=replace(self.job.recipe, layers=final.layers))

    def _step(self, name: str, work: Callable[[StageClock], Told]) -> None:
        clock = StageClock(name, self.job.observer)
        clock(0, 0)
        lines, record = work(clock)
        self.done.append(Step(name, clock.seconds, tuple(lines), record))

    def _rotate(self, clock: StageClock) -> Told:
        from hasten.compress.quantise.rotate import residual_rotation, rotate

        because = residual_rotation(self.source.config).because
        self.source = rotate(self.source)
        return [f"hidden states turned: {because}"], {}

    def _prune(self, pruning: Pruning, clock: StageClock) -> Told:
        from hasten.compress.prune import prune

        pruned = prune(self.source, pruning, self.job.text, clock)
        self.source = pruned.source
        return pruned.lines(), pruned.record()

    def _distil(self, clock: StageClock) -> Told:
        from hasten.compress.distil.trainer import Training, distil

        job, recipe = self.job, self.job.recipe
        assert recipe.distil is not None and job.lesson is not None
        # the integers themselves are trained where no other method finds them
        through = recipe.method == "rtn" and recipe.smooth is None
        layouts = fitted(job.asked, job.source.config, self.source.config)[0] if through else None
        sparse = any(PRUNINGS[one.kind].takes == "weights" for one in recipe.prune)
        self._learned = distil(
            job.source,
            self.source,
            job.lesson,
            recipe.distil,
            folder=job.folder / "distil",
            layouts=None if layouts is None else layouts.layout_for,
            device=job.means.device,
            seconds=job.means.distil_seconds,
            training=Training(keep_zeros=sparse),
            observer=lambda p: clock(p.done, p.total, _lesson(p), p.seconds_left),
        )
        self.source = self._learned.source
        return self._learned.lines(), self._learned.record()

    def _quantise(self, recipe: Recipe, clock: StageClock) -> Told:
        threads = self.job.means.threads
        if self._learned is not None and self._learned.integers:
            learned = self._learned.integers
            matrices = [n for n, t in self.source.tensors.items() if len(t.shape) == 2 and n not in learned]
            kept = {name: layout for name in matrices if (layout := recipe.layout_for(name)) is not None}
            as_trained = replace(recipe, default=None, head=None, layers=kept)
            made = pack_model(self.source, as_trained, threads)
            said = f"{len(learned)} matrices stored as they were trained"
        elif recipe.is_plain:
            made = pack_model(self.source, recipe, threads)
            said = "each value rounded to the nearest, scales searched"
        else:
            from hasten.compress.quantise.layerwise import quantise

            folder = self.job.folder / "layers"
            made = quantise(self.source, recipe, self.job.text, observer=clock, folder=folder)
            said = f"integers found by {recipe.method}"
        self._packed = made
        return [f"{said}: {made.bits_per_weight:.2f} bits a weight"], {}


def _lesson(progress: Any) -> str:
    """A moment of distilling in words."""
    parts = ["the teacher reads" if progress.stage == "teacher" else "training"]
    parts += [f"loss {progress.loss:.4f}"] if progress.loss is not None else []
    parts += [f"held-out KL {progress.kl:.4f}"] if progress.kl is not None else []
    parts += [f"{progress.tokens_per_s:,.0f} tokens/s"] if progress.tokens_per_s is not None else []
    return ", ".join(parts)


def _threads(job: Job) -> contextlib.AbstractContextManager[None]:
    if job.recipe.is_plain:
        return contextlib.nullcontext()
    from hasten.compress.torch_model import torch_threads

    return torch_threads(job.means.threads)


@overload
def compress(model: Module, recipe: ModuleRecipe, calibration: Inputs) -> CompressedModule: ...
@overload
def compress(
    model: str | Path,
    recipe: str | Path | Recipe = ...,
    calibration: str | Path | None = ...,
    *,
    out: str | Path | None = ...,
    force: bool = ...,
    tokens: int = ...,
    means: Means = ...,
    observer: Observer = ...,
) -> Compressed: ...
def compress(
    model: Any,
    recipe: Any = "w4-best",
    calibration: Any = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    tokens: int = TOKENS,
    means: Means | None = None,
    observer: Observer = silent,
) -> Any:
    """Makes a language model, or any torch module, smaller.

    A language model goes through the recipe's steps in order: rotation, pruning, distilling, quantising. All
    that can be wrong with the request is said before any work. Work that was stopped goes on from the last
    finished layer when the same is asked again.

    Args:
        model: a folder with safetensors, a .gguf file, a hub id, or "demo"; or a `torch.nn.Module`.
        recipe: a name ("w4-best", "w4-gptq"), a YAML file or a Recipe; for a module a `ModuleRecipe`.
        calibration: text to measure activations on and to distil with: a UTF-8 file, a .jsonl file, a Hugging
            Face dataset; None is the default text. For a module the arguments of one call, tensors.
        out: folder of the artifact; None writes none. An artifact of the same model there is replaced.
        force: replace one of another model too.
        tokens: calibration tokens.
        means: threads, device and time.
        observer: told of every step.

    Returns:
        `Compressed`, with the packed model and what was done; for a module a `CompressedModule`.

    Raises:
        UsageError: a recipe or text that cannot be used, or that does not fit the model.
        MachineError: torch is needed and not installed, or there is no such device.
        ModelError: the model cannot be opened, or a weight or activation is not finite; the layer is named.
        DiskError: too little room, or a folder that cannot be written or must not be replaced.
    """
    if _is_module(model):
        from hasten.compress.module import compress_module

        if out is not None or force or tokens != TOKENS or means is not None or observer is not silent:
            raise UsageError(
                "out, force, tokens, means and observer are for language models, and this is a module",
                hint="hasten.compress(module, ModuleRecipe(bits=8), inputs)",
            )
        return compress_module(model, recipe, calibration)
    wanted = recipe_from(recipe)
    if is_artifact(model):
        raise UsageError(
            f"{model} is an artifact: its weights are rounded already", hint="compress what it was made from"
        )
    observer(Progress("open", str(model)))
    source = open_model(model)
    job = Job.of(source, wanted, calibration, tokens, means or Means(), observer)
    job.check_disk(None if out is None else Path(out), force)
    made = carried_out(job)
    if out is not None:
        observer(Progress("write", str(out)))
        save(out, made.packed, made.source, {"compress": record(made)}, threads=job.means.threads)
        made = replace(made, artifact=Path(out))
    job.clean()
    return made


def _is_module(model: Any) -> bool:
    """Whether it is a torch module; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "nn") and isinstance(model, torch.nn.Module)


def record(made: Compressed) -> dict[str, Any]:
    """How it was made, as JSON: `compress` in plan.json."""
    return {
        "recipe": write_recipe(made.recipe),
        "calibration": made.calibration,
        "steps": [as_json(step) for step in made.steps],
        "seconds": made.seconds,
        "peak_rss_bytes": made.peak_rss_bytes,
        "notes": list(made.notes),
    }
