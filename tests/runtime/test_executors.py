"""One suite for every executor: what the protocol promises, on each device that is here.

The models are tiny and random, one for each family, so the suite needs neither transformers nor torch. That
the plain executor itself is right is what test_reference.py shows, against transformers. The engine over each
executor is in test_executors_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from executor_models import (
    CONTEXT,
    DEVICES,
    EXACT,
    GREEDY,
    LLAMA,
    MODELS,
    VOCAB,
    compute,
    distance,
    of_each_family,
    on_each_device,
    on_each_exact_device,
    options,
    packed,
    shared,
    text,
)

from hasten.core import Recipe
from hasten.errors import HastenError, UsageError
from hasten.models import families
from hasten.runtime.executor import Draw, Executor, Part, Scored, executor_class, open_executor
from hasten.runtime.pages import CachedSequence
from hasten.runtime.reference import ReferenceDecoder
from hasten.runtime.sampling import Choice, SamplingOptions, SequenceSampler
from hasten.weights import FORMATS
from hasten.weights.packed import values_of
from specs import changed

FAST = [name for name in DEVICES if name != "reference"]
FAR = 0.03  # root mean square, of the logits' spread: what activations in bf16 cost; seen: 0.004 to 0.012
NEAR_TIE = 0.1  # of the spread: two logits that bf16 may turn


@pytest.fixture
def opened() -> Iterator[Callable[..., Executor]]:
    """(device, name) -> an executor, which has all its pages again when the test ends."""
    used: list[Executor] = []

    def get(device: str, name: str = "qwen3") -> Executor:
        used.append(shared(device, name))
        return used[-1]

    yield get
    for executor in used:
        executor.pool.reclaim = None
        assert executor.pool.free == executor.pool.pages


@contextmanager
def texts(executor: Executor, count: int = 1) -> Iterator[list[CachedSequence]]:
    """Empty sequences, whose pages are given back."""
    sequences = [CachedSequence() for _ in range(count)]
    try:
        yield sequences
    finally:
        for sequence in sequences:
            executor.pool.truncate(sequence, 0)


def states(executor: Executor, ids: Sequence[int], cuts: Sequence[int] = ()) -> np.ndarray:
    """Hidden states of a prompt, computed in pieces."""
    with texts(executor) as [sequence]:
        sequence.kv_class = executor.kv_class(len(ids), True)
        ends = [*cuts, len(ids)]
        pieces = [list(ids[first:end]) for first, end in zip([0, *cuts], ends, strict=True)]
        return np.concatenate(
            [compute(executor, Part(sequence, p, as_prompt=True, hidden=len(p)))[0].hidden for p in pieces]
        )


def drawing(executor: Executor, ids: Sequence[int], sampling: SamplingOptions = GREEDY, **more: Any) -> Draw:
    return Draw(SequenceSampler(sampling, ids, executor.config.vocab), len(ids), **more)


def greedy(executor: Executor, ids: Sequence[int], count: int) -> list[int]:
    """One token a step."""
    with texts(executor) as [sequence]:
        known, draw = list(ids), drawing(executor, ids)
        while len(known) < len(ids) + count:
            part = Part(sequence, known[sequence.length :], len(known) == len(ids), draws=(draw,))
            (result,) = compute(executor, part)
            known += result.choices[0].tokens
            draw = replace(draw, position=len(known))
        return known[len(ids) :]


def assert_same(device: str, found: np.ndarray, wanted: np.ndarray) -> None:
    """To the bit, on exact devices."""
    if device in EXACT:
        np.testing.assert_array_equal(found, wanted)
    else:
        assert distance(found, wanted) < FAR


# What is computed ------------------------------------------------------------------------------------------


def test_every_family_is_here() -> None:
    assert {model.architecture for model in MODELS.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("device", FAST)
@of_each_family
def test_states_and_logits_are_the_plain_executors(opened: Any, device: str, name: str) -> None:
    fast, plain = opened(device, name), opened("reference", name)
    for ids in (text(1, 12), text(2, 75), text(3, 1)):  # below and above LongRoPE's threshold
        found, wanted = states(fast, ids), states(plain, ids)
        assert distance(found, wanted) < FAR
        assert distance(fast.head(found), plain.head(wanted)) < FAR


@pytest.mark.parametrize("device", FAST)
@of_each_family
def test_greedy_tokens_are_the_plain_executors(opened: Any, device: str, name: str) -> None:
    """Each but those that stand beside another of nearly the same logit."""
    fast, plain, ids = opened(device, name), opened("reference", name), text(4, 20)
    known = [*ids, *greedy(plain, ids, 24)]
    rows = slice(len(ids) - 1, -1)
    best, found = (one.head(states(one, known)[rows]) for one in (plain, fast))
    first, second = np.sort(best)[:, :-3:-1].T
    clear = first - second > NEAR_TIE * best.std()
    assert best.argmax(1).tolist() == known[len(ids) :]
    np.testing.assert_array_equal(found.argmax(1)[clear], best.argmax(1)[clear])
    assert clear.mean() > 0.5 and len(set(known[len(ids) :])) > 3


@of_each_family
def test_the_plain_executor_is_the_plain_decoder(opened: Any, name: str) -> None:
    """Pages and chunks leave no trace."""
    ids = text(5, 75)
    tensors = {key: values_of(linear) for key, linear in packed(name).linears.items()}
    wanted = ReferenceDecoder(MODELS[name], {**tensors, **packed(name).vectors}).hidden(ids)
    np.testing.assert_array_equal(states(opened("reference", name), ids), wanted)


@pytest.mark.parametrize("layout", FORMATS)
def test_the_plain_executor_runs_every_format(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "wide", changed(LLAMA, hidden_size=128, intermediate_size=128))
    recipe = Recipe(layout, FORMATS[layout])
    executor_class("reference").check(recipe)
    model = packed.__wrapped__("wide", recipe)
    executor, ids = open_executor(model, options("reference")), text(6, 9)
    tensors = {key: values_of(linear) for key, linear in model.linears.items()}
    wanted = ReferenceDecoder(model.config, {**tensors, **model.vectors}).hidden(ids)
    np.testing.assert_allclose(states(executor, ids), wanted, rtol=1e-4, atol=1e-4)


@on_each_exact_device
@of_each_family
@pytest.mark.parametrize("chunk", [1, 3, 16, 33])
def test_a_prompt_in_chunks_is_the_prompt_at_once(opened: Any, device: str, name: str, chunk: int) -> None:
    executor, ids = opened(device, name), text(7, 70)
    whole, cuts = states(executor, ids), range(chunk, len(ids), chunk)
    np.testing.assert_array_equal(states(executor, ids, cuts), whole)


@on_each_device
@of_each_family
def test_hidden_is_a_text_of_any_length(opened: Any, device: str, name: str) -> None:
    executor, ids = opened(device, name), text(8, 50)
    with texts(executor, 2) as [one, none]:
        found = executor.hidden(one, np.array(ids, np.int32))
        assert_same(device, found, states(executor, ids))
        assert executor.hidden(none, []).shape == (0, executor.config.width)
    assert executor.head(found[:0]).shape == (0, VOCAB)


@on_each_exact_device
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3"])
def test_prompts_and_answers_in_one_step_do_not_meet(opened: Any, device: str, name: str) -> None:
    executor = opened(device, name)
    asked = [text(10, 40), text(11, 17), text(12, 33)]
    alone = [greedy(executor, ids, 6) for ids in asked]
    known, draws = [list(ids) for ids in asked], [drawing(executor, ids) for ids in asked]
    with texts(executor, 3) as sequences:
        for ids, sequence in zip(asked, sequences, strict=True):
            sequence.kv_class = executor.kv_class(len(ids), True)
        for step in range(9):  # one prompt after the other joins, the last in two pieces
            parts, drawn = [], []
            for i, sequence in enumerate(sequences):
                new = known[i][sequence.length :]
                if i <= step and len(known[i]) < len(asked[i]) + 6:
                    is_prompt, is_half = len(known[i]) == len(asked[i]), i == 2 and step == 2
                    draw = replace(draws[i], position=len(known[i]))
                    part = Part(sequence, new[:20], True, hidden=1)
                    parts.append(part if is_half else Part(sequence, new, is_prompt, draws=(draw,)))
                    drawn.append(None if is_half else i)
            for i, result in zip(drawn, compute(executor, *parts), strict=True):
                if i is not None:
                    known[i] += result.choices[0].tokens
    assert [all_of[len(ids) :] for all_of, ids in zip(known, asked, strict=True)] == alone


def test_two_calls_where_prompts_take_other_kernels() -> None:
    """Each row goes back to its own part."""
    executor = open_executor(packed("qwen3", "w8"), options("cpu"))
    executor.name = "amx"  # its answers have a class, and a call, of their own
    assert (executor.kv_class(9, True), executor.kv_class(9, False)) == ("", "answer")
    asked = [(text(40, 9), False), (text(41, 5), True), (text(42, 1), False), (text(43, 7), True)]
    with texts(executor, 5) as [alone, *sequences]:
        wanted = []
        for ids, is_prompt in asked:
            wanted += compute(executor, Part(alone, ids, is_prompt, hidden=len(ids)))
            executor.pool.truncate(alone, 0)
        parts = [Part(s, ids, kind, hidden=len(ids)) for s, (ids, kind) in zip(sequences, asked, strict=True)]
        for found, right in zip(compute(executor, *parts), wanted, strict=True):
            np.testing.assert_array_equal(found.hidden, right.hidden)
        assert [sequence.length for sequence in sequences] == [9, 5, 1, 7]


@on_each_device
def test_drafts_that_hold_and_drafts_that_do_not(opened: Any, device: str) -> None:
    executor, ids = opened(device), text(13, 30)
    right = greedy(executor, ids, 8)
    wrong = (right[3] + 1) % VOCAB
    for drafts, kept in (
        (right[1:5], 5), ([*right[1:3], wrong, right[4]], 3), ([wrong, *right[2:5]], 1), ([], 1),
    ):  # fmt: skip
        with texts(executor) as [sequence]:
            draw = drawing(executor, ids)
            compute(executor, Part(sequence, ids, True, draws=(draw,)))
            draw = replace(draw, position=len(ids) + 1)
            (result,) = compute(executor, Part(sequence, right[:1], drafts=drafts, draws=(draw,)))
            assert result.choices == [Choice(right[1 : 1 + kept], [])]
            assert sequence.length == len(ids) + 1 + len(drafts), "drafts included"
            executor.pool.truncate(sequence, len(ids) + kept)
            draw = replace(draw, position=len(ids) + 1 + kept)
            (result,) = compute(executor, Part(sequence, [right[kept]], draws=(draw,)))
            assert result.choices[0].tokens == [right[kept + 1]]


@on_each_device
def test_several_answers_go_on_from_one_prompt(opened: Any, device: str) -> None:
    executor, ids = opened(device), text(14, 20)
    draws = tuple(drawing(executor, ids, SamplingOptions(1.0, seed=seed)) for seed in range(12))
    again = tuple(drawing(executor, ids, draw.sampler.options) for draw in draws)
    with texts(executor, 2) as [one, other]:
        (result,) = compute(executor, Part(one, ids, True, draws=draws))
        alone = []
        for draw in again:
            alone += compute(executor, Part(other, ids, True, draws=(draw,)))[0].choices
            executor.pool.truncate(other, 0)
    assert result.choices == alone and len({choice.tokens[0] for choice in alone}) > 2


@on_each_device
def test_log_probabilities_of_answers_and_prompts(opened: Any, device: str) -> None:
    executor, ids = opened(device), text(15, 40)
    logits = executor.head(states(executor, ids)).astype(np.float64)
    right = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    right -= logits.max(1, keepdims=True)
    with texts(executor) as [sequence]:
        scored = Scored(3, tuple(ids[4:]), 2)
        draw = drawing(executor, ids, logprobs=3)
        (result,) = compute(executor, Part(sequence, ids, True, draws=(draw,), hidden=2, scored=scored))
    assert [score.token for score in result.scores] == ids[4:] and result.hidden.shape == (2, 64)
    for row, score in enumerate([*result.scores, *result.choices[0].logprobs], start=3):
        order = np.argsort(-right[row])[: len(score.top)]
        assert score.logprob == pytest.approx(right[row, score.token], abs=1e-4)
        assert [token for token, _ in score.top] == order.tolist()
        assert score.rank == 1 + int((right[row] > right[row, score.token]).sum())
    assert [len(score.top) for score in (result.scores[0], result.choices[0].logprobs[0])] == [2, 3]


# Masks and faults -------------------------------------------------------------------------------------------


def mask(*rows: Sequence[int]) -> np.ndarray:
    """Rows that allow these tokens alone."""
    found = np.zeros((len(rows), -(-VOCAB // 32)), np.uint32)
    for row, tokens in zip(found, rows, strict=True):
        for token in tokens:
            row[token // 32] |= np.uint32(1 << token % 32)
    return found


@on_each_device
def test_masks_rule_out_tokens_and_drafts_behind_them(opened: Any, device: str) -> None:
    executor, ids = opened(device), text(16, 20)
    for masks, tokens, drafted in (
        (mask([5]), [5], 0),
        (mask([7], [9]), [7, 9], 1),
        (mask([7], [9], [11]), [7, 9, 11], 2),
        (mask([8], [9], [11]), [8], 2),
    ):
        with texts(executor) as [sequence]:
            draw = drawing(executor, ids, masks=lambda masks=masks: masks)
            (result,) = compute(executor, Part(sequence, ids, drafts=[7, 9], draws=(draw,)))
            assert result.choices[0].tokens == tokens and result.choices[0].drafted == drafted


@on_each_device
@pytest.mark.parametrize("wrong", [RuntimeError("no mask"), type("Panic", (BaseException,), {})("panic")])
def test_a_fault_stands_in_its_answers_place(opened: Any, device: str, wrong: BaseException) -> None:
    executor, ids = opened(device), text(17, 20)

    def broken() -> np.ndarray:
        raise wrong

    with texts(executor, 2) as [one, other]:
        draws = (drawing(executor, ids, masks=broken), drawing(executor, ids))
        first, second = compute(
            executor,
            Part(one, ids, True, draws=draws),
            Part(other, ids, True, draws=(drawing(executor, ids, masks=lambda: mask([])),)),
        )
    assert first.choices[0] is wrong and first.choices[1].tokens == greedy(executor, ids, 1)
    assert second.choices[0].tokens == [] and "no token may follow" in second.choices[0].error


@on_each_device
def test_values_that_overflow_spoil_no_other_answer(device: str) -> None:
    model = packed.__wrapped__("qwen3")
    model.vectors["layers.1.mlp_norm"] = np.full(64, np.float32(3e38))
    executor, ids = open_executor(model, options(device)), text(18, 9)
    with texts(executor) as [sequence]:
        scored = Scored(0, tuple(ids[1:]), 0)
        (result,) = compute(
            executor, Part(sequence, ids, True, draws=(drawing(executor, ids),), scored=scored)
        )
    assert "no numbers" in result.choices[0].error
    assert isinstance(result.scores, HastenError) and "no numbers" in result.scores.message


# Pages ------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_a_page_that_was_copied_or_read_and_written_goes_on_as_the_first(
    opened: Any, device: str, name: str
) -> None:
    executor, twin, ids = opened(device, name), open_executor(packed(name), options(device)), text(20, 60)
    size, right = executor.page_tokens, states(executor, ids)
    with texts(executor, 3) as [source, copied, written], texts(twin) as [elsewhere]:
        compute(executor, Part(source, ids, True, hidden=1))
        data = executor.read_page(source.pages[0])
        assert data.shape == (executor.page_bytes,) and data.dtype == np.uint8
        for sequence in (copied, written):
            executor.pool.grow(sequence, size)
        twin.pool.grow(elsewhere, size)
        executor.copy_page(source.pages[0], copied.pages[0])
        executor.write_page(written.pages[0], data)
        twin.write_page(elsewhere.pages[0], data)
        for runs, sequence in ((executor, copied), (executor, written), (twin, elsewhere)):
            sequence.length, sequence.kv_class = size, source.kv_class
            np.testing.assert_array_equal(runs.read_page(sequence.pages[0]), data)
            (result,) = compute(runs, Part(sequence, ids[size:], True, hidden=len(ids) - size))
            assert_same(device, result.hidden, right[size:])


@on_each_device
@of_each_family
def test_classes_of_pages(opened: Any, device: str, name: str) -> None:
    executor = opened(device, name)
    short, long = executor.kv_class(16, True), executor.kv_class(17, True)
    assert (short != long) == (name == "phi3")
    assert executor.kv_class(1, True) == short and executor.kv_class(CONTEXT, True) == long
    assert executor.kv_class(1, False) in (short, executor.kv_class(16, False))


@on_each_device
def test_a_longrope_text_is_computed_in_the_class_it_is_told(opened: Any, device: str) -> None:
    """Twelve tokens of a text that will pass the threshold have other keys than a text of twelve tokens."""
    executor, ids = opened(device, "phi3"), text(22, 12)
    with texts(executor) as [sequence]:
        sequence.kv_class = executor.kv_class(40, True)
        (long,) = compute(executor, Part(sequence, ids, True, hidden=12))
    assert distance(long.hidden, states(executor, ids)) > 2 * FAR
    assert_same(device, long.hidden, states(executor, [*ids, *text(23, 28)])[:12])


# What is refused --------------------------------------------------------------------------------------------


@on_each_device
def test_what_cannot_be_computed_changes_nothing(opened: Any, device: str) -> None:
    executor, ids = opened(device), text(24, 40)
    with texts(executor, 2) as [sequence, other]:
        compute(executor, Part(sequence, ids, True))
        for new, drafts, word in (
            ([VOCAB], (), "not in the vocabulary"),
            ([5], (-1,), "not in the vocabulary"),
            ([1.5], (), "whole numbers"),
            ([5] * (CONTEXT - 39), (), f"do not fit the context of {CONTEXT}"),
            ([5] * (CONTEXT - 40), (5,), f"do not fit the context of {CONTEXT}"),
        ):
            with pytest.raises(UsageError, match=word) as refused:
                compute(executor, Part(other, ids), Part(sequence, new, drafts=drafts))
            assert refused.value.hint and (sequence.length, other.length) == (40, 0)
            assert len(sequence.pages) == 2 and not other.pages
        compute(executor, Part(sequence, [5] * (CONTEXT - 40)))
        assert sequence.length == CONTEXT


@on_each_device
def test_a_full_cache_is_refused(device: str) -> None:
    page = open_executor(packed("qwen3"), options(device)).page_bytes
    executor = open_executor(packed("qwen3"), options(device, kv_gb=4.5 * page / 1e9))
    assert executor.pool.pages == 4 and "128 tokens" in executor.summary
    with texts(executor, 2) as [one, other]:
        compute(executor, Part(one, text(25, 100), True))
        with pytest.raises(UsageError, match="0 free pages") as refused:
            compute(executor, Part(other, [5], True))
        assert "--kv-gb" in refused.value.hint
        executor.pool.truncate(one, 32)
        compute(executor, Part(other, [5], True))


@on_each_device
def test_options_out_of_range(device: str) -> None:
    for more, word in (
        ({"threads": 0}, "0 threads"),
        ({"max_sequences": 0}, "0 sequences"),
        ({"context": 0}, "context of 0"),
        ({"context": 513}, "made for"),
        ({"kv_gb": 1e-6}, "context"),
    ):
        with pytest.raises(UsageError, match=word) as refused:
            open_executor(packed("qwen3"), options(device, **more))
        assert refused.value.hint


@on_each_device
def test_a_text_begun_with_other_weights_is_refused(device: str) -> None:
    executor, ids = open_executor(packed("qwen3"), options(device)), text(26, 20)
    linears, before = packed("qwen3").linears, states(executor, ids)
    with texts(executor) as [sequence]:
        compute(executor, Part(sequence, ids, True))
        version = executor.weights_version
        executor.replace("layers.1.up", linears["layers.1.gate"])
        assert executor.weights_version != version
        with pytest.raises(UsageError, match="weights were replaced"):
            compute(executor, Part(sequence, [5]))
    assert distance(states(executor, ids), before) > 2 * FAR
    executor.replace("layers.1.up", linears["layers.1.up"])
    assert_same(device, states(executor, ids), before)
