"""Artifacts of tiny models, and what an exported file is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hasten import _native
from hasten.core import Format, Recipe
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.weights.packed import PackedLinear, pack_model
from tiny_models import TINY, save_folder

MIXTURE: Mapping[str, Format] = {
    "layers.0.q": Format.of(4),
    "layers.0.k": Format.of(5),
    "layers.0.v": Format.of(8),
    "layers.0.o": Format.of(6),
    "layers.0.gate": Format.of(4, symmetric=False),
    "layers.0.up": Format.of(5, symmetric=False),
    "layers.0.down": Format.of(16),
    "layers.1.q": Format.of(4, 64),
}
"""Every width there is."""


def make(folder: Path, name: str, recipe: Recipe) -> Path:
    """An artifact of one of TINY."""
    source = open_model(save_folder(TINY[name], folder / "source"))
    return save(folder / f"{name}.hasten", pack_model(source, recipe), source, {})


def mixed(name: str = "w8", layers: Mapping[str, Format] = MIXTURE) -> Recipe:
    base = Recipe.parse(name)
    return Recipe("mixture", base.default, base.head, layers)


def packed(layout: Format, rows: int, cols: int, seed: int = 1) -> PackedLinear:
    values = np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)
    data = np.zeros(layout.bytes_of(rows, cols), np.uint8)
    stored = layout.native
    _native.pack(values.view(np.uint8).reshape(-1), "F32", rows, cols, *stored, data)
    return PackedLinear(layout, rows, cols, data)


def values_of(linear: PackedLinear) -> np.ndarray:
    layout = linear.layout
    stored = layout.native
    return _native.unpack(linear.data, linear.rows, linear.cols, *stored)
