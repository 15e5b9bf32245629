"""Take weights out of a model: one entry for all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.compress.calibration import Calibration
from hasten.compress.prune.ffn import prune_ffn
from hasten.compress.prune.pruned import PartPruned, Pruned
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import Pruning

Observer = Callable[[int, int], None]
"""Told (layers done, layers in all)."""


def _silent(done: int, total: int) -> None:
    pass


def prune(
    source: Source, pruning: Pruning, calibration: Calibration | None, observer: Observer = _silent
) -> Pruned:
    """Take out what `pruning` says, and repair what is left.

    Args:
        source: the model.
        pruning: what goes and how much.
        calibration: the text that importance and repair are measured on; None where neither needs one.
        observer: told of every layer.

    Returns:
        The new model with what went where. Its changed matrices are bf16 in memory, all others the source's.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, no calibration where it is
            needed; before any work.
        ModelError: activations that are not finite; the layer is named.
    """
    method = _METHODS[pruning.kind]
    if calibration is None:
        raise UsageError(
            f"prune {pruning.kind} needs calibration text, got none",
            hint="give --calibration a text of some thousand words, or leave it out for the default text",
        )
    result, parts = method.run(source, pruning, calibration, observer)
    return _told(source, result, pruning, parts, method)


@dataclass(frozen=True)
class _Method:
    unit: str
    run: Callable[[Source, Pruning, Calibration, Observer], tuple[Source, list[PartPruned]]]
    gets_faster: bool
    because: str


def _ffn(
    source: Source, pruning: Pruning, calibration: Calibration, observer: Observer
) -> tuple[Source, list[PartPruned]]:
    return prune_ffn(source, pruning.amount, calibration, pruning.repair, observer)


_SMALLER = "a smaller dense model: fewer weights are read for every token"
_METHODS = {"ffn": _Method("FFN channels", _ffn, True, _SMALLER)}


def _told(
    source: Source, result: Source, pruning: Pruning, parts: list[PartPruned], method: _Method
) -> Pruned:
    before, after = (one.config.linear_weights for one in (source, result))
    return Pruned(
        result,
        pruning,
        tuple(parts),
        method.unit,
        before,
        after,
        2 * before,
        2 * after,
        method.gets_faster,
        method.because,
    )
