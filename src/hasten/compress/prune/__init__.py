"""Weights taken out of a model: one entry for all kinds, and the protocol that every kind implements.

A kind is a file in this folder with a class of this protocol, and a line in `hasten.recipe.PRUNINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, Protocol

from hasten.compress.calibration import Calibration
from hasten.core import ModelSpec, as_json
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import PRUNINGS, Pruning

Observer = Callable[[int, int], None]
"""Told (layers done, layers in all)."""

MULTIPLE = 32
"""Widths are kept in such multiples: a group of int8 activations."""


def silent(done: int, total: int) -> None:
    """The observer that shows nothing."""


@dataclass(frozen=True)
class PartPruned:
    """One place that lost something.

    Errors are squared errors relative to the squares of what the original model gives there, over the
    calibration text and under a root; None where they were not measured.
    """

    name: str  # `layers.3`, or a tensor such as `layers.3.down`
    kept: int  # weights, channels, heads, layers, ...
    total: int
    error_before: float | None = None  # as cut
    error_after: float | None = None  # repaired; None without repair


@dataclass(frozen=True)
class Pruned:
    """A model with parts taken out.

    `gets_faster` says whether Hasten's engine runs it faster than the model it was made from, and `because`
    why.
    """

    source: Source
    pruning: Pruning
    parts: tuple[PartPruned, ...]
    unit: str  # what `kept` and `total` count
    weights_before: int  # of the linear layers read for one token, head included
    weights_after: int  # of them not zero
    bytes_before: int  # in bf16, zeros stored
    bytes_after: int
    gets_faster: bool
    because: str
    notes: tuple[str, ...] = field(default=())  # what was left undone, and why

    def lines(self) -> list[str]:
        """The report as text."""
        kept, total = (sum(getattr(part, name) for part in self.parts) for name in ("kept", "total"))
        found = [
            f"prune {self.pruning.kind}: {kept:,} of {total:,} {self.unit} kept",
            f"weights a token reads: {self.weights_after:,} of {self.weights_before:,} are not zero; "
            f"bf16 bytes {self.bytes_after:,} of {self.bytes_before:,}",
            ("faster here: " if self.gets_faster else "not faster here: ") + self.because,
        ]
        found += [_line(part) for part in self.parts]
        return [*found, *self.notes]

    def record(self) -> dict[str, Any]:
        """The report as JSON."""
        return {f.name: as_json(getattr(self, f.name)) for f in fields(self) if f.name != "source"}


def _line(part: PartPruned) -> str:
    text = f"{part.name}: {part.kept:,} of {part.total:,} kept"
    if part.error_before is not None:
        text += f", output error {part.error_before:.1%}"
    if part.error_after is not None:
        text += f", repaired {part.error_after:.1%}"
    return text


Parts = tuple[Source, list[PartPruned]]
"""The new model, and what went where."""


class Pruner(Protocol):
    """A kind of weights to take out."""

    unit: str  # what `PartPruned.kept` counts
    because: str = "a smaller dense model, so fewer weights are read for every token"
    """Why the engine runs what is left faster, or not."""
    always_fits: bool = False  # without repair, too

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        """The shape of what is left, as far as it is known before any work.

        Raises:
            UsageError: nothing would be left or taken, or a pattern does not divide.
        """

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        """Take it out; `after` was asked before.

        Args:
            text: what is measured on; None where nothing is.

        Raises:
            UsageError: as `after`.
            ModelError: activations that are not finite; the layer is named.
        """

    def inputs(self, config: ModelSpec) -> int:
        """Most inputs of a matrix that is fitted: so many tokens are needed. 1 where none is."""
        return max(cols for name, (_, cols) in config.linear_shapes().items() if name.startswith("layers."))

    def notes(self, config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
        """What is left undone, and why."""
        return ()


def pruner_of(kind: str) -> Pruner:
    """The implementation of a kind in `PRUNINGS`; its file is loaded now."""
    module, _, name = PRUNINGS[kind].place.partition(":")
    made: Pruner = getattr(import_module(module), name)()
    return made


def prune(
    source: Source, pruning: Pruning, calibration: Calibration | None, observer: Observer = silent
) -> Pruned:
    """Take out what `pruning` says, and repair what is left.

    Args:
        calibration: the text that importance and repair are measured on; None where neither needs one
            (magnitude without repair).

    Returns:
        The new model with what went where. Changed matrices are bf16 in memory (an embedding and a head of
        another width are made when they are read); rows that only moved are the source's own bytes.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, too little calibration text;
            before any work.
        ModelError: activations that are not finite; the layer is named.
        TokenizerError: `vocabulary`, and the model's tokenizer cannot be built.
    """
    check(source.config, pruning, calibration)
    pruner, is_sparse = pruner_of(pruning.kind), PRUNINGS[pruning.kind].takes == "weights"
    result, parts = pruner.run(source, pruning, calibration, observer)
    before, after = source.config.weights_stored, result.config.weights_stored
    gone = sum(part.total - part.kept for part in parts) if is_sparse else before - after
    return Pruned(
        source=result,
        pruning=pruning,
        parts=tuple(parts),
        unit=pruner.unit,
        weights_before=before,
        weights_after=before - gone,
        bytes_before=2 * before,
        bytes_after=2 * after,
        gets_faster=not is_sparse,
        because=pruner.because,
        notes=pruner.notes(source.config, pruning),
    )


def check(config: ModelSpec, pruning: Pruning, calibration: Calibration | None) -> ModelSpec:
    """What can be said before any work; the shape after it.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, too little calibration text.
    """
    pruner = pruner_of(pruning.kind)
    after = pruner.after(config, pruning)
    if PRUNINGS[pruning.kind].blind and not pruning.repair:
        return after
    if calibration is None:
        raise UsageError(
            f"prune {pruning.kind} needs calibration text, got none",
            hint="give --calibration a text of some thousand words, or leave it out for the default text",
        )
    inputs = pruner.inputs(config) if pruning.repair or pruner.always_fits else 1
    if calibration.tokens < inputs:
        raise UsageError(
            f"prune {pruning.kind}: {calibration.tokens:,} tokens of calibration text are too few to fit the "
            f"weights of {inputs:,} inputs",
            hint=f"give {inputs:,} tokens or more, better four times as many, or prune with repair: false",
        )
    return after


def kept_multiple(pruning: Pruning, noun: str, width: int) -> int:
    """What is left of `width` without the fraction that goes, as a multiple of 32.

    Raises:
        UsageError: nothing is left, or nothing goes.
    """
    kind, amount = pruning.kind, pruning.amount
    kept = MULTIPLE * round((1 - amount) * width / MULTIPLE)
    if 0 < kept < width:
        return kept
    what = f"leaves no {noun}" if kept <= 0 else f"takes no {noun} out"
    most = MULTIPLE * ((width - 1) // MULTIPLE)
    if most == 0:
        raise UsageError(
            f"prune {kind}: a model with {width} {noun}s has none to spare; they are kept in multiples "
            f"of {MULTIPLE}",
            hint="prune layers instead: kind: layers",
        )
    raise UsageError(
        f"prune {kind}: amount {amount:g} of {width} {noun}s {what}; they are kept in multiples "
        f"of {MULTIPLE}",
        hint=f"use an amount between {1 - most / width:.3f} and {1 - MULTIPLE / width:.3f}",
    )
