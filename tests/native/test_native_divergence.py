"""KL, NLL and top-1 agreement against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hasten import _native


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def definition(ref: np.ndarray, cand: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    p, q = log_softmax(ref), log_softmax(cand)
    with np.errstate(invalid="ignore"):
        kl = np.where(p == -np.inf, 0, np.exp(p) * (p - q)).sum(-1)
    at = np.arange(len(targets))
    return kl, -p[at, targets], -q[at, targets], ref.argmax(-1) == cand.argmax(-1)


def pair(rows: int, vocab: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ref = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    cand = (ref + rng.standard_normal((rows, vocab)) * noise).astype(np.float32)
    return ref, cand, rng.integers(0, vocab, rows).astype(np.int32)


@pytest.mark.parametrize("vocab", [1, 3, 8, 127, 129, 1000, 32003])
@pytest.mark.parametrize("noise", [0.01, 0.3, 5.0])
def test_equals_the_definition(vocab: int, noise: float) -> None:
    ref, cand, targets = pair(13, vocab, noise, seed=vocab)
    kl, nll_ref, nll_cand, agree = _native.divergence(ref, cand, targets)
    wanted = definition(ref, cand, targets)
    np.testing.assert_allclose(kl, wanted[0], rtol=1e-5, atol=3e-7)
    np.testing.assert_allclose(nll_ref, wanted[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nll_cand, wanted[2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(agree, wanted[3])
    assert agree.dtype == np.bool_


def test_equal_rows_diverge_by_nothing() -> None:
    ref, _, targets = pair(4, 5000, 0.0)
    kl, nll_ref, nll_cand, agree = _native.divergence(ref, ref, targets)
    assert (kl == 0).all()
    np.testing.assert_array_equal(nll_ref, nll_cand)
    assert agree.all()


@pytest.mark.parametrize("shift", [1e4, -1e4, 80.0])
def test_a_constant_changes_nothing(shift: float) -> None:
    ref, cand, targets = pair(3, 777, 0.1)
    shifted = (cand + np.float32(shift)).astype(np.float32)
    kl, _, nll, _ = _native.divergence(ref, shifted, targets)
    wanted = definition(ref, shifted, targets)
    np.testing.assert_allclose(kl, wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nll, wanted[2], rtol=1e-6, atol=1e-6)


def test_very_peaked_and_flat_rows() -> None:
    ref = np.zeros((2, 300), np.float32)
    ref[0, 5] = 200
    cand = ref[::-1].copy()
    targets = np.array([5, 6], np.int32)
    kl, nll_ref, nll_cand, agree = _native.divergence(ref, cand, targets)
    wanted = definition(ref, cand, targets)
    for got, want in zip((kl, nll_ref, nll_cand), wanted[:3], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(agree, [False, False])


def test_minus_infinity() -> None:
    ref, cand, targets = pair(2, 100, 0.2)
    ref[:, 30] = -np.inf
    targets[:] = 4
    kl, nll_ref, *_ = _native.divergence(ref, cand, targets)
    wanted = definition(ref, cand, targets)
    np.testing.assert_allclose(kl, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(nll_ref, wanted[1], rtol=1e-6)
    assert np.isinf(_native.divergence(cand, ref, targets)[0]).all()  # what ref excludes cannot happen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_what_is_not_finite_shows(bad: float, place: int) -> None:
    ref, cand, targets = pair(3, 100, 0.2)
    cand[1, place] = bad
    for a, b in ((ref, cand), (cand, ref)):
        kl, nll_ref, nll_cand, _ = _native.divergence(a, b, targets)
        assert np.isnan([kl[1], nll_ref[1], nll_cand[1]]).all()
        assert np.isfinite(kl[[0, 2]]).all()


def test_threads_change_nothing() -> None:
    ref, cand, targets = pair(50, 400, 0.2)
    one = _native.divergence(ref, cand, targets, threads=1)
    four = _native.divergence(ref, cand, targets, threads=4)
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sizes_are_checked() -> None:
    ref, cand, targets = pair(3, 10, 0.1)
    with pytest.raises(ValueError, match="same shape"):
        _native.divergence(ref, np.ascontiguousarray(cand[:, :9]), targets)
    with pytest.raises(ValueError, match="one entry"):
        _native.divergence(ref, cand, targets[:2])
    for token in (-1, 10):
        with pytest.raises(ValueError, match=f"target {token}"):
            _native.divergence(ref, cand, np.array([0, token, 0], np.int32))
