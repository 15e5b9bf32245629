"""GPTQ, AWQ's scales and packed integers, each against a plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.compress.quantise.gptq import DAMP, Factor, awq_scales, gptq, input_scales, lost, nearest
from hasten.compress.quantise.statistics import mean_gram
from hasten.compress.torch_model import made_tensor
from hasten.core import Format
from hasten.errors import ModelError
from hasten.weights.packed import integers, pack_integers, pack_linear
from specs import spec

LAYOUTS = [Format.of(b, g, s) for b in (8, 6, 5, 4) for g in (32, 64) for s in (True, False)]


def inputs(tokens: int = 400, cols: int = 128, seed: int = 0) -> torch.Tensor:
    """Correlated, some channels many times others: what activations are like."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, 24)) @ rng.standard_normal((24, cols))
    noise = 0.3 * rng.standard_normal((tokens, cols))
    size = np.exp(rng.standard_normal(cols))
    return torch.from_numpy(((mixed + noise) * size).astype(np.float32))


def matrix(rows: int = 40, cols: int = 128, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32))


def plain_gptq(weight: torch.Tensor, gram: torch.Tensor, layout: Format) -> np.ndarray:
    """Column by column in float64, the inverse of what is left solved anew for each."""
    start = nearest(weight, layout)
    cols = weight.shape[1]
    scales = np.repeat(start.scales.astype(np.float64), layout.group, 1)
    low = -float(1 << (layout.bits - 1)) * scales
    if start.minimums is not None:
        low = np.repeat(start.minimums.astype(np.float64), layout.group, 1)
    damped = gram.double().numpy() + DAMP * float(gram.diagonal().mean()) * np.eye(cols)
    left, u = weight.double().numpy().copy(), np.zeros(weight.shape, np.uint8)
    order = np.argsort(-gram.diagonal().numpy(), kind="stable")
    least = 1 if layout.bits == 8 and layout.symmetric else 0
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        level = np.round((left[:, column] - low[:, column]) / scales[:, column])
        u[:, column] = np.clip(level, least, (1 << layout.bits) - 1)
        error = left[:, column] - (u[:, column] * scales[:, column] + low[:, column])
        left[:, rest[1:]] -= np.outer(error, inverse[0, 1:] / inverse[0, 0])
    return u


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_finds_what_the_plain_twin_finds(layout: Format) -> None:
    weight, gram = matrix(), mean_gram(inputs())
    found = gptq(weight, Factor.of(gram), layout)
    wanted = plain_gptq(weight, gram, layout)
    assert (found.codes == wanted).mean() > 0.99  # float32: a value halfway may fall to the other side
    assert found.scales.dtype == np.float16
    ours = lost(gram, weight, torch.from_numpy(found.values()))
    theirs = lost(gram, weight, torch.from_numpy(nearest(weight, layout).values()))
    assert ours < (0.75 if layout.bits == 4 else 0.9) * theirs


def test_rows_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = matrix(rows=70), Factor.of(mean_gram(inputs()))
    whole = gptq(weight, factor, Format.of(4)).codes
    monkeypatch.setattr("hasten.compress.quantise.gptq._ROWS", 16)
    np.testing.assert_array_equal(gptq(weight, factor, Format.of(4)).codes, whole)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = inputs()
    x[:, 5:40] = 0
    gram = mean_gram(x)
    found = torch.from_numpy(gptq(matrix(), Factor.of(gram), Format.of(4)).values())
    assert torch.isfinite(found).all()
    assert lost(gram, matrix(), found) < lost(
        gram, matrix(), torch.from_numpy(nearest(matrix(), Format.of(4)).values())
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_integers_are_packed_as_they_are(layout: Format) -> None:
    found = gptq(matrix(rows=37), Factor.of(mean_gram(inputs())), layout)
    packed = pack_integers("w", found)
    assert packed.layout == layout and packed.relative_error == 0
    again = integers(packed)
    np.testing.assert_array_equal(again.codes, found.codes)
    np.testing.assert_array_equal(again.scales, found.scales)
    np.testing.assert_array_equal(again.values(), found.values())


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = matrix()
    weight[3, 7] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.q"):
        gptq(weight, Factor.of(mean_gram(inputs())), Format.of(4), "layers.1.q")


def test_awq_scales_leave_less_error_than_none() -> None:
    weights = {"q": matrix(), "k": matrix(16, seed=2), "v": matrix(16, seed=3)}
    gram = mean_gram(inputs())
    config = spec("llama", 10, 128, 96, 1, 4, 2, 8, 64)
    layouts = dict.fromkeys("qkv", Format.of(4))
    scales = awq_scales(weights, config, "qkv", gram, layouts)

    def error(by: torch.Tensor) -> float:
        found = {n: torch.from_numpy(nearest(w * by, Format.of(4)).values()) / by for n, w in weights.items()}
        return sum(lost(gram, w, found[n]) for n, w in weights.items())

    assert error(scales) < 0.9 * error(torch.ones(128))
    assert error(scales) == pytest.approx(min(error(input_scales(gram, p / 10)) for p in range(10)))
    assert (awq_scales(weights, config, "qkv", gram, {}) == 1).all()  # nothing becomes integers


def test_nearest_is_what_packing_stores() -> None:
    packed = pack_linear(made_tensor("w", (40, 128), matrix()), Format.of(4))
    np.testing.assert_array_equal(integers(packed).values(), nearest(matrix(), Format.of(4)).values())
