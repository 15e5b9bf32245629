"""Texts continued one by one or together: what is kept changes nothing, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import HastenError, UsageError
from hasten.runtime.sampling import SamplingOptions

GREEDY = SamplingOptions(ignore_eos=True)
CONTEXT = 96
OPTIONS = EngineOptions(threads=1, context=CONTEXT, max_sequences=6, prefill_chunk=7)


# phi3 rotates by other factors past 16 tokens: its sequences are computed anew when they cross that
@pytest.fixture(scope="module", params=[("qwen3", "w4"), ("gemma3", "bf16-kv8"), ("phi3", "bf16")], ids=str)
def model(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> LanguageModel:
    name, recipe = request.param
    return hasten.load(tiny_folder(name), recipe, options=OPTIONS)


@pytest.fixture(autouse=True)
def no_page_is_lost(model: LanguageModel) -> Iterator[None]:
    before = free(model)
    yield
    assert free(model) == before


def free(model: LanguageModel) -> int:
    return model.executor.pool.free


def text(length: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 262, length)]


def cold(model: LanguageModel, ids: list[int], count: int, options: SamplingOptions = GREEDY) -> list[int]:
    return list(model.stream(ids, count, options))


def warm(engine: Engine, ids: list[int], count: int, options: SamplingOptions = GREEDY) -> list[int]:
    return list(engine.tokens(Request(tuple(ids), count, options)))


def test_a_conversation_equals_cold_runs(model: LanguageModel) -> None:
    """Each turn holds the last one and its answer; only the new part is computed. Many, for near ties."""
    with model.engine() as engine:
        for seed in range(0, 120, 4):
            ids: list[int] = []
            for turn in range(4):
                ids += text(3 + 3 * turn, seed + turn)
                before = engine.stats().prefix_hit_tokens
                answer = warm(engine, ids, 6)
                assert answer == cold(model, ids, 6), f"seed {seed}, turn {turn}"
                if turn == 3 and model.executor.name != "amx" and model.config.architecture != "phi3":
                    assert engine.stats().prefix_hit_tokens > before
                ids += answer


def test_another_text_with_the_same_start(model: LanguageModel) -> None:
    start = text(30)
    with model.engine() as engine:
        for ids in (start, start[:20] + text(9, 1), start[:20], start[:1], text(8, 2), start):
            assert warm(engine, ids, 4) == cold(model, ids, 4)


def test_sampled_tokens_do_not_depend_on_what_was_kept(model: LanguageModel) -> None:
    options, ids = SamplingOptions(temperature=1.0, seed=5, ignore_eos=True), text(25)
    with model.engine() as engine:
        warm(engine, ids[:18], 3)
        assert warm(engine, ids, 12, options) == cold(model, ids, 12, options)


def test_the_end_token_comes_last(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(12)
    tokens = cold(model, ids, 20)
    monkeypatch.setattr(type(model.tokenizer), "eos_ids", property(lambda _: (tokens[5],)))
    assert cold(model, ids, 20, SamplingOptions()) == tokens[: tokens.index(tokens[5]) + 1]
    assert cold(model, ids, 20) == tokens


def test_a_full_context_ends_the_answer(model: LanguageModel) -> None:
    assert len(cold(model, text(CONTEXT - 3), 100)) == 3
    assert len(cold(model, text(CONTEXT - 1), 100)) == 1
    assert cold(model, text(CONTEXT), 0) == []


@pytest.mark.parametrize(
    "ids, count, word",
    [
        ([], 5, "empty"),
        ([], 0, "empty"),
        (text(3), -1, "-1 new"),
        (text(CONTEXT), 1, "96 tokens"),
        (text(CONTEXT + 1), 0, "97 tokens"),
        (text(1000), 5, "1000 tokens"),
        ([*text(10), 263], 3, "263"),
        ([*text(10), -1], 3, "-1"),
        ([*text(10), 2**30], 3, str(2**30)),
    ],
    ids=lambda value: str(value)[:12],
)
def test_requests_that_cannot_be(model: LanguageModel, ids: list[int], count: int, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        model.stream(ids, count, GREEDY)  # at once, not at the first token
    assert caught.value.hint


def test_one_that_cannot_be_among_many_is_said_before_any_work(model: LanguageModel) -> None:
    with model.engine() as engine:
        with pytest.raises(UsageError, match="263"):
            engine.run([Request(tuple(text(5)), 3), Request((263,), 3)])
        assert engine.stats().requests == 0


def test_hints_name_a_context_that_the_model_has(model: LanguageModel) -> None:
    limit = model.config.context
    for length, helps in [(CONTEXT, True), (limit + 1, False)]:
        with pytest.raises(UsageError) as caught:
            model.stream(text(length), 1, GREEDY)
        assert ("--context" in str(caught.value.hint)) == helps and str(limit) in str(caught.value.hint)


def test_a_stream_left_early(model: LanguageModel) -> None:
    before = free(model)
    stream = model.stream(text(40), 20, GREEDY)
    assert free(model) == before  # nothing is done before the first token is asked for
    next(stream)
    assert free(model) < before
    stream.close()
    assert free(model) == before
    next(model.stream(text(40), 20, GREEDY))  # dropped at once
    assert free(model) == before
    model.stream(text(40), 20, GREEDY)  # dropped before it began
    assert free(model) == before


def test_more_requests_than_run_or_wait_at_once(model: LanguageModel) -> None:
    """23 requests, six run, two may wait: all are answered, each as it would be alone."""
    prompts = [text(3 + i % 5, i) for i in range(23)]
    made: dict[str, list[int]] = {str(i): [] for i in range(23)}
    with model.engine(ServingOptions(max_waiting=2)) as engine:
        for output in engine.run([Request(tuple(p), 4, GREEDY, id=str(i)) for i, p in enumerate(prompts)]):
            made[output.request_id] += output.token_ids
    assert list(made.values()) == [cold(model, prompt, 4) for prompt in prompts]


def test_one_that_fails_says_so(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream(text(20), 9, GREEDY)
    next(stream)
    monkeypatch.setattr("hasten.engine.answer.Answer.take", lambda *_: 1 // 0)
    with pytest.raises(HastenError, match="ZeroDivisionError"):
        list(stream)


class Break:
    """Ctrl-C in the middle of some step: raises before or after the native call."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
        real, self.left = model.executor._compute, at

        def compute(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not after:
                raise KeyboardInterrupt
            out = real(*args)
            if self.left == 0:
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(model.executor, "_compute", compute)


@pytest.mark.parametrize("at", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("after", [False, True])
def test_interrupted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    """35 tokens are five chunks of 7: Ctrl-C between them, or new tokens, leaves an engine that works."""
    ids, plain = text(35), ServingOptions(speculate=False)  # every token is a step
    with model.engine(plain) as engine:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Break(model, patch, at, after)
            warm(engine, ids, 9)
        assert warm(engine, ids, 9) == cold(model, ids, 9)


@pytest.mark.parametrize("seed", range(2))
def test_many_random_requests(model: LanguageModel, seed: int) -> None:
    """Streams and batches on one engine and beside it, left early, in error: always cold runs' tokens."""
    rng = np.random.default_rng(seed)
    stems = [text(60, s) for s in range(3)]
    with model.engine() as engine:
        for _ in range(30):
            stem = stems[rng.integers(3)]
            ids = stem[: rng.integers(1, 60)] + text(int(rng.integers(0, 12)), int(rng.integers(100)))
            count = int(rng.integers(0, 8))
            match rng.integers(5):
                case 0:
                    stream = engine.tokens(Request(tuple(ids), 8, GREEDY))
                    for _ in range(min(count, 8)):
                        next(stream)
                    del stream
                case 1:
                    with pytest.raises(UsageError):
                        warm(engine, [*ids, 999], 3)
                case 2:
                    for output in engine.run([Request(tuple(one), 4, GREEDY) for one in (ids, ids[:1])]):
                        if output.index == count % 2:
                            break
                case _:
                    assert warm(engine, ids, count) == cold(model, ids, count)
