"""`hasten.compress`: a model through every step of a recipe, to an artifact."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from hasten.compress.calibration import TOKENS
from hasten.compress.job import Job, Means
from hasten.compress.recipe_file import recipe_from, write_recipe
from hasten.compress.result import Compressed, Observer, Progress, silent
from hasten.compress.steps import carried_out
from hasten.core import Recipe, as_json
from hasten.errors import UsageError
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.weights.artifact import is_artifact

if TYPE_CHECKING:
    from hasten.compress.compressed_module import CompressedModule
    from hasten.compress.module import Inputs, Module
    from hasten.compress.module_recipe import ModuleRecipe


@overload
def compress(
    model: Module,
    recipe: ModuleRecipe,
    calibration: Inputs,
) -> CompressedModule: ...
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
