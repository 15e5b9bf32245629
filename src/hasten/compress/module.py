"""Compress any plain torch module: prune, quantise, compile and cache it, and measure each step."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hasten.compress.module_recipe import ModuleRecipe, ModuleReport
from hasten.errors import MachineError, ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hasten.compress.compressed_module import CompressedModule, Step

    Module = nn.Module
    Inputs = torch.Tensor | tuple[torch.Tensor, ...]


def compress_module(
    module: nn.Module,
    recipe: ModuleRecipe,
    calibration: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    rounds: int = 30,
) -> CompressedModule:
    """A copy of `module` after `recipe`, for inference on a CPU, with a report of what each step changed.

    The module itself is not touched. The copy is in evaluation mode; each step's result runs some hundred
    times to be timed. Memory: a copy of the module for each step, until the report is there.

    Args:
        module: any `torch.nn.Module` on the CPU.
        calibration: the arguments of one call, a tensor or several: what times and differences are of.
        rounds: samples of each time, 1 or more.

    Raises:
        MachineError: torch is not installed, or cannot compile here.
        ModelError: the module does not run on `calibration`, or not any more after a step.
        UsageError: nothing in the module can be pruned or quantised, it is not on the CPU, or its outputs
            are to be kept but cannot be.
    """
    if find_spec("torch") is None:
        raise MachineError("compressing a module needs torch", hint="pip install 'hasten[compress]'")
    inputs = _checked(module, recipe, calibration, rounds)
    from torch import get_num_threads

    from hasten.compress.compressed_module import (
        CompressedModule,
        Step,
        cached,
        call,
        compiled,
        measured,
        stored_bytes,
    )

    work = _copied(module).eval()
    Step("the module", "", call(work, inputs), 0).outputs()  # lazy layers have their shapes after a call
    first = _copied(work) if recipe.prune or recipe.bits else work
    steps = [Step("as it was", "the module in evaluation mode", call(first, inputs), stored_bytes(first))]
    if recipe.prune:
        steps.append(_pruned(work, recipe, inputs))
    if recipe.bits:
        work, step = _quantised(_copied(work) if recipe.prune else work, inputs)
        steps.append(step)
    result = CompressedModule(work, recipe)
    if recipe.compile is not None:
        done = f"torch.compile, mode {recipe.compile}: operations joined and written as C++"
        steps.append(compiled(Step("compiled", done, call(result.run, inputs), stored_bytes(work))))
    if recipe.cache_mb:
        steps += cached(result, inputs, steps[-1])
    stages = measured(steps, rounds)
    result.new_cache()  # without what was measured
    shapes = ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in inputs)
    result.report = ModuleReport(stages, shapes, get_num_threads())
    return result


def _checked(
    module: nn.Module, recipe: ModuleRecipe, calibration: torch.Tensor | tuple[torch.Tensor, ...], rounds: int
) -> tuple[torch.Tensor, ...]:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"expected a torch.nn.Module, got {type(module).__name__}", hint="pass the module itself"
        )
    if not isinstance(recipe, ModuleRecipe):
        raise UsageError(
            f"a module's recipe is a ModuleRecipe, got {recipe!r}",
            hint="use ModuleRecipe(bits=8, prune=0.25)",
        )
    inputs = calibration if isinstance(calibration, tuple) else (calibration,)
    if not inputs or not all(isinstance(tensor, torch.Tensor) for tensor in inputs):
        raise UsageError(
            "calibration must be the tensors of one call",
            hint="pass one input as the module takes it, such as torch.rand(1, 784)",
        )
    if rounds < 1:
        raise UsageError(f"rounds start at 1, got {rounds}", hint="use rounds=30")
    places = {str(t.device) for t in (*module.parameters(), *module.buffers(), *inputs)} - {"cpu"}
    if places:
        raise UsageError(
            f"modules are compressed on the CPU, got tensors on {', '.join(sorted(places))}",
            hint="call module.cpu() and pass CPU inputs",
        )
    return inputs


def _copied(module: nn.Module) -> nn.Module:
    try:
        return deepcopy(module)
    except (RuntimeError, TypeError) as wrong:
        raise ModelError(
            f"the module cannot be copied: {wrong}",
            hint="keep tensors as parameters or buffers, without gradients",
        ) from wrong


def _pruned(work: nn.Module, recipe: ModuleRecipe, inputs: tuple[torch.Tensor, ...]) -> Step:
    from hasten.compress.compressed_module import Step, call, stored_bytes
    from hasten.compress.module_layers import prune_channels, prune_weights

    if recipe.prune_kind == "channels":
        removed, layers = prune_channels(work, recipe.prune)
        done = f"{removed} of the weakest neurons of {_count(layers, 'hidden layer')} removed: smaller layers"
        why = "no nn.Sequential with two Linear layers and only activations between has neurons to remove"
        hint = "use prune_kind='weights', which shortens nothing, or a larger amount"
    else:
        removed, layers = prune_weights(work, recipe.prune)
        done = f"{removed:,} of the smallest weights in {_count(layers, 'Linear layer')} set to 0"
        done += ", stored and multiplied all the same"
        why = "the module has no Linear layer with weights to remove"
        hint = "leave prune out"
    if not removed:
        raise UsageError(f"nothing to prune: {why}", hint=hint)
    return Step("pruned", done, call(work, inputs), stored_bytes(work))


def _quantised(work: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[nn.Module, Step]:
    from hasten.compress.compressed_module import Step, call, stored_bytes
    from hasten.compress.module_layers import quantise_linears

    work, done, skipped = quantise_linears(work)
    left = tuple(f"{name} ({why})" for name, why in skipped.items())
    if not done:
        raise UsageError(
            "nothing to quantise: " + ("; ".join(left) or "the module has no Linear layer"),
            hint="leave bits out",
        )
    said = f"int8 weights in {_count(len(done), 'Linear layer')}, activations rounded to int8 at each call"
    return work, Step("int8", said, call(work, inputs), stored_bytes(work), skipped=left)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
