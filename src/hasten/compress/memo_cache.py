"""Outputs of a torch module by its inputs' exact bytes, as long as the module is still the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten import _native
from hasten.cache.policy import new_policy
from hasten.core import CachePolicy
from hasten.errors import UsageError


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
        tensors = _tensors(parts)
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
        tensors = _tensors(parts)
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


def _tensors(parts: list[nn.Module]) -> list[torch.Tensor]:
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
