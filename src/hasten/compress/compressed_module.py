"""A torch module after its recipe, the outputs it keeps, and the steps to it: run, compared with the first,
and timed in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten import _native
from hasten.cache.policy import new_policy
from hasten.compress.module_recipe import ModuleRecipe, ModuleReport, Stage
from hasten.core import CachePolicy, Stat
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


@dataclass(frozen=True)
class ModuleState:
    """What a module's output depends on, by identity and version, not by value.

    It holds on to the tensors' storage and to the parts, so that neither an address nor an id can come back
    for something else while it is compared with. Comparing costs a walk over the module.
    """

    parts: tuple[nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]  # aliases: they share storage and version counter with the module's
    marks: tuple[tuple[object, ...], ...]  # of each tensor: see `_mark`

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState | None:
        """The state now; None in training mode (of any part) or where tensors have no version counter."""
        parts = _parts(module)
        tensors = _state_tensors(parts)
        if any(part.training for part in parts) or any(tensor.is_inference() for tensor in tensors):
            return None
        marks = tuple(_mark(tensor) for tensor in tensors)
        return cls(tuple(parts), tuple(tensor.detach() for tensor in tensors), marks)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is in evaluation mode and nothing was replaced or written to since."""
        parts = _parts(module)
        if len(parts) != len(self.parts) or any(part.training for part in parts):
            return False
        if any(mine is not theirs for mine, theirs in zip(self.parts, parts, strict=True)):
            return False
        tensors = _state_tensors(parts)
        return len(tensors) == len(self.marks) and all(
            not tensor.is_inference() and _mark(tensor) == mark
            for tensor, mark in zip(tensors, self.marks, strict=True)
        )


def _parts(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once, in order of first meeting."""
    found, seen = [module], {module}
    for part in found:  # grows while it is walked
        for child in part._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _state_tensors(parts: list[nn.Module]) -> list[torch.Tensor]:
    tensors = []
    for part in parts:
        for held in (part._parameters, part._buffers):
            tensors += [tensor for tensor in held.values() if tensor is not None]
    return tensors


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


_ENTRY_BYTES = 512  # a guess at what Python takes for an entry beside its tensors
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class MemoStats:
    """Counts since the cache was made; `entries` and `bytes` are what it holds now."""

    hits: int = 0
    misses: int = 0
    bypassed: int = 0  # training mode, gradients recorded, autocast, or values it has no bytes of
    evicted: int = 0  # entries that the policy let go
    dropped: int = 0  # entries that a changed parameter or buffer made wrong
    too_large: int = 0  # outputs that alone would take more than the capacity
    entries: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Entry:
    content: bytes  # what the call was: dtypes, shapes, strides, plain values, and the tensors' bytes
    output: Any
    bytes: int


class MemoCache:
    """Gives the output of an earlier call with the same inputs of a module that has not changed since.

    Two calls are the same if every tensor has the same dtype, shape, strides and bytes: NaNs are equal if
    their bits are, 0.0 and -0.0 differ, and other strides are another input because kernels may add in
    another order. An entry is found by a hash and then compared whole, so a collision is a miss. Outputs are
    copied in and out: changing one in place changes no other.

    Consistency: `ModuleState` is compared before every lookup; when parameters or buffers changed, all
    entries go. It does not see what changes no counter: writing through `parameter.data` in place or through
    NumPy, Python attributes, hooks. Call `clear()` after those. A module that draws random numbers must not
    be cached. Several threads may call: look-ups and insertions are under a lock, the module runs outside it.
    """

    def __init__(self, module: nn.Module, capacity: int, policy: CachePolicy = "lru") -> None:
        """A cache of `capacity` bytes, inputs counted too, for `module`.

        Raises:
            UsageError: a capacity below 1, or no policy of that name.
        """
        if capacity < 1:
            raise UsageError(
                f"a cache needs at least 1 byte, got {capacity}", hint="use some megabytes, or no cache"
            )
        self._module, self._capacity = module, capacity
        self._policy_name = policy
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("hits", "misses", "bypassed", "evicted", "dropped", "too_large"), 0)
        self._state: ModuleState | None = None
        self._empty()
        self._policy = new_policy(policy, capacity)

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`run(*args, **kwargs)`, or the kept output of an equal call; `run` does what the module does."""
        usual = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        content = _content(args, kwargs) if usual else None
        state = None if content is None else self._now()
        if content is None or state is None:
            self._count("bypassed")
            return run(*args, **kwargs)
        key = _digest(content)
        found = self._find(key, content)
        if found is not None:
            return _copy(found.output)
        begin = time.perf_counter()
        output = run(*args, **kwargs)
        seconds = time.perf_counter() - begin
        size = _bytes(output)
        if size is None:  # an output of a kind that cannot be copied for sure
            self._count("bypassed")
        else:
            size += len(content) + _ENTRY_BYTES
            self._keep(key, _Entry(content, _copy(output), size), state, seconds)
        return output

    def clear(self) -> None:
        """Forget all outputs. Counts stay."""
        with self._lock:
            self._empty()

    def stats(self) -> MemoStats:
        """Counts, as of now."""
        with self._lock:
            return MemoStats(**self._counts, entries=len(self._entries), bytes=self._used)

    def _empty(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._used = 0
        self._policy = new_policy(self._policy_name, self._capacity)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _now(self) -> ModuleState | None:
        """The state, entries dropped if it is another than before; None where nothing is kept."""
        with self._lock:
            if self._state is None or not self._state.holds(self._module):
                state = ModuleState.of(self._module)
                if state is None:  # what is kept waits for the end of training, and is compared then
                    return None
                self._counts["dropped"] += len(self._entries)
                self._empty()
                self._state = state
            return self._state

    def _find(self, key: bytes, content: bytes) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.content != content:
                self._counts["misses"] += 1
                return None
            self._counts["hits"] += 1
            self._policy.touch(key)
            return entry

    def _keep(self, key: bytes, entry: _Entry, state: ModuleState, seconds: float) -> None:
        """Keep an output if the module is still what it was when the call began."""
        with self._lock:
            if self._state is not state or not state.holds(self._module) or key in self._entries:
                return
            if entry.bytes > self._capacity:
                self._counts["too_large"] += 1
                return
            while self._used + entry.bytes > self._capacity:
                victim = self._policy.victim(lambda _: True)
                assert victim is not None, "what is used belongs to entries"
                self._used -= self._entries.pop(victim).bytes
                self._counts["evicted"] += 1
            self._entries[key] = entry
            self._used += entry.bytes
            self._policy.insert(key, cost=seconds, bytes=entry.bytes)


def _digest(content: bytes) -> bytes:
    """XXH64 of every 4 MB: quick, and what it confuses the comparison tells apart."""
    sums = _native.checksums(np.frombuffer(content, np.uint8), 1 << 22, 1)
    return b"".join(value.to_bytes(8, "little") for value in sums)


def _content(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
    """All that makes a call what it is, or None if a value is neither a plain CPU tensor nor a plain value.

    Threads and precision are among it: they change how sums are rounded.
    """
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    what: list[Any] = [
        len(args),
        sorted(kwargs),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    ]
    raw: list[bytes] = []
    for value in values:
        if _is_plain(value):
            what.append((str(value.dtype), tuple(value.shape), value.stride()))
            raw.append(_raw(value))
        elif type(value) in _PLAIN:
            what.append(value)
        else:
            return None
    return b"".join((repr(what).encode(), b"\0", *raw))


def _is_plain(value: Any) -> bool:
    kind = type(value) is torch.Tensor or type(value) is nn.Parameter
    return kind and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _bytes(output: Any) -> int | None:
    """Bytes of an output's tensors, or None where it holds something else."""
    if _is_plain(output):
        return int(output.numel() * output.element_size())
    if type(output) in (tuple, list, dict):
        parts = [_bytes(part) for part in (output.values() if type(output) is dict else output)]
        return None if None in parts else sum(part for part in parts if part is not None)
    return 0 if type(output) in _PLAIN else None


def _copy(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {name: _copy(part) for name, part in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(_copy(part) for part in output)
    return output
