"""Take weights out of a model: one entry for all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.compress.calibration import Calibration
from hasten.compress.prune.ffn import kept_channels, prune_ffn
from hasten.compress.prune.heads import kept_heads, prune_heads
from hasten.compress.prune.layers import kept_layers, prune_layers
from hasten.compress.prune.pruned import PartPruned, Pruned
from hasten.compress.prune.single_weights import check_pattern, needs_text, prune_single_weights
from hasten.compress.prune.vocabulary import prune_vocabulary
from hasten.compress.prune.width import kept_width, prune_width
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import PruneKind, Pruning

Observer = Callable[[int, int], None]
"""Told (layers done, layers in all)."""

Parts = tuple[Source, list[PartPruned]]


def _silent(done: int, total: int) -> None:
    pass


def prune(
    source: Source, pruning: Pruning, calibration: Calibration | None, observer: Observer = _silent
) -> Pruned:
    """Take out what `pruning` says, and repair what is left.

    Args:
        source: the model.
        pruning: what goes and how much.
        calibration: the text that importance and repair are measured on; None where neither needs one
            (magnitude without repair).
        observer: told of every layer.

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
    method = _METHODS[pruning.kind]
    result, parts = method.run(source, pruning, calibration, observer)
    left = _weights_left(source, result, parts, method)
    before, after = source.config.linear_weights, result.config.linear_weights
    return Pruned(
        source=result,
        pruning=pruning,
        parts=tuple(parts),
        unit=method.unit,
        weights_before=before,
        weights_after=left,
        bytes_before=2 * before,
        bytes_after=2 * after,
        gets_faster=method.gets_faster,
        because=method.because,
        notes=_notes(source.config, pruning),
    )


def check(config: ModelSpec, pruning: Pruning, calibration: Calibration | None) -> None:
    """What can be said before any work.

    Raises:
        UsageError: nothing would be left or taken, a pattern does not divide, too little calibration text.
    """
    if pruning.kind in _COUNTS:
        _COUNTS[pruning.kind](config, pruning.amount)
    elif pruning.kind != "vocabulary":
        check_pattern(config, pruning)
        if not needs_text(pruning):
            return
    if calibration is None:
        raise UsageError(
            f"prune {pruning.kind} needs calibration text, got none",
            hint="give --calibration a text of some thousand words, or leave it out for the default text",
        )
    inputs = _widest_fit(config, pruning)
    if calibration.tokens < inputs:
        raise UsageError(
            f"prune {pruning.kind}: {calibration.tokens:,} tokens of calibration text are too few to fit the "
            f"weights of {inputs:,} inputs",
            hint=f"give {inputs:,} tokens or more, better four times as many, or prune with repair: false",
        )


def _widest_fit(config: ModelSpec, pruning: Pruning) -> int:
    """Most inputs of a matrix that is fitted; 1 where none is."""
    if pruning.kind == "vocabulary" or not (pruning.repair or pruning.kind == "sparsegpt"):
        return 1
    if pruning.kind == "heads":
        return config.num_heads * config.head_dim
    return max(cols for name, (_, cols) in config.linear_shapes().items() if name.startswith("layers."))


def _notes(config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
    if pruning.kind == "vocabulary" and pruning.repair:
        return (
            "not repaired: rows that stay are the original's, and no other token stands for one that went",
        )
    if pruning.kind == "layers" and pruning.repair and config.norm_placement != "pre":
        return ("not repaired: a norm behind the MLP would undo what `down` is given to add",)
    if pruning.kind == "width" and pruning.repair and config.tied_head:
        return ("the head is not repaired: it is tied to the embedding",)
    return ()


@dataclass(frozen=True)
class _Method:
    unit: str
    run: Callable[[Source, Pruning, Calibration | None, Observer], Parts]
    gets_faster: bool
    because: str


def _single(source: Source, pruning: Pruning, text: Calibration | None, observer: Observer) -> Parts:
    return prune_single_weights(source, pruning, text, observer)


def _vocabulary(source: Source, pruning: Pruning, text: Calibration | None, observer: Observer) -> Parts:
    assert text is not None
    return prune_vocabulary(source, pruning.amount, text)


_Structured = Callable[[Source, float, Calibration, bool, Observer], Parts]


def _structured(method: _Structured) -> Callable[[Source, Pruning, Calibration | None, Observer], Parts]:
    def run(source: Source, pruning: Pruning, text: Calibration | None, observer: Observer) -> Parts:
        assert text is not None
        return method(source, pruning.amount, text, pruning.repair, observer)

    return run


_COUNTS: dict[PruneKind, Callable[[ModelSpec, float], object]] = {
    "ffn": kept_channels,
    "heads": kept_heads,
    "layers": kept_layers,
    "width": kept_width,
}
_SMALLER = "a smaller dense model, so fewer weights are read for every token"
_HEADS = "smaller q, k, v and o; the KV cache shrinks where whole KV groups go"
_ZEROS = (
    "zeros are stored, read and multiplied like other weights: the engine's layouts are dense, and "
    "processors have no instruction for N:M"
)
_SINGLE = _Method("weights", _single, False, _ZEROS)
_METHODS: dict[PruneKind, _Method] = {
    "magnitude": _SINGLE,
    "wanda": _SINGLE,
    "sparsegpt": _SINGLE,
    "ffn": _Method("FFN channels", _structured(prune_ffn), True, _SMALLER),
    "heads": _Method("query heads", _structured(prune_heads), True, _HEADS),
    "layers": _Method("layers", _structured(prune_layers), True, _SMALLER),
    "width": _Method("hidden dimensions", _structured(prune_width), True, _SMALLER),
    "vocabulary": _Method("tokens", _vocabulary, True, "a smaller head is read for every token"),
}


def _weights_left(source: Source, result: Source, parts: list[PartPruned], method: _Method) -> int:
    if method is not _SINGLE:
        return result.config.linear_weights
    return source.config.linear_weights - sum(part.total - part.kept for part in parts)
