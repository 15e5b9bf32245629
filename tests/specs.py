"""Specs for tests from one flat list of figures, and with some of them changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hasten.core import ModelSpec
from hasten.models.rope import rotations
from hasten.weights.plan import FlatConfig


def spec(*args: Any, biases: tuple[str, ...] = (), **values: Any) -> ModelSpec:
    """A dense decoder; the names are those of `FlatConfig`."""
    return FlatConfig(*args, **values).spec(biases)


def changed(model: ModelSpec, **values: Any) -> ModelSpec:
    """The same decoder with other figures, by the names of `FlatConfig` and `biases`."""
    biases = values.pop("biases", model.blocks[0].biases)
    known = flat_of(model)
    if values.get("num_layers", len(model.blocks)) != len(model.blocks):
        known = replace(known, rope_layers=(), sliding_layers=())
    return replace(known, **values).spec(biases)


def flat_of(model: ModelSpec) -> FlatConfig:
    """The record of before there were blocks: a dense decoder's, alike in the rest."""
    mixer, ways, norms = model.blocks[0].mixer, model.blocks[0].feed_forward, model.blocks[0].norms
    rotary, local = rotations(model)
    rotates = tuple(block.mixer.rotary is not None for block in model.blocks)
    windows = tuple(block.mixer.window for block in model.blocks)
    return FlatConfig(
        model.architecture, model.vocab, model.width, ways.width, len(model.blocks),
        mixer.heads, mixer.kv_heads, mixer.head_dim, model.context, model.final_norm.eps,
        ways.activation, norms.placement, mixer.qk_norm, None if rotary.dim == mixer.head_dim else rotary.dim,
        rotary.theta, rotary.scaling, None if local is None else local.theta, () if all(rotates) else rotates,
        next((window for window in windows if window is not None), None),
        () if set(windows) == {None} else tuple(window is not None for window in windows),
        mixer.scale, mixer.softcap, model.head.softcap, model.embedding.scale, model.head.tied,
        model.bos_token_id, model.eos_token_ids,
    )  # fmt: skip
