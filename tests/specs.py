"""Specs for tests from one flat list of figures, and with some of them changed."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hasten.core import ModelSpec
from hasten.weights.plan import FlatConfig


def spec(*args: Any, biases: tuple[str, ...] = (), **values: Any) -> ModelSpec:
    """A dense decoder; the names are those of `FlatConfig`."""
    return FlatConfig(*args, **values).spec(biases)


def changed(model: ModelSpec, **values: Any) -> ModelSpec:
    """The same decoder with other figures, by the names of `FlatConfig` and `biases`."""
    biases = values.pop("biases", model.biases)
    known = flat_of(model)
    if values.get("num_layers", len(model.blocks)) != len(model.blocks):
        known = replace(known, rope_layers=(), sliding_layers=())
    return replace(known, **values).spec(biases)


def flat_of(model: ModelSpec) -> FlatConfig:
    """The record of before there were blocks."""
    return FlatConfig(**{one.name: getattr(model, one.name) for one in fields(FlatConfig)})
