"""What was done to a torch module, and what each step changed: measured, not claimed."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import Stat


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
