"""Key shifts: what they are, and that attention cannot see them."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.core import RopeScaling
from hasten.models.rope import key_shifts
from specs import changed, spec

CONFIG = spec(
    architecture="qwen2", vocab_size=11, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, context_length=100, rope_theta=1e6,
)  # fmt: skip
BIAS = np.arange(1, 33, dtype=np.float32)
VECTORS = {"layers.0.k.bias": BIAS, "layers.1.k.bias": -BIAS, "layers.0.attn_norm": np.ones(64, np.float32)}


def test_only_slow_dimensions_are_shifted_and_by_their_bias():
    shifts = key_shifts(CONFIG, VECTORS)
    slow = 1e6 ** (-np.arange(0, 16, 2) / 16) * 100 < 1
    assert slow.sum() == 5 and not slow[0]
    for name, sign in (("layers.0.key_shift", 1), ("layers.1.key_shift", -1)):
        assert shifts[name].dtype == np.float32
        np.testing.assert_array_equal(shifts[name], sign * BIAS * np.tile(slow, 4))
    assert len(shifts) == 2


def test_what_is_not_rotated_is_shifted_whole():
    unrotated = key_shifts(changed(CONFIG, rope_layers=(False, True)), VECTORS)
    np.testing.assert_array_equal(unrotated["layers.0.key_shift"], BIAS)
    partial = key_shifts(changed(CONFIG, rotary_dim=4), VECTORS)["layers.0.key_shift"]
    np.testing.assert_array_equal(partial.reshape(2, 16)[:, 4:], BIAS.reshape(2, 16)[:, 4:])
    assert (partial.reshape(2, 16)[:, 0] == 0).all()


def test_sliding_layers_go_by_their_own_frequencies():
    config = changed(
        CONFIG, rope_local_theta=1.0001, sliding_window=4, sliding_layers=(True, False),
        rope_scaling=RopeScaling("linear", 1000.0),
    )  # fmt: skip
    shifts = key_shifts(config, VECTORS)
    assert not shifts["layers.0.key_shift"].any()
    assert shifts["layers.1.key_shift"].all()


@pytest.mark.parametrize("changes", [{"qk_norm": "head"}, {"attention_softcap": 30.0}])
def test_no_shift_where_attention_would_see_it(changes):
    assert key_shifts(changed(CONFIG, **changes), VECTORS) == {}


def test_no_shift_without_biases():
    assert key_shifts(CONFIG, {"layers.0.attn_norm": np.ones(64, np.float32)}) == {}
