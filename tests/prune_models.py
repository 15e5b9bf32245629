"""What the tests of pruning share: a random calibration text, and how far a model is from another."""

from __future__ import annotations

import numpy as np

import tiny_models
from hasten.compress.calibration import Calibration
from hasten.compress.prune import PartPruned, pruner_of, silent
from hasten.core import EngineOptions, Recipe
from hasten.engine.model import load_packed
from hasten.models.source import Source
from hasten.recipe import Pruning
from hasten.weights.packed import pack_model

NAMES = sorted(tiny_models.TINY)


def text(sequences: int = 16, length: int = 24) -> Calibration:
    """Random ids; 24 tokens fit the shortest context of the tiny models."""
    ids = np.random.default_rng(0).integers(0, tiny_models.VOCAB - 1, (sequences, length))
    return Calibration("random", ids.astype(np.int32))


def taken(
    kind: str, source: Source, amount: float, calibration: Calibration | None, repair: bool = True
) -> tuple[Source, list[PartPruned]]:
    """One kind of pruning by itself, with as much text as the test gives."""
    return pruner_of(kind).run(source, Pruning(kind, amount, repair=repair), calibration, silent)


def hidden(source: Source, ids: np.ndarray) -> np.ndarray:
    """Final hidden states of the native engine in bf16, [T, E]."""
    model = load_packed(pack_model(source, Recipe.parse("bf16"), 1), source, EngineOptions(threads=1))
    return model.hidden(ids)


def distance(ours: Source, theirs: Source, ids: np.ndarray) -> float:
    """|ours - theirs| / |theirs| of the final hidden states."""
    ours_at, theirs_at = hidden(ours, ids), hidden(theirs, ids)
    return float(np.linalg.norm(ours_at - theirs_at) / np.linalg.norm(theirs_at))
