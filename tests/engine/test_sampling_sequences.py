"""Penalties and bias as options, and what goes wrong in one sequence of many."""

from __future__ import annotations

import copy
import pickle
import random
import time
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from hasten.core import as_json
from hasten.engine.answer import TokenRules
from hasten.engine.request import Request
from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "seed",
]
BAD = [
    *((name, value) for name in NUMBERS for value in (NAN, INF, -INF, "1", None, True, [1], 1j, -(10**400))),
    *(("repetition_penalty", value) for value in (0.0, -1.0, 10**400)),
    *((f"{name}_penalty", value) for name in ("presence", "frequency") for value in (-2.001, 2.001)),
    *((name, value) for name in ("top_k", "seed") for value in (0.5, 1.0, np.float32(1))),
    *(("logit_bias", value) for value in ([(1, 2.0)], "5", None, 3, {1})),
    *(("logit_bias", {token: 1.0}) for token in (-1, "5", 1.5, True, None, 2**31)),
    *(("logit_bias", {5: bias}) for bias in (NAN, INF, -INF, 100.5, -101, "1", None, True)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingOptions(**{name: value})
    assert caught.value.hint


def test_values_at_the_edge() -> None:
    SamplingOptions(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9)
    SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, seed=np.uint64(2**64 - 1))
    SamplingOptions(logit_bias={0: -100, np.int64(7): np.float32(100.0)})
    for wrong in (Decimal("0.5"), np.array([0.5])):
        with pytest.raises(UsageError, match="top_p"):
            SamplingOptions(top_p=wrong)  # type: ignore[arg-type]


def test_options_are_values() -> None:
    given = {5: 1.0}
    options = SamplingOptions(logit_bias=given, presence_penalty=1)
    given[6] = 2.0
    assert options.logit_bias == {5: 1.0}
    same = SamplingOptions(logit_bias={5: 1}, presence_penalty=1.0)
    assert options == same and hash(options) == hash(same)
    assert options != replace(options, logit_bias={5: 2.0})
    for copied in (
        copy.deepcopy(options),
        pickle.loads(pickle.dumps(options)),
        SamplingOptions(**asdict(options)),
    ):
        assert copied == options
    assert as_json(options)["logit_bias"] == {"5": 1.0}


def sampler(**options: Any) -> SequenceSampler:
    return SequenceSampler(SamplingOptions(**options), [1, 2], 50)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 50)).astype(np.float32)


def test_tokens_that_the_model_does_not_have() -> None:
    with pytest.raises(UsageError, match="token 50, the model has 50") as caught:
        sampler(logit_bias={49: 1.0, 50: 1.0})
    assert caught.value.hint == "give token ids from 0 to 49"
    for prompt in ([0, 50], [-1]):
        with pytest.raises(UsageError, match="prompt"):
            SequenceSampler(SamplingOptions(repetition_penalty=1.1), prompt, 50)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"presence_penalty": 1.0}, {"temperature": 1.0, "top_k": 4}],
    ids=str,
)
@pytest.mark.parametrize("allowed", [None, 0xFFFFFFFF])
def test_no_numbers_fail_their_own_sequence_alone(
    options: dict[str, Any], logprobs: int | None, allowed: int | None
) -> None:
    logits, masks = rows(3), [None if allowed is None else np.full((1, 2), allowed, np.uint32)] * 3
    good = choose(logits, [sampler(**options) for _ in range(3)], [[]] * 3, [4, 5, 6], masks, [logprobs] * 3)
    logits[1, 49] = NAN
    found = choose(logits, [sampler(**options) for _ in range(3)], [[]] * 3, [4, 5, 6], masks, [logprobs] * 3)
    assert [found[0], found[2]] == [good[0], good[2]]
    assert found[1].tokens == [] and found[1].logprobs == []
    assert "no numbers at position 5" in found[1].error


def test_a_nan_that_the_mask_forbids_is_still_one() -> None:
    logits = rows(1)
    logits[0, 3] = NAN
    mask = np.array([[0xFFFFFFFF ^ 8, 0x3FFFF]], np.uint32)
    (found,) = choose(logits, [sampler()], [[]], [0], [mask], [None])
    assert "no numbers" in found.error


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logit_bias": {3: 100.0}}], ids=str)
def test_nothing_allowed(options: dict[str, Any]) -> None:
    beyond = np.array([[0, 0xFFFC0000]], np.uint32)  # bits past token 49 allow nothing
    masks = [beyond, None]
    found = choose(rows(2), [sampler(**options), sampler(**options)], [[], []], [8, 9], masks, [0, None])
    assert found[0].tokens == [] and "no token may follow at position 8" in found[0].error
    assert len(found[1].tokens) == 1 and not found[1].error


def test_tokens_before_the_failing_row_count() -> None:
    logits = rows(4)
    drafts = logits[:3].argmax(1).tolist()
    logits[2] = NAN
    used = sampler(temperature=0.0)
    (found,) = choose(logits, [used], [drafts], [10], [None], [0])
    assert found.tokens == drafts[:2] and len(found.logprobs) == 2
    assert "position 12" in found.error


def test_a_failing_row_that_is_not_reached_is_no_error() -> None:
    logits = rows(3)
    wrong = (int(logits[0].argmax()) + 1) % 50
    logits[1:] = NAN
    (found,) = choose(logits, [sampler()], [[wrong, 0]], [0], [None], [None], threads=3)
    assert found.tokens == [int(logits[0].argmax())] and not found.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafts": [[]]}, "one entry"),
        ({"drafts": [[], [1]]}, "fewer rows"),
        ({"logits": rows(3)}, "more rows"),
        ({"drafts": [[], [50]], "logits": rows(3)}, "token 50"),
        ({"logits": np.zeros((2, 49), np.float32)}, "another vocabulary"),
        ({"masks": [None, np.zeros((1, 3), np.uint32)]}, "words wide"),
        ({"masks": [None, np.zeros((0, 2), np.uint32)]}, "no rows"),
    ],
    ids=str,
)
def test_our_own_mistakes_are_caught(change: dict[str, Any], message: str) -> None:
    step = {
        "logits": rows(2),
        "samplers": [sampler(), sampler()],
        "drafts": [[], []],
        "positions": [0, 0],
        "masks": [None, None],
        "logprobs": [None, None],
    }
    assert len(choose(**step)) == 2
    with pytest.raises(ValueError, match=message):
        choose(**(step | change))


VOCAB_OF_PARTS = 3 * 4096 + 5  # enough that three threads search a part each


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_greedy_tokens_are_found_in_parts(threads: int) -> None:
    """As numpy finds them: the lowest of equals, wherever parts meet; beside sequences that draw."""
    logits = np.random.default_rng(4).standard_normal((9, VOCAB_OF_PARTS)).astype(np.float32)
    places = [[0], [VOCAB_OF_PARTS - 1], [4097, 8195], [4096, 4095], [8194, 12292, 1], [6144, 6143], [9000]]
    for row, places_of_row in enumerate(places):
        logits[row, places_of_row] = 9.0
    drawn = SamplingOptions(0.7, seed=5)
    some = [
        SequenceSampler(drawn if row == 7 else SamplingOptions(), (), VOCAB_OF_PARTS)
        for row in range(len(logits))
    ]
    alone = [SequenceSampler(drawn, (), VOCAB_OF_PARTS)]
    n = len(logits)
    found = choose(logits, some, [[]] * n, [3] * n, [None] * n, [None] * n, threads=threads)
    (seventh,) = choose(logits[7:8], alone, [[]], [3], [None], [None], threads=1)
    wanted = [[int(row.argmax())] for row in logits]
    assert [choice.tokens for choice in found] == [*wanted[:7], seventh.tokens, *wanted[8:]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at", [0, 4095, 4096, 8195, VOCAB_OF_PARTS - 1])
def test_a_nan_in_any_part_is_an_error(threads: int, at: int) -> None:
    logits = np.full((3, VOCAB_OF_PARTS), -INF, np.float32)
    logits[0, at], logits[2, at] = NAN, -3.0
    some = [SequenceSampler(SamplingOptions(), (), VOCAB_OF_PARTS) for _ in logits]
    found = choose(logits, some, [[]] * 3, [0] * 3, [None] * 3, [None] * 3, threads=threads)
    assert "no numbers" in found[0].error and "rule out all" in found[1].error
    assert found[2].tokens == [at] and not found[2].error


def test_the_answers_of_a_request_share_what_was_checked() -> None:
    """128 answers with 10,000 biases each were checked for 2.4 s, in which nobody else got a token."""
    options = SamplingOptions(logit_bias=dict.fromkeys(range(10000), 1.0))
    began = time.monotonic()
    for seed in range(128):
        SequenceSampler(replace(options, seed=seed), [1], 20_000)
    assert time.monotonic() - began < 1  # 0.01 s
    with pytest.raises(UsageError, match="token 9999, the model has 9999"):
        SequenceSampler(options, [1], 9999)


@pytest.mark.parametrize("words", [0, 1, 3])
def test_rules_say_which_tokens_may_come(words: int) -> None:
    """Against a plain reading of them."""
    rng = random.Random(words)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4) for _ in range(count))

    for _ in range(200):
        vocab = rng.choice([5, 31, 32, 33, 70])
        forbidden = tuple(some(rng.randrange(1, 4)) for _ in range(words))
        least, allowed, ends = rng.randrange(4), some(rng.choice([0, 3])), some(2)
        request = Request(some(3), 9, min_new_tokens=least, allowed_tokens=allowed, forbidden=forbidden)
        answer, drafts = some(rng.randrange(5)), some(rng.randrange(3))
        rules = TokenRules(request, ends, vocab)
        bits = np.unpackbits(
            rules.masks([*request.prompt, *answer], drafts).view(np.uint8), axis=1, bitorder="little"
        )
        for number, row in enumerate(bits):
            said = (answer + drafts)[: len(answer) + number]
            may = set(allowed or range(vocab)) - (set(ends) if len(said) < least else set())
            may -= {run[-1] for run in forbidden if (*said, run[-1])[-len(run) :] == run}
            assert set(np.flatnonzero(row)) == may
