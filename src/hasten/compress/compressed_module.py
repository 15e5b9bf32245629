"""A torch module after its recipe, and the steps to it: run, compared with the first, and timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hasten.compress.memo_cache import MemoCache, MemoStats
from hasten.compress.module_recipe import ModuleRecipe, ModuleReport, Stage
from hasten.core import Stat
from hasten.errors import MachineError, ModelError, UsageError
from hasten.machine.probe import stat_of


class CompressedModule(nn.Module):
    """What `compress_module` gives back: takes the module's own arguments, records no gradients.

    `module` is the compressed module itself, `report` what was done to it and what that changed. Saving and
    copying keep both; compiled code and kept outputs are made again.
    """

    report: ModuleReport
    run: Callable[..., Any]  # the module, compiled if the recipe says so; past the cache, with gradients

    def __init__(self, module: nn.Module, recipe: ModuleRecipe) -> None:
        super().__init__()
        self.module = module
        self.recipe = recipe
        self.cache: MemoCache | None = None
        self.new_cache()
        self._compile()
        self.train(module.training)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The compressed module's output; from the cache where the same call was there before."""
        if self.cache is None:
            return self.run(*args, **kwargs)
        return self.cache.call(self.run, args, kwargs)

    def new_cache(self) -> None:
        """Begin with an empty cache and counts of 0."""
        if self.recipe.cache_mb:
            capacity = max(1, round(self.recipe.cache_mb * 1e6))
            self.cache = MemoCache(self.module, capacity, self.recipe.cache_policy)

    def cache_stats(self) -> MemoStats:
        """Hits, misses and the rest; all 0 where there is no cache."""
        return MemoStats() if self.cache is None else self.cache.stats()

    def _compile(self) -> None:
        """torch.compile works at the first call."""
        run: Callable[..., Any] = self.module
        if self.recipe.compile is not None:
            try:
                run = torch.compile(self.module, mode=self.recipe.compile)
            except RuntimeError as wrong:
                raise MachineError(
                    f"torch.compile does not work here: {wrong}", hint="leave compile out of the recipe"
                ) from wrong
        object.__setattr__(self, "run", run)  # not as a part: the state dict would hold everything twice

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("run", "cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cache = None
        self.new_cache()
        self._compile()


_SAMPLE_S = 5e-4  # a sample is as many calls as take this long; what disturbs clocks takes microseconds
_MOST_CALLS = 200
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Step:
    """A stage that was not measured yet."""

    name: str
    done: str
    run: Callable[[], Any]
    bytes: int
    skipped: tuple[str, ...] = ()
    setup_s: float = 0.0  # torch.compile: until the first output

    def outputs(self) -> list[torch.Tensor]:
        """Run once.

        Raises:
            ModelError: it failed, or there is no tensor among what came out.
        """
        try:
            found = list(_tensors(self.run()))
        except _FAILURES as wrong:
            said = _first_line(wrong)
            if self.name == "the module":
                hint = "pass calibration as the module takes it: module(*calibration) must work"
            else:
                hint = "leave this step out of the recipe"
            raise ModelError(
                f"{self.name}: does not run on the calibration input ({said})", hint=hint
            ) from wrong
        if not found:
            raise ModelError(
                "the module gives no tensor",
                hint="wrap it in one that returns tensors, a tuple or a dict of them",
            )
        return found


def call(run: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """A call of it with these inputs, without gradients."""

    def once() -> Any:
        with torch.no_grad():
            return run(*inputs)

    return once


def compiled(step: Step) -> Step:
    """The step after its first call, which compiles.

    Raises:
        MachineError: compiling failed.
    """
    begin = time.perf_counter()
    try:
        step.run()
    except _FAILURES as wrong:
        raise MachineError(
            f"torch.compile failed ({_first_line(wrong)})",
            hint="leave compile out, or install a C++ compiler (g++)",
        ) from wrong
    return replace(step, setup_s=time.perf_counter() - begin)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once."""
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cached(result: CompressedModule, inputs: tuple[torch.Tensor, ...], last: Step) -> list[Step]:
    """The step of keeping outputs, as two: an input that was never seen, and one that was.

    Raises:
        UsageError: an output cannot be kept, or the module gives another one every time.
    """
    cache = result.cache
    assert cache is not None, "the recipe has a cache"
    once, again = last.outputs(), last.outputs()
    if not all(_same_bits(one, two) for one, two in zip(once, again, strict=True)):
        raise UsageError(
            "the module gives two outputs for one input, so keeping one would change what it does",
            hint="leave the cache out (cache_mb=0)",
        )
    run = call(result, inputs)
    run(), run()
    if not cache.stats().hits:
        raise UsageError(
            f"the outputs cannot be kept: {_no_hit(result)}", hint="leave the cache out (cache_mb=0)"
        )

    def new() -> Any:
        cache.clear()
        return run()

    done = f"outputs kept by their input's bytes, {result.recipe.cache_policy}, {result.recipe.cache_mb:g} MB"
    seen = "found again and copied; the module itself does not run"
    return [Step("cache, new input", done, new, last.bytes), Step("cache, seen input", seen, run, last.bytes)]


def _no_hit(result: CompressedModule) -> str:
    stats = result.cache_stats()
    if stats.too_large:
        return f"one alone takes more than {result.recipe.cache_mb:g} MB"
    if stats.bypassed:
        return (
            "only CPU tensors, and tuples, lists and dicts of them as outputs, can be; no inference tensors"
        )
    return "the module writes to its own buffers at every call"


def measured(steps: Sequence[Step], rounds: int) -> tuple[Stage, ...]:
    """Run, compare and time all steps."""
    reference = steps[0].outputs()
    differences = [_difference(step.outputs(), reference, step.name) for step in steps]
    times = _times([step.run for step in steps], rounds)
    return tuple(
        Stage(step.name, step.done, seconds, step.bytes, *difference, step.skipped, step.setup_s)
        for step, seconds, difference in zip(steps, times, differences, strict=True)
    )


def _difference(
    outputs: list[torch.Tensor], reference: list[torch.Tensor], name: str
) -> tuple[float, float, float]:
    """Largest and mean absolute difference, and the root of squared differences over squared values."""
    if [t.shape for t in outputs] != [t.shape for t in reference]:
        raise ModelError(
            f"{name}: outputs have other shapes than before", hint="leave this step out of the recipe"
        )
    ours, theirs = (torch.cat([t.detach().double().flatten() for t in side]) for side in (outputs, reference))
    if not ours.numel():
        return 0.0, 0.0, 0.0
    apart = (ours - theirs).abs()
    size = float(theirs.norm())
    relative = float(apart.norm()) / size if size else float(apart.norm() > 0)
    return float(apart.max()), float(apart.mean()), relative


def _times(runs: Sequence[Callable[[], Any]], rounds: int) -> list[Stat]:
    """Seconds a call of each: all in turn in every round, beginning with another one each time."""
    calls = [_calls(run) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for step in range(len(runs)):
            place = (turn + step) % len(runs)
            samples[place].append(_seconds(runs[place], calls[place]))
    return [stat_of(sample) for sample in samples]


def _calls(run: Callable[[], Any]) -> int:
    _seconds(run, 2)  # warm
    return max(1, min(_MOST_CALLS, round(_SAMPLE_S / max(_seconds(run, 1), 1e-9))))


def _seconds(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _first_line(wrong: BaseException) -> str:
    return f"{type(wrong).__name__}: {wrong}".splitlines()[0]


def _tensors(output: Any) -> list[torch.Tensor]:
    """Tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _tensors(part)]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (one, two)))
