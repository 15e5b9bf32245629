"""Logprobs are of the model's own distribution: against float64, with ties, whatever the sampling does."""

from __future__ import annotations

from typing import Any

import choose_twin as twin
import numpy as np
import pytest
from kernel_twins import fewer
from sampler_twin import rows

from hasten.errors import HastenError
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, TokenLogprob, choose, score


def check(found: TokenLogprob, logits: np.ndarray, token: int, top: int) -> None:
    exact, order = twin.logprobs(logits), twin.ranked(logits)
    assert found.token == token
    assert found.logprob == pytest.approx(exact[token], abs=2e-6)
    assert order[found.rank - 1] == token
    assert [t for t, _ in found.top] == order[:top].tolist()
    np.testing.assert_allclose([p for _, p in found.top], exact[order[:top]], atol=2e-6)


@pytest.mark.parametrize("spread", fewer([0.0, 0.5, 8.0, 60.0], [0.5]))
@pytest.mark.parametrize("vocab", [1, 2, 19, 64, 65, 5003, 151_936])
@pytest.mark.parametrize("top", fewer([0, 1, 5, 20], [0, 20]))
def test_scores_equal_float64(vocab: int, top: int, spread: float, isa: str) -> None:
    count = 2 if vocab > 10_000 else 8
    logits = rows(count, vocab, seed=vocab, spread=spread)
    targets = np.random.default_rng(1).integers(0, vocab, count).tolist()
    targets[0] = int(logits[0].argmax())
    for row, target, found in zip(logits, targets, score(logits, targets, top), strict=True):
        check(found, row, target, top)


def test_probabilities_add_up() -> None:
    logits = rows(1, 300, seed=3)
    found = score(np.repeat(logits, 300, 0), list(range(300)), 0)
    assert sum(np.exp(s.logprob) for s in found) == pytest.approx(1.0, abs=1e-6)
    assert sorted(s.rank for s in found) == list(range(1, 301))


def test_equals_are_ranked_by_id() -> None:
    logits = np.zeros((3, 200), np.float32)
    logits[:, [150, 66, 3]] = 1.0
    scores = score(logits, [66, 0, 199], 5)
    assert [s.rank for s in scores] == [2, 4, 200]
    assert [t for t, _ in scores[0].top] == [3, 66, 150, 0, 1]


def test_more_alternatives_than_tokens() -> None:
    logits = np.array([[0.0, 2.0, -np.inf]], np.float32)
    (found,) = score(logits, [2], 20)
    assert found.logprob == -np.inf and found.rank == 3
    assert [t for t, _ in found.top] == [1, 0]  # what cannot come is no alternative


def test_plus_infinity_takes_all() -> None:
    logits = np.array([[0.0, np.inf, -np.inf, np.inf]] * 4, np.float32)
    found = score(logits, [0, 1, 2, 3], 1)
    assert [s.logprob for s in found] == [
        -np.inf,
        pytest.approx(np.log(0.5)),
        -np.inf,
        pytest.approx(np.log(0.5)),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.3, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.7},
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0},
        {"temperature": 1.0, "logit_bias": {7: 50.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_chosen_tokens_have_the_models_own_logprob(options: dict[str, Any], masked: bool) -> None:
    logits = rows(10, 600, seed=6)
    allowed = np.random.default_rng(0).random((1, 600)) < 0.3
    allowed[0, 7] = True
    mask = twin.mask_words(allowed) if masked else None
    sampler = SequenceSampler(SamplingOptions(**options), [7, 8], 600)
    silent = SequenceSampler(SamplingOptions(**options), [7, 8], 600)
    for position, row in enumerate(logits):
        (choice,) = choose(row[None], [sampler], [[]], [position], [mask], [4])
        check(choice.logprobs[0], row, choice.tokens[0], 4)
        (without,) = choose(row[None], [silent], [[]], [position], [mask], [None])
        assert without.tokens == choice.tokens and without.logprobs == []


def test_rows_that_are_no_numbers() -> None:
    logits = rows(3, 100)
    logits[1, 99] = np.nan
    with pytest.raises(HastenError, match="row 1") as caught:
        score(logits, [1, 2, 3], 0)
    assert caught.value.hint
    with pytest.raises(HastenError, match="row 0"):
        score(np.full((1, 9), -np.inf, np.float32), [1], 0)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="targets"):
        score(rows(2, 10), [1], 0)
    with pytest.raises(ValueError, match="token 10"):
        score(rows(1, 10), [10], 0)
    assert score(np.zeros((0, 5), np.float32), [], 3) == []
