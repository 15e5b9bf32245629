"""What is done to a plain torch module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from hasten.core import CachePolicy
from hasten.errors import UsageError

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
        _one_of("prune_kind", self.prune_kind, get_args(PruneKind))
        _one_of("cache policy", self.cache_policy, get_args(CachePolicy))
        if self.compile is not None:
            _one_of("compile mode", self.compile, get_args(CompileMode))


def _one_of(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise UsageError(f"unknown {what} {got!r}", hint=f"use one of {', '.join(known)}")
