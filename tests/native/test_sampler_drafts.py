"""Rows that verify drafts draw exactly what plain decoding draws, one token at a time."""

from __future__ import annotations

from typing import Any

import choose_twin as twin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import fewer

from hasten.runtime.sampling import Choice, SamplingOptions, SequenceSampler, TokenLogprob, choose

VOCAB = 70
PROMPT = [1, 2, 3, 40, 69]
ANSWER = [t for t in range(0, VOCAB, 2) for _ in range(1 + t % 3)]  # drafts meet what is counted already


def rows(count: int, seed: int, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, VOCAB)) * spread).astype(np.float32)


def started(options: SamplingOptions) -> SequenceSampler:
    """A sampler in the middle of its answer."""
    sampler = SequenceSampler(options, PROMPT, VOCAB)
    sampler.accept(ANSWER)
    return sampler


def plainly(
    sampler: SequenceSampler,
    logits: np.ndarray,
    position: int,
    masks: np.ndarray | None,
    logprobs: int | None,
) -> Choice:
    """Every row in turn, whatever is drawn: its own choose() each."""
    out = Choice([], [])
    for j, row in enumerate(logits):
        mask = None if masks is None else masks[j : j + 1]
        (choice,) = choose(row[None], [sampler], [[]], [position + j], [mask], [logprobs])
        out.tokens += choice.tokens
        out.logprobs += choice.logprobs
    return out


def state_of(sampler: SequenceSampler) -> list[TokenLogprob]:
    """What the sampler remembers, seen by what it draws from the same rows next."""
    logits = rows(12, seed=999, spread=0.3)
    return plainly(sampler, logits, 5000, None, 0).logprobs


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 5, "min_p": 0.02},
    {"frequency_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    {"temperature": 1.0, "presence_penalty": -2.0, "logit_bias": {5: 3.0, 1: -50.0}},
]


@pytest.mark.parametrize("logprobs", [None, 0, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_as_one_at_a_time(options: dict[str, Any], masked: bool, logprobs: int | None) -> None:
    lengths = []
    for trial in fewer(range(25), range(9)):
        random = np.random.default_rng(trial)
        sampling = SamplingOptions(seed=trial, **options)
        count = 1 + trial % 9
        logits, position = rows(count, trial), 1000 * trial
        masks = twin.mask_words(random.random((count, VOCAB)) < 0.6) if masked else None
        plain = plainly(started(sampling), logits, position, masks, logprobs)
        drafts = plain.tokens[:-1]
        wrong = int(random.integers(0, count + 2))  # some drafts are right to the end
        if wrong < len(drafts):
            drafts[wrong] = (drafts[wrong] + 1) % VOCAB
        sampler = started(sampling)
        (choice,) = choose(logits, [sampler], [drafts], [position], [masks], [logprobs])
        length = min(wrong, count - 1) + 1
        assert choice == Choice(plain.tokens[:length], plain.logprobs[:length])
        fresh = started(sampling)
        fresh.accept(choice.tokens)
        assert state_of(sampler) == state_of(fresh)
        lengths.append(length)
    assert min(lengths) == 1 and max(lengths) > 5


def test_a_thousand_drafts() -> None:
    options = SamplingOptions(temperature=1.0, frequency_penalty=0.1, repetition_penalty=1.1, seed=3)
    logits = rows(1001, seed=1)
    plain = plainly(started(options), logits, 0, None, None)
    for right in (0, 1, 500, 1000):
        drafts = plain.tokens[:right] + [(t + 1) % VOCAB for t in plain.tokens[right:1000]]
        for threads in (1, 3):
            sampler = started(options)
            (choice,) = choose(logits, [sampler], [drafts], [0], [None], [None], threads=threads)
            assert choice.tokens == plain.tokens[: right + 1]


def test_many_sequences_with_drafts_of_all_lengths() -> None:
    options = SamplingOptions(temperature=0.9, presence_penalty=0.5)
    plain, drafts, logits = [], [], []
    for i in range(20):
        logits.append(rows(1 + i % 7, seed=i))
        plain.append(plainly(started(options), logits[-1], 50 * i, None, 2))
        drafts.append(plain[-1].tokens[: i % 7])
    samplers = [started(options) for _ in drafts]
    positions = [50 * i for i in range(20)]
    assert choose(np.concatenate(logits), samplers, drafts, positions, [None] * 20, [2] * 20) == plain


def test_a_mask_that_ends_early_ends_the_sequence() -> None:
    logits = rows(4, seed=2)
    drafts = logits.argmax(1)[:3].tolist()
    masks = twin.mask_words(np.ones((2, VOCAB), bool))
    sampler = SequenceSampler(SamplingOptions(), PROMPT, VOCAB)
    assert choose(logits, [sampler], [drafts], [0], [masks], [None])[0].tokens == drafts[:2]


def test_a_draft_the_mask_forbids_is_not_drawn() -> None:
    logits = rows(2, seed=2)
    best = int(logits[0].argmax())
    allowed = np.ones((2, VOCAB), bool)
    allowed[0, best] = False
    for temperature in (0.0, 1.0):
        sampler = SequenceSampler(SamplingOptions(temperature=temperature), PROMPT, VOCAB)
        (choice,) = choose(logits, [sampler], [[best]], [0], [twin.mask_words(allowed)], [None])
        assert len(choice.tokens) == 1 and choice.tokens[0] != best


def test_drafts_do_not_change_the_distribution() -> None:
    """Chi-square over pairs of tokens of 20,000 seeds, the likeliest token always drafted."""
    logits = np.random.default_rng(4).standard_normal((2, 6)).astype(np.float32)
    draft, n = int(logits[0].argmax()), 20_000
    samplers = [SequenceSampler(SamplingOptions(temperature=0.8, seed=s), [], 6) for s in range(n)]
    choices = choose(np.tile(logits, (n, 1)), samplers, [[draft]] * n, [7] * n, [None] * n, [None] * n)
    first, second = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum(1, keepdims=True)
    expected = n * np.array([*(first[t] for t in range(6) if t != draft), *(first[draft] * second)])
    outcomes = [(t,) for t in range(6) if t != draft] + [(draft, t) for t in range(6)]
    counts = np.array([sum(tuple(c.tokens) == o for c in choices) for o in outcomes])
    assert counts.sum() == n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 10 + 4 * np.sqrt(20) + 8


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_bounds(data: st.DataObject) -> None:
    """Whatever is asked: allowed tokens only, drafts confirmed only where drawn, or an error."""
    vocab = data.draw(st.integers(1, 80))
    count = data.draw(st.integers(1, 4))
    logits = (
        np.random.default_rng(data.draw(st.integers(0, 99))).normal(0, 9, (count, vocab)).astype(np.float32)
    )
    for extreme in data.draw(st.lists(st.sampled_from([-np.inf, 0.0, 3e38, -3e38]), max_size=3)):
        logits[:, data.draw(st.integers(0, vocab - 1))] = extreme
    tokens = st.integers(0, vocab - 1)
    drafts = data.draw(st.lists(tokens, min_size=count - 1, max_size=count - 1))
    allowed = np.random.default_rng(data.draw(st.integers(0, 99))).random((count, vocab)) < 0.5
    options = SamplingOptions(
        temperature=data.draw(st.sampled_from([0.0, 1e-300, 1e-5, 0.5, 1.0, 50.0, 1e300])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 79, 2**40])),
        top_p=data.draw(st.sampled_from([1.0, 0.999999, 0.5, 1e-12])),
        min_p=data.draw(st.sampled_from([0.0, 1e-9, 0.3, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1e-300, 0.5, 1.3, 1e300])),
        presence_penalty=data.draw(st.floats(-2, 2)),
        frequency_penalty=data.draw(st.floats(-2, 2)),
        logit_bias=data.draw(st.dictionaries(tokens, st.floats(-100, 100), max_size=3)),
    )
    sampler = SequenceSampler(options, data.draw(st.lists(tokens, max_size=5)), vocab)
    (choice,) = choose(logits, [sampler], [drafts], [0], [twin.mask_words(allowed)], [2])
    n = len(choice.tokens)
    assert choice.tokens[:-1] == drafts[: max(n - 1, 0)]
    assert [p.token for p in choice.logprobs] == choice.tokens
    possible = allowed & (logits > -np.inf)
    assert all(possible[j, token] for j, token in enumerate(choice.tokens))
    assert all(p.logprob <= 1e-6 and p.rank >= 1 and len(p.top) <= 2 for p in choice.logprobs)
    if choice.error:
        assert not possible[n].any() and choice.tokens == drafts[:n]
    else:
        assert n >= 1 and (n == count or choice.tokens[-1] != drafts[n - 1])
