"""Sampling options and the choice of tokens as the engine sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.errors import HastenError, UsageError
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose, choose_of_few
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


CUTS: list[dict[str, Any]] = [
    {"top_k": 20},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.05},
    {"top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.1},
    {"min_p": 0.2},
    {"temperature": 0.0},
]
PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": {3: -5.0, 250: -100.0}},
    {"repetition_penalty": 1.1, "logit_bias": {7: 2.0}},
]


def few(values: np.ndarray, count: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The highest of each row by rising id, their ids, and the sum of all weights."""
    ids = np.sort(np.argpartition(-values, count - 1, axis=1)[:, :count], axis=1).astype(np.int32)
    scaled = (values - values.max(1, keepdims=True)).astype(np.float64) / max(temperature, 1e-30)
    return np.take_along_axis(values, ids, 1), ids, np.exp(scaled).sum(1)


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_highest_logits_tell_what_the_whole_row_does(
    cuts: dict[str, Any], penalties: dict[str, Any]
) -> None:
    """Answers of 12 tokens whose penalties grow; what cannot be told is said, and rare."""
    rows, vocab = 40, 3000
    options = [SamplingOptions(**{"temperature": 0.8, "seed": i} | cuts | penalties) for i in range(rows)]
    prompt = list(range(0, vocab, 5))
    whole, part = ([SequenceSampler(o, prompt, vocab) for o in options] for _ in range(2))
    told = 0
    for position in range(12):
        values = np.random.default_rng(position).standard_normal((rows, vocab)).astype(np.float32) * 4
        positions = [position] * rows
        wanted = [
            c.tokens[0] for c in choose(values, whole, [[]] * rows, positions, [None] * rows, [None] * rows)
        ]
        found = choose_of_few(*few(values, 256, options[0].temperature), part, positions, threads=2)
        assert all(token in (None, want) for token, want in zip(found, wanted, strict=True))
        for sampler, token, want in zip(part, found, wanted, strict=True):
            if token is None:
                sampler.accept([want])
        told += sum(token is not None for token in found)
    cannot = ("top_k" not in cuts and cuts.get("temperature") != 0 and penalties) or 7 in penalties.get(
        "logit_bias", {}
    )
    assert told <= rows * 12 * 0.2 if cannot else told >= rows * 12 * 0.9


def test_few_logits_that_do_not_tell() -> None:
    """Ties with what is not there, no cut, too little weight, what might rise, and no number."""
    values = np.zeros((1, 100), np.float32)
    values[0, :10] = np.arange(10)

    def told(count: int, **options: Any) -> int | None:
        sampler = SequenceSampler(SamplingOptions(**{"temperature": 1.0} | options), [1], 100)
        return choose_of_few(*few(values, count, 1.0), [sampler], [0], threads=1)[0]

    assert told(12, top_k=8) is not None
    assert told(12, top_k=11) is None  # the eleventh is any of ninety equals
    assert told(12) is None
    assert told(3, top_p=0.9999) is None
    assert told(12, top_k=5, presence_penalty=-1.0) is None
    assert told(12, top_k=5, repetition_penalty=0.9) is None
    highest, ids, totals = few(values, 12, 1.0)
    highest[0, 4] = np.nan
    sampler = SequenceSampler(SamplingOptions(temperature=1.0, top_k=5), [], 100)
    assert choose_of_few(highest, ids, totals, [sampler], [0], threads=1) == [None]
