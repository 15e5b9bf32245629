"""Every field of a ModelSpec is in range or refused, whatever file it came from; the decoder checks too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hasten import _native
from hasten.core import RopeScaling
from hasten.errors import ModelError
from hasten.models.families import checked
from hasten.models.rope import tables
from hasten.runtime.cpu import decoder_config
from specs import changed, spec

GOOD = spec(
    architecture="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, context_length=128, sliding_window=16, sliding_layers=(True, False),
)  # fmt: skip
NAN, INF = math.nan, math.inf
WRONG: dict[str, list[Any]] = {
    "architecture": ["gpt2", ""],
    "vocab_size": [0, -1, 1 << 23],
    "hidden_size": [0, 1 << 21],
    "intermediate_size": [0, -5],
    "num_heads": [0, 3, 5000],
    "num_kv_heads": [0, 3, -2],
    "head_dim": [0, 1, 7, 1 << 20],
    "context_length": [0, 1 << 40],
    "norm_eps": [-1e-6, 2.0, NAN, INF],
    "activation": ["relu", "gelu"],
    "norm_placement": ["middle"],
    "qk_norm": ["yes"],
    "rotary_dim": [0, 3, 16, -2],
    "rope_theta": [0.0, -1.0, NAN, INF, 1e300],
    "rope_local_theta": [0.0, -1.0, NAN, INF],
    "sliding_window": [0, -1, 1 << 31],
    "query_scale": [0.0, -1.0, NAN, INF, 1e300],
    "attention_softcap": [-1.0, 0.0, NAN, INF],
    "logit_softcap": [-1.0, 0.0, NAN, INF],
    "embed_scale": [0.0, -1.0, NAN, INF],
    "rope_scaling": [
        RopeScaling("nothing"),  # type: ignore[arg-type]
        RopeScaling("linear", factor=0.0),
        RopeScaling("linear", factor=NAN),
        RopeScaling("yarn", factor=2.0, original_context_length=0),
        RopeScaling("yarn", factor=2.0, beta_fast=0.0),
        RopeScaling("yarn", factor=2.0, beta_slow=-1.0),
        RopeScaling("yarn", factor=2.0, attention_factor=INF),
        RopeScaling("yarn", factor=INF),
        RopeScaling("llama3", factor=2.0, low_freq_factor=4.0),
        RopeScaling("llama3", factor=2.0, low_freq_factor=NAN),
        RopeScaling("longrope", short_factor=(1.0,) * 3, long_factor=(1.0,) * 4),
        RopeScaling("longrope", short_factor=(1.0,) * 4, long_factor=(0.0,) * 4),
        RopeScaling("longrope", short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_context_length=1),
        RopeScaling("longrope", short_factor=(1.0,) * 4, long_factor=(NAN,) * 4),
    ],
}


def test_a_sound_one_passes() -> None:
    assert checked(GOOD, "x") is GOOD
    capped = changed(GOOD, attention_softcap=50.0, logit_softcap=30.0, query_scale=0.1, sliding_window=4096)
    assert checked(capped, "x") is capped


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values])
def test_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        checked(changed(GOOD, **{field: value}), "config.json")


@pytest.mark.parametrize("count", [0, 1025])
def test_the_number_of_layers(count: int) -> None:
    with pytest.raises(ModelError, match="num_layers must be from 1 to 1024"):
        checked(replace(GOOD, blocks=GOOD.blocks[:1] * count), "config.json")


def test_what_passes_has_finite_frequencies() -> None:
    for theta in (1e-300, 1e-9, 1.0, 1e15):
        for factor in (1e-300, 1.0, 1e300):
            try:
                config = checked(
                    changed(GOOD, rope_theta=theta, rope_scaling=RopeScaling("linear", factor=factor)), "x"
                )
            except ModelError:
                continue
            assert np.isfinite(tables(config).global_inv_freq).all()


# The native decoder trusts nobody -------------------------------------------------------------------------

VALUES: list[Any] = [
    -(1 << 31), -1, 0, 3, 1025, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 70, 1.5, NAN, "x", None, [], {}, True,
]  # fmt: skip
LISTS: list[Any] = [[], [1], [1, 1, 1], [1.5] * 4, [1.0] * 400, ["x"], None, 5, [-1, 1 << 40]]


@pytest.mark.parametrize("field", list(decoder_config(GOOD)))
def test_no_configuration_crashes_the_decoder(field: str) -> None:
    """It is refused by an exception of Python, or a decoder of it can be made and asks for its weights."""
    good = decoder_config(GOOD)
    for value in VALUES + LISTS:
        try:
            decoder = _native.Decoder({**good, field: value}, 1, 2, False)
        except (ValueError, MemoryError):
            continue
        with pytest.raises(ValueError, match="missing"):
            decoder.check()


@pytest.mark.parametrize("pages", [0, -1, -(1 << 31), (1 << 31) - 1])
def test_pages_that_cannot_be(pages: int) -> None:
    config = {**decoder_config(GOOD), "layers": 1 << 14, "sliding": [0] * (1 << 14), "rope": [1] * (1 << 14)}
    with pytest.raises((ValueError, MemoryError)):
        _native.Decoder({**config, "kv_heads": 4, "head_dim": 1024}, 1, pages, False)


def test_vectors_and_matrices_of_other_shapes() -> None:
    decoder = _native.Decoder(decoder_config(GOOD), 1, 2, False)
    short = np.zeros(4, np.float32)
    names = ("q.bias", "down.bias", "attn_norm", "q_norm", "key_shift")
    for name in ("final_norm", *(f"layers.1.{part}" for part in names)):
        with pytest.raises(ValueError, match="must be"):
            decoder.set_vector(name, short)
    for bits, group in ((3, 32), (16, 0), (8, 0), (8, -32), (8, 48), (-8, 32)):
        with pytest.raises(ValueError):
            decoder.set_linear("layers.0.q", np.zeros(64, np.uint8), 32, 32, bits, group, True)
    for rows, cols in ((0, 32), (-1, -1), (1 << 30, 1 << 30)):
        with pytest.raises(ValueError):
            decoder.set_linear("layers.0.q", np.zeros(64, np.uint8), rows, cols, 8, 32, True)
