"""What a user asks of compressing a plain torch module, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hasten.core import CachePolicy, Stat
from hasten.errors import UsageError
from hasten.recipe import one_of, option

PruneKind = Literal["channels", "weights"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class ModuleRecipe:
    """What happens to a `torch.nn.Module`: prune, quantise, compile, cache, in this order. Default: nothing.

    Raises:
        UsageError: a value that is out of range or not known.
    """

    bits: int | None = option(
        None, "8: int8 weights, activations rounded to int8 as they come; default: as they are"
    )
    prune: float = option(0.0, "fraction to prune, 0 up to but not 1")
    prune_kind: PruneKind = option(
        "channels", "channels: whole neurons, smaller dense layers; weights: zeros among the weights"
    )
    compile: CompileMode | None = option(None, "torch.compile mode: default, reduce-overhead or max-autotune")
    cache_mb: float = option(0.0, "memory for outputs of inputs seen, MB; 0: none")
    cache_policy: CachePolicy = option("lru", "which output goes first: lru, lfu, s3fifo or cost")

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
