"""Tokens of many sequences in one call, against the twin and against the same call one token at a time."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import choose_twin as twin
import numpy as np
import pytest
from kernel_twins import fewer
from sampler_twin import rows

from hasten import _native
from hasten.runtime.sampling import Choice, SamplingOptions, SequenceSampler, choose

BIAS = {3: 4.0, 5: -100.0, 17: 100.0 / 16, 40: -2.5}
SINGLE: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "presence_penalty": {"presence_penalty": 1.9},
    "frequency_penalty": {"frequency_penalty": -0.7},
    "logit_bias": {"logit_bias": BIAS},
    "mask": {},
    "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.85},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
}
ALONE = [(name,) for name in SINGLE]
PAIRS = fewer([*ALONE, *combinations(SINGLE, 2)], ALONE)


def options_of(names: tuple[str, ...]) -> SamplingOptions:
    merged: dict[str, Any] = {}
    for name in names:
        merged |= SINGLE[name]
    return SamplingOptions(seed=77, **merged)


def one(
    sampler: SequenceSampler,
    logits: np.ndarray,
    drafts: list[int] | None = None,
    position: int = 0,
    mask: np.ndarray | None = None,
    logprobs: int | None = None,
) -> Choice:
    return choose(np.atleast_2d(logits), [sampler], [drafts or []], [position], [mask], [logprobs])[0]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_every_option_and_pair_equals_the_twin(names: tuple[str, ...]) -> None:
    vocab, random = 203, np.random.default_rng(len(names))
    options, prompt = options_of(names), [3, 17, 60, 60, 200]
    sampler, answer = SequenceSampler(options, prompt, vocab), []
    for position, row in enumerate(rows(25, vocab, seed=5)):
        allowed = random.random(vocab) < 0.4 if "mask" in names else None
        words = None if allowed is None else twin.mask_words(allowed[None])
        expected = twin.next_token(row, options, prompt, answer, position, allowed)
        assert one(sampler, row, position=position, mask=words).tokens == [expected], position
        answer.append(expected)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 63, 64, 65, 129, 5000])
def test_every_width(vocab: int) -> None:
    options = SamplingOptions(temperature=1.1, top_p=0.9, presence_penalty=1.0, repetition_penalty=1.2)
    prompt, answer = [0, vocab - 1], []
    sampler = SequenceSampler(options, prompt, vocab)
    for position, row in enumerate(rows(12, vocab, seed=vocab)):
        allowed = np.random.default_rng(position).random(vocab) < 0.7
        allowed[vocab - 1] = True
        expected = twin.next_token(row, options, prompt, answer, position, allowed)
        assert one(sampler, row, position=position, mask=twin.mask_words(allowed[None])).tokens == [expected]
        answer.append(expected)


def test_penalties_change_what_greedy_takes() -> None:
    row = np.array([5.0, 4.0, 3.0, -1.0], np.float32)

    def tokens(**penalty: float) -> list[int]:
        sampler = SequenceSampler(SamplingOptions(**penalty), [0], 4)
        return [one(sampler, row).tokens[0] for _ in range(5)]

    assert tokens() == [0, 0, 0, 0, 0]
    assert tokens(repetition_penalty=2.0) == [1, 2, 0, 0, 0]  # 5 / 2 from the start, then 4 / 2, then 3 / 2
    assert tokens(presence_penalty=1.5) == [0, 1, 0, 0, 0]
    assert tokens(frequency_penalty=1.5) == [0, 1, 0, 2, 1]
    assert tokens(logit_bias={3: 7.0}) == [3] * 5


def test_a_negative_logit_is_multiplied() -> None:
    row = np.array([-1.0, -1.5], np.float32)
    assert one(SequenceSampler(SamplingOptions(repetition_penalty=1.4), [0], 2), row).tokens == [0]
    assert one(SequenceSampler(SamplingOptions(repetition_penalty=1.6), [0], 2), row).tokens == [1]


def test_tokens_computed_elsewhere_count() -> None:
    options = SamplingOptions(frequency_penalty=1.0, repetition_penalty=1.1)
    prompt, tokens, row = [1, 2], [4, 4, 9, 4], rows(1, 40)[0]
    sampler = SequenceSampler(options, prompt, 40)
    sampler.accept(tokens)
    assert one(sampler, row).tokens == [twin.next_token(row, options, prompt, tokens, 0)]


def test_many_distinct_tokens() -> None:
    vocab = 40_000
    options, row = SamplingOptions(repetition_penalty=1.5, frequency_penalty=0.1), rows(1, vocab)[0]
    prompt = np.random.default_rng(1).integers(0, vocab, 20_000).tolist()
    answer = np.random.default_rng(2).integers(0, vocab, 20_000).tolist()
    sampler = SequenceSampler(options, prompt, vocab)
    sampler.accept(answer)
    for position in range(30):
        expected = twin.next_token(row, options, prompt, answer, position)
        assert one(sampler, row).tokens == [expected]
        answer.append(expected)


def mixed(vocab: int) -> list[tuple[SamplingOptions, list[int], int, np.ndarray | None, int | None]]:
    """(options, drafts, position, allowed, logprobs) of sequences that have nothing in common."""
    random, out = np.random.default_rng(9), []
    for i, names in enumerate(PAIRS[::3]):
        drafts = random.integers(0, vocab, i % 4).tolist()
        allowed = random.random((1 + len(drafts), vocab)) < 0.8 if i % 3 == 0 else None
        out.append((options_of(names), drafts, 100 * i, allowed, None if i % 2 else i % 6))
    return out


def drawn(
    sequences: list[tuple[SamplingOptions, list[int], int, np.ndarray | None, int | None]],
    logits: list[np.ndarray],
    threads: int = 0,
) -> list[Choice]:
    options, drafts, positions, allowed, logprobs = zip(*sequences, strict=True)
    samplers = [SequenceSampler(o, [3, 5, 8], logits[0].shape[1]) for o in options]
    masks = [None if a is None else twin.mask_words(a) for a in allowed]
    return choose(np.concatenate(logits), samplers, drafts, positions, masks, logprobs, threads=threads)


def test_what_else_is_in_the_batch_changes_nothing() -> None:
    sequences = mixed(500)
    logits = [rows(1 + len(s[1]), 500, seed=i) for i, s in enumerate(sequences)]
    alone = [drawn([s], [x], threads=1)[0] for s, x in zip(sequences, logits, strict=True)]
    for threads in (1, 2, 5):
        assert drawn(sequences, logits, threads) == alone
    assert drawn(sequences[::-1], logits[::-1])[::-1] == alone


def test_every_instruction_set_chooses_the_same() -> None:
    before, sequences = _native.isa(), mixed(1003)
    logits = [rows(1 + len(s[1]), 1003, seed=i) for i, s in enumerate(sequences)]
    found = {}
    for name in _native.isas():
        _native.use_isa(name)
        found[name] = drawn(sequences, logits)
    _native.use_isa(before)
    assert all(choices == found["scalar"] for choices in found.values())


def test_no_sequences() -> None:
    assert choose(np.zeros((0, 10), np.float32), [], [], [], [], []) == []
