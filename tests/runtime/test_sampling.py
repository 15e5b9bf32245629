"""Sampling options and the choice of tokens as the engine sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.errors import HastenError, UsageError
from hasten.runtime.sampling import SamplingOptions
from one_each import one_each

BAD = [
    *({"temperature": value} for value in (-0.1, float("nan"), float("inf"), -float("inf"))),
    *({"top_k": value} for value in (-1, -(2**40))),
    *({"top_p": value} for value in (0.0, -0.5, 1.0001, float("nan"))),
    *({"min_p": value} for value in (-0.1, 1.1, float("nan"))),
    *({"seed": value} for value in (-1, 2**64)),
]


def logits(rows: int, vocab: int = 500) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, vocab)).astype(np.float32) * 3


def draw(values: np.ndarray, first: int = 0, **options: Any) -> list[int]:
    return one_each(values, SamplingOptions(**options), range(first, first + len(values)))


@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=name) as caught:
        SamplingOptions(**options)
    assert caught.value.hint and name in caught.value.hint


def test_values_at_the_edge() -> None:
    SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    edge = SamplingOptions(temperature=1e30, top_k=2**40, top_p=1e-9, min_p=1.0, seed=2**64 - 1)
    one_each(logits(2), edge, [0, 0])


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    values = np.round(logits(50))
    assert draw(values) == values.argmax(1).tolist()


@pytest.mark.parametrize(
    "only_the_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}]
)
def test_cuts_that_leave_one(only_the_best: dict[str, Any]) -> None:
    values = logits(40)
    assert draw(values, **{"temperature": 1.3, **only_the_best}) == values.argmax(1).tolist()


def test_top_k_cuts_before_top_p_and_min_p() -> None:
    """Of .4 .3 .2 .1 the best two have .57 and .43 between them, so that top-p .5 leaves the best."""
    values = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    many = np.repeat(values, 400, axis=0)
    assert set(draw(many, temperature=1.0)) == {0, 1, 2, 3}
    assert set(draw(many, temperature=1.0, top_k=2)) == {1, 3}
    assert set(draw(many, temperature=1.0, top_p=0.5)) == {1, 3}
    assert set(draw(many, temperature=1.0, top_k=2, top_p=0.5)) == {1}
    assert set(draw(many, temperature=1.0, min_p=0.45)) == {1, 2, 3}


def test_seed_and_position_fix_the_draw() -> None:
    values = logits(30)
    options = {"temperature": 1.0, "seed": 7}
    together = draw(values, **options)
    assert draw(values, **options) == together
    alone = [draw(values[i : i + 1], i, **options)[0] for i in range(30)]
    assert alone == together
    assert draw(values, 1, **options) != together
    assert draw(values, **{**options, "seed": 8}) != together


def test_as_often_as_likely() -> None:
    values = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    tokens = draw(np.tile(values, (20_000, 1)), temperature=1.0)
    share = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.5, 0.25, 0.15, 0.1], atol=0.015)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    values = logits(3)
    values[1, 400] = np.nan
    with pytest.raises(HastenError, match="no numbers at position 1"):
        draw(values, temperature=temperature)
