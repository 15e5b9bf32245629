"""Compress any plain torch module: prune, quantise, compile and cache it, and measure each step."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

from hasten.core import CachePolicy, Stat
from hasten.errors import MachineError, ModelError, UsageError
from hasten.recipe import one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hasten.compress.compressed_module import CompressedModule, Step

    Module = nn.Module
    Inputs = torch.Tensor | tuple[torch.Tensor, ...]

PruneKind = Literal["channels", "weights"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class ModuleRecipe:
    """What happens to a `torch.nn.Module`: prune, quantise, compile, cache, in this order. Default: nothing.

    Raises:
        UsageError: a value that is out of range or not known.
    """

    bits: int | None = field(
        default=None,
        metadata={"help": "8: int8 weights, activations rounded to int8 as they come; default: as they are"},
    )
    prune: float = field(default=0.0, metadata={"help": "fraction to prune, 0 up to but not 1"})
    prune_kind: PruneKind = field(
        default="channels",
        metadata={"help": "channels: whole neurons, smaller dense layers; weights: zeros among the weights"},
    )
    compile: CompileMode | None = field(
        default=None, metadata={"help": "torch.compile mode: default, reduce-overhead or max-autotune"}
    )
    cache_mb: float = field(default=0.0, metadata={"help": "memory for outputs of inputs seen, MB; 0: none"})
    cache_policy: CachePolicy = field(
        default="lru", metadata={"help": "which output goes first: lru, lfu, s3fifo or cost"}
    )

    def __post_init__(self) -> None:
        if self.bits not in (None, 8):
            raise UsageError(f"bits of a plain module are 8 or None, got {self.bits!r}", hint="use bits=8")
        if not 0 <= self.prune < 1:
            raise UsageError(
                f"prune is a fraction from 0 up to but not 1, got {self.prune!r}",
                hint="use prune=0.25 for a quarter",
            )
        if not 0 <= self.cache_mb < float("inf"):
            raise UsageError(
                f"cache_mb starts at 0, got {self.cache_mb!r}", hint="use cache_mb=64, or 0 for none"
            )
        one_of("prune_kind", self.prune_kind, get_args(PruneKind))
        one_of("cache policy", self.cache_policy, get_args(CachePolicy))
        if self.compile is not None:
            one_of("compile mode", self.compile, get_args(CompileMode))


@dataclass(frozen=True)
class Stage:
    """The module after one step of the recipe.

    Times are of one call on the calibration input, again and again, so that weights lie in the processor's
    caches; all stages were measured in turn within the same rounds. Differences are to the first stage's
    output on the same input.
    """

    name: str  # "as it was", "pruned", "int8", "compiled", "cache, new input", "cache, seen input"
    done: str  # what the step did
    seconds: Stat
    bytes: int  # parameters and buffers
    max_difference: float
    mean_difference: float
    relative_difference: float  # root of squared differences over squared outputs
    skipped: tuple[str, ...] = ()  # "name: why" of each Linear layer that the step left alone
    setup_s: float = 0.0  # torch.compile: until the first output


@dataclass(frozen=True)
class ModuleReport:
    """All stages, in order; the first is the module as it came."""

    stages: tuple[Stage, ...]
    input: str  # shapes of the calibration input
    threads: int

    @property
    def speedup(self) -> float:
        """Median time of the first stage over the last one's."""
        return self.stages[0].seconds.median / self.stages[-1].seconds.median

    def __str__(self) -> str:
        """A table, and one line that explains each row."""
        first = self.stages[0]
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        head = f"{'':18}{'median us':>10}{'p10-p90':>16}{'faster':>8}{'KB':>9}"
        head += f"{'rel. diff.':>12}{'max diff.':>11}"
        rows = [f"input {self.input}, {threads}, {first.seconds.n} rounds of all rows in turn", head]
        rows += [_row(stage, first) for stage in self.stages]
        before = (None, *self.stages[:-1])
        rows += [f"- {s.name}: {_sentence(s, b)}" for s, b in zip(self.stages, before, strict=True)]
        return "\n".join(rows)


def _row(stage: Stage, first: Stage) -> str:
    low, high = stage.seconds.p10 * 1e6, stage.seconds.p90 * 1e6
    return (
        f"{stage.name:18}{stage.seconds.median * 1e6:>10.1f}{f'{low:.1f}-{high:.1f}':>16}"
        f"{first.seconds.median / stage.seconds.median:>7.2f}x{stage.bytes / 1e3:>9.1f}"
        f"{stage.relative_difference:>12.4f}{stage.max_difference:>11.4f}"
    )


def _sentence(stage: Stage, before: Stage | None) -> str:
    said = stage.done
    if before is not None:
        now, then = stage.seconds, before.seconds
        if now.p90 < then.p10:
            said += f"; {then.median / now.median:.1f} times as fast as the row above"
        elif now.p10 > then.p90:
            said += f"; takes {now.median / then.median:.1f} times as long as the row above"
            said += _SLOWER.get(stage.name, "")
        else:
            said += "; no clear difference in time to the row above (p10-p90 overlap)"
    if stage.setup_s:
        said += f"; compiling took {stage.setup_s:.1f} s, once"
    if stage.skipped:
        said += f"; left alone: {', '.join(stage.skipped)}"
    return said


_SLOWER = {
    "int8": ": rounding the activations costs more here than reading fewer bytes saves",
    "compiled": ": its own checks at every call cost more here than joined operations save",
    "cache, new input": ": an input never seen pays for looking it up and for keeping the output",
}


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
        recipe: what to do; see `ModuleRecipe`.
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
    result.report = ModuleReport(stages, _shapes(inputs), _threads())
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


def _shapes(inputs: tuple[torch.Tensor, ...]) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in inputs)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
