"""Sampling against its NumPy twin and against the distribution it must have."""

from __future__ import annotations

import numpy as np
import pytest
import sampler_twin as twin
from sampler_twin import rows

from hasten.errors import HastenError
from hasten.runtime.sampling import SamplingOptions
from one_each import one_each


def sample(
    logits: np.ndarray,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    logits = np.ascontiguousarray(np.atleast_2d(np.asarray(logits, np.float32)))
    if positions is None:
        positions = np.arange(len(logits), dtype=np.int64)
    options = SamplingOptions(temperature, top_k, top_p, min_p, seed)
    return np.array(one_each(logits, options, positions.tolist()), np.int32)


def repeated(logits: list[float] | np.ndarray, times: int) -> np.ndarray:
    return np.tile(np.asarray(logits, np.float32), (times, 1))


def test_twin_knows_philox() -> None:
    """The known answers that Random123 publishes."""
    assert twin.philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert twin.philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 1000, 5003])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 300, "temperature": 3.0},
        {"top_p": 0.9},
        {"top_p": 0.99, "temperature": 4.0},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
        {"top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_equals_the_twin(vocab: int, options: dict[str, float]) -> None:
    logits = rows(40, vocab, seed=vocab)
    seed = 2**63 + 12345
    positions = np.arange(40, dtype=np.int64) + 2**33
    got = sample(logits, seed=seed, positions=positions, **options)
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    twins = [
        twin.sample_row(row, **wanted, seed=seed, position=int(p))
        for row, p in zip(logits, positions, strict=True)
    ]
    np.testing.assert_array_equal(got, twins)


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.08}], ids=str)
def test_distribution(options: dict[str, float]) -> None:
    """Chi-square over 20,000 draws; 99.99 % of right samplers pass, and the seed is fixed."""
    logits = np.random.default_rng(4).standard_normal(12).astype(np.float32)
    wanted = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    weight = twin.kept(logits, **wanted)
    expected = 20_000 * weight / weight.sum()
    counts = np.bincount(sample(repeated(logits, 20_000), **wanted, seed=9), minlength=12)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 8


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.full((1, 1003), -2.0, np.float32)
    logits[0, [101, 502, 1002]] = 3.5
    assert sample(logits, temperature=0.0)[0] == 101
    assert sample(np.zeros((1, 77)), temperature=0.0)[0] == 0


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30}], ids=str
)
def test_cuts_down_to_one(options: dict[str, float]) -> None:
    logits = rows(64, 999, seed=1)
    np.testing.assert_array_equal(sample(logits, **options), logits.argmax(1))


def test_all_equal() -> None:
    tokens = sample(np.zeros((4000, 16)))
    assert set(tokens) == set(range(16))
    assert set(sample(np.zeros((4000, 16)), top_k=5)) == set(range(5))
    assert set(sample(np.zeros((4000, 16)), top_p=0.25)) == set(range(4))
    assert set(sample(np.zeros((4000, 16)), min_p=1.0)) == set(range(16))


def test_minus_infinity_is_never_drawn() -> None:
    logits = np.full(500, -np.inf, np.float32)
    logits[[3, 77, 499]] = [0.0, 1.0, 0.5]
    for options in ({}, {"top_k": 10}, {"top_p": 0.999}, {"min_p": 1e-6}, {"temperature": 100.0}):
        assert set(sample(repeated(logits, 300), **options)) == {3, 77, 499}


def test_plus_infinity_is_certain() -> None:
    logits = rows(1, 50)
    logits[0, 17] = np.inf
    assert sample(logits)[0] == 17


def test_what_else_is_in_the_batch_changes_nothing() -> None:
    logits = rows(30, 800, seed=3)
    positions = np.arange(100, 130, dtype=np.int64)
    together = sample(logits, top_p=0.9, seed=5, positions=positions)
    alone = [sample(logits[i], top_p=0.9, seed=5, positions=positions[i : i + 1])[0] for i in range(30)]
    np.testing.assert_array_equal(together, alone)


def test_seed_and_position_both_count() -> None:
    flat = np.zeros((200, 1000))
    here = np.full(200, 7, np.int64)
    assert len(set(sample(flat, positions=here))) == 1
    assert len(set(sample(flat))) > 150
    assert not np.array_equal(sample(flat, seed=1), sample(flat, seed=2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, -np.nan])
def test_nan_is_an_error(temperature: float, bad: float) -> None:
    logits = rows(3, 1001)
    logits[1, 1000] = bad
    with pytest.raises(HastenError, match="no numbers at position 1"):
        sample(logits, temperature=temperature)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(HastenError, match="position 0"):
        sample(np.full((1, 9), -np.inf))


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="a sequence"):
        sample(rows(3, 10), positions=np.zeros(2, np.int64))
