"""Rotary frequencies against transformers' own, and against what the papers say of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hasten.core import ModelSpec, RopeScaling
from hasten.errors import ModelError
from hasten.models import rope
from hasten.models.families import hf_spec
from specs import changed, spec
from tiny_models import TINY


def config(**changes) -> ModelSpec:
    base = spec(
        architecture="llama", vocab_size=11, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, context_length=256,
    )  # fmt: skip
    return changed(base, **changes)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("length", [None, 10, 200])
def test_tables_are_those_of_transformers(name, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = TINY[name].config()
    ours = hf_spec(json.loads(theirs.to_json_string()), name)
    nested = theirs.model_type == "gemma3_text"
    layer_type = {"layer_type": "full_attention"} if nested else {}
    parameters = theirs.rope_parameters["full_attention"] if nested else theirs.rope_parameters
    rotary, _ = rope.rotations(ours)
    frequencies, scale = rope.frequencies(rotary, ours.context, length)
    if parameters["rope_type"] == "default":
        dim = rotary.dim
        wanted, wanted_scale = parameters["rope_theta"] ** -(np.arange(0, dim, 2) / dim), 1.0
    else:
        make = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        wanted, wanted_scale = make(theirs, seq_len=length, **layer_type)
    np.testing.assert_allclose(frequencies, np.asarray(wanted, dtype=np.float64), rtol=3e-6)
    assert scale == pytest.approx(wanted_scale, rel=1e-6)


def test_longrope_has_a_second_set_past_the_threshold():
    scaling = RopeScaling(
        "longrope", original_context_length=64, short_factor=(1.0,) * 8, long_factor=(4.0,) * 8
    )
    tables = rope.tables(config(rope_scaling=scaling))
    assert tables.long_threshold == 64
    np.testing.assert_allclose(tables.long_inv_freq * 4, tables.global_inv_freq)
    assert tables.global_scale == tables.long_scale == pytest.approx(np.sqrt(1 + np.log(4) / np.log(64)))


def test_equal_longrope_factors_need_no_second_set():
    scaling = RopeScaling(
        "longrope", 1.0, 256, attention_factor=1.0, short_factor=(2.0,) * 8, long_factor=(2.0,) * 8
    )
    tables = rope.tables(config(rope_scaling=scaling))
    assert tables.long_inv_freq is None and tables.long_threshold is None and tables.global_scale == 1.0


def test_sliding_layers_have_their_own_theta_and_are_never_scaled():
    tables = rope.tables(
        config(
            rope_local_theta=100.0,
            rope_scaling=RopeScaling("linear", 8.0),
            sliding_window=4,
            sliding_layers=(True, False),
        )
    )
    np.testing.assert_allclose(tables.local_inv_freq, 100.0 ** -(np.arange(0, 16, 2) / 16))
    np.testing.assert_allclose(tables.global_inv_freq * 8, 10_000.0 ** -(np.arange(0, 16, 2) / 16))


def test_dynamic_is_plain_within_the_context_and_slower_past_it():
    c = config(rope_scaling=RopeScaling("dynamic", 4.0))
    plain = rope.tables(config()).global_inv_freq
    np.testing.assert_array_equal(rope.tables(c).global_inv_freq, plain)
    np.testing.assert_array_equal(rope.tables(c, 256).global_inv_freq, plain)
    grown = rope.tables(c, 257).global_inv_freq
    assert grown[0] == plain[0] and (grown[1:] < plain[1:]).all()


def test_partial_rotation_has_fewer_frequencies():
    assert rope.tables(config(rotary_dim=12)).global_inv_freq.shape == (6,)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_dim": 7},
        {"rotary_dim": 0},
        {"rope_theta": 0.0},
        {"rope_scaling": RopeScaling("linear", 0.0)},
        {"rope_scaling": RopeScaling("longrope", short_factor=(1.0,) * 7, long_factor=(1.0,) * 8)},
        {"rope_scaling": RopeScaling("longrope", short_factor=(1.0,) * 8, long_factor=(0.0,) * 8)},
        {"rope_scaling": RopeScaling("llama3", 8.0, low_freq_factor=4.0)},
        {"rope_scaling": RopeScaling("dynamic", 2.0), "rotary_dim": 2},
        {"rope_scaling": RopeScaling("spiral")},  # type: ignore[arg-type]
    ],
)
def test_parameters_that_make_no_sense_are_refused(changes):
    with pytest.raises(ModelError):
        rope.tables(config(**changes))
