"""Kernels that work value by value: quantise, bf16, norm, gate, rotation, argmax."""

from __future__ import annotations

import kernel_twins as twin
import numpy as np
import pytest
import twins

from hasten import _native

K = _native.kernels
SIZES = [1, 7, 16, 31, 32, 33, 100, 128, 257]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("cols", [1, 16, 31, 32, 33, 100, 128, 300])
def test_quantize_to_the_bit(isa: str, cols: int) -> None:
    x = twin.activations(40, cols)
    x[6] *= np.float32(1e30)
    q, scale, nsum, nsum16 = K.quantize(x)
    wanted_q, wanted_scale = twin.quantize(x)
    np.testing.assert_array_equal(q, wanted_q)
    np.testing.assert_array_equal(scale, wanted_scale)
    np.testing.assert_array_equal(nsum, -q.astype(np.int32).reshape(40, -1, 32).sum(-1))
    np.testing.assert_array_equal(nsum16, -q.astype(np.int32).reshape(40, -1, 16).sum(-1))
    assert np.abs(q).max() <= 127


def test_quantize_rounds_ties_to_even(isa: str) -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    assert K.quantize(x)[0][0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("n", SIZES)
def test_bf16_to_the_bit(isa: str, n: int) -> None:
    x = normal(n) * np.float32(10.0) ** np.random.default_rng(n).integers(-30, 30, n).astype(np.float32)
    x[0] = 0
    padded = -(-n // 32) * 32
    np.testing.assert_array_equal(K.to_bf16(x, padded), np.pad(twins.to_bf16(x), (0, padded - n)))


def test_bf16_edges(isa: str) -> None:
    """Ties to even, overflow to infinity, infinities and NaN kept."""
    x = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001], np.uint32)
    out = K.to_bf16(x.view(np.float32), 32)
    assert out[:5].tolist() == [0x3F80, 0x3F82, 0x7F80, 0x7F80, 0xFF80]
    assert np.isnan(twins.from_bf16(out[5:6])).all()


def test_every_int8_is_a_bf16(isa: str) -> None:
    x = np.random.default_rng(5).permutation(np.arange(-128, 128)).astype(np.int8)
    for n in (32, 96, 256):
        np.testing.assert_array_equal(twins.from_bf16(K.int8_to_bf16(x[:n].copy())), x[:n])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_rms_norm(isa: str, n: int, in_place: bool) -> None:
    for x in (normal(n), normal(n) * np.float32(1e-4), normal(n) * np.float32(1e4), np.zeros(n, np.float32)):
        weight = normal(n, seed=1)
        wide = x.astype(np.float64)
        wanted = wide / np.sqrt((wide**2).mean() + 1e-6) * weight
        np.testing.assert_allclose(K.rms_norm(x, weight, 1e-6, in_place), wanted, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("n", SIZES)
def test_gated(isa: str, kind: str, n: int) -> None:
    gate, up = normal(n) * 4, normal(n, seed=1)
    edges = [0.0, -0.0, 20, -20, 88, -88, 90, -90, 1e4, -1e4, 1e-30]
    gate[: len(edges)] = edges[:n]
    g = gate.astype(np.float64)
    arg = g if kind == "silu" else 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    with np.errstate(over="ignore"):
        wanted = g / (1 + np.exp(-arg)) * up
    # the argument's own float32 rounding shows in the exponential: relative error of up to |argument| * 2^-23
    tolerance = np.abs(wanted) * (2e-6 + np.minimum(np.abs(arg), 90) * 2.0**-22) + 1e-30
    assert (np.abs(K.gated(kind, gate, up) - wanted) <= tolerance).all()


@pytest.mark.parametrize("half", [1, 4, 8, 12, 16, 20, 32, 64])
@pytest.mark.parametrize("rest", [0, 6])
def test_rope(isa: str, half: int, rest: int) -> None:
    head, angle = normal(2 * half + rest), normal(half) * 10
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = head[:half].astype(np.float64), head[half : 2 * half].astype(np.float64)
    out = K.rope(head, cos, sin)
    np.testing.assert_allclose(out[:half], a * cos - b * sin, rtol=0, atol=1e-6)
    np.testing.assert_allclose(out[half : 2 * half], b * cos + a * sin, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out[2 * half :], head[2 * half :])


@pytest.mark.parametrize("n", [*SIZES, 5000])
def test_argmax(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        x = rng.integers(-5, 5, n).astype(np.float32)  # many equals: the lowest index counts
        assert K.argmax(x) == x.argmax()
    assert K.argmax(np.full(n, -np.inf, np.float32)) == 0
    x[-1] = np.inf
    assert K.argmax(x) == n - 1
    for at in {0, n // 2, n - 1}:
        broken = x.copy()
        broken[at] = np.nan
        assert K.argmax(broken) == -1
