"""Sessions: what is kept changes nothing, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions
from hasten.engine.model import LanguageModel
from hasten.engine.sampling import SamplingOptions
from hasten.engine.session import Session
from hasten.errors import UsageError

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


def test_a_conversation_equals_cold_runs(model: LanguageModel) -> None:
    """Each turn holds the last one and its answer; only the new part is computed. Many, for near ties."""
    for seed in range(0, 120, 4):
        session = model.session()
        ids: list[int] = []
        for turn in range(4):
            ids += text(3 + 3 * turn, seed + turn)
            answer = list(session.stream(ids, 6, GREEDY))
            assert answer == cold(model, ids, 6), f"seed {seed}, turn {turn}"
            ids += answer
            # at most all but the last token, which no one has asked about yet
            assert len(ids) - 6 <= session.cached_tokens < len(ids)
        session.close()
        assert session.cached_tokens == 0


def test_another_text_with_the_same_start(model: LanguageModel) -> None:
    session, start = model.session(), text(30)
    for ids in (start, start[:20] + text(9, 1), start[:20], start[:1], text(8, 2), start):
        assert list(session.stream(ids, 4, GREEDY)) == cold(model, ids, 4)
    session.close()


def test_the_same_text_again(model: LanguageModel) -> None:
    """The last token is computed again: its hidden state was not kept."""
    session, ids = model.session(), text(40)
    first = list(session.stream(ids, 8, GREEDY))
    assert list(session.stream(ids, 8, GREEDY)) == first
    session.close()


def test_sampled_tokens_do_not_depend_on_what_was_kept(model: LanguageModel) -> None:
    options = SamplingOptions(temperature=1.0, seed=5, ignore_eos=True)
    session, ids = model.session(), text(25)
    list(session.stream(ids[:18], 3, GREEDY))
    assert list(session.stream(ids, 12, options)) == cold(model, ids, 12, options)
    session.close()


def test_truncate(model: LanguageModel) -> None:
    session, ids = model.session(), text(50)
    list(session.stream(ids, 1, GREEDY))
    for length in (80, 50, 33, 32, 31, 1, 0, 0, -4):
        session.truncate(length)
        assert session.cached_tokens == max(0, min(length, 50))
    list(session.stream(ids, 1, GREEDY))
    session.truncate(20)
    assert list(session.stream(ids, 5, GREEDY)) == cold(model, ids, 5)
    session.close()


def test_the_end_token_comes_last(model: LanguageModel) -> None:
    ids = text(12)
    tokens = cold(model, ids, 20)
    end = tokens[5]
    session = Session(model.executor, [end])
    wanted = tokens[: tokens.index(end) + 1]
    assert list(session.stream(ids, 20, SamplingOptions())) == wanted
    assert list(session.stream(ids, 20, GREEDY)) == tokens
    session.close()


def test_a_full_context_ends_the_answer(model: LanguageModel) -> None:
    ids = text(CONTEXT - 3)
    assert len(cold(model, ids, 100)) == 3
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
    ],
    ids=lambda value: str(value)[:12],
)
def test_requests_that_cannot_be(model: LanguageModel, ids: list[int], count: int, word: str) -> None:
    session = model.session()
    with pytest.raises(UsageError, match=word) as caught:
        session.stream(ids, count, GREEDY)  # at once, not at the first token
    assert caught.value.hint
    with pytest.raises(UsageError, match=word):
        model.stream(ids, count, GREEDY)


def test_hints_name_a_context_that_the_model_has(model: LanguageModel) -> None:
    limit = model.config.context_length
    for length, helps in [(CONTEXT, True), (limit + 1, False)]:
        with pytest.raises(UsageError) as caught:
            model.session().stream(text(length), 1, GREEDY)
        assert ("--context" in str(caught.value.hint)) == helps and str(limit) in str(caught.value.hint)


@pytest.mark.parametrize("bad", [263, -1, 2**30])
def test_ids_outside_the_vocabulary(model: LanguageModel, bad: int) -> None:
    session = model.session()
    with pytest.raises(UsageError, match=f"{bad}"):
        list(session.stream([*text(10), bad], 3, GREEDY))
    assert list(session.stream(text(10), 3, GREEDY)) == cold(model, text(10), 3)
    session.close()


def test_nothing_asked_for(model: LanguageModel) -> None:
    session = model.session()
    assert list(session.stream(text(10), 0, GREEDY)) == [] and session.cached_tokens == 0


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


def test_a_session_that_is_dropped(model: LanguageModel) -> None:
    before = free(model)
    list(model.session().stream(text(40), 2, GREEDY))
    assert free(model) == before


@pytest.mark.parametrize("spoil", ["stream", "truncate", "close"])
def test_a_stream_whose_session_went_on(model: LanguageModel, spoil: str) -> None:
    """It cannot go on: its keys are gone. An error, not another text."""
    session = model.session()
    stream = session.stream(text(20), 9, GREEDY)
    next(stream)
    if spoil == "stream":
        next(session.stream(text(11, 3), 2, GREEDY))
    elif spoil == "truncate":
        session.truncate(20)
    else:
        session.close()
    with pytest.raises(UsageError, match="session"):
        next(stream)
    session.close()


class Break:
    """Ctrl-C in the middle of some step: raises before or after the native call."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
        real, self.left = model.executor.step, at

        def step(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not after:
                raise KeyboardInterrupt
            out = real(*args, **options)
            if self.left == 0:
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(model.executor, "step", step)


@pytest.mark.parametrize("at", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("after", [False, True])
def test_interrupted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> None:
    """35 tokens are five chunks of 7: Ctrl-C between them, or new tokens, leaves a session that works."""
    session, ids = model.session(), text(35)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Break(model, patch, at, after)
        list(session.stream(ids, 9, GREEDY))
    assert session.cached_tokens <= 35 + 9
    assert list(session.stream(ids, 9, GREEDY)) == cold(model, ids, 9)
    session.close()


@pytest.mark.parametrize("seed", range(2))
def test_many_random_requests(model: LanguageModel, seed: int) -> None:
    """Three sessions and batches side by side, cut, left early, in error: always the tokens of cold runs."""
    rng = np.random.default_rng(seed)
    before, sessions = free(model), [model.session() for _ in range(3)]
    stems = [text(60, s) for s in range(3)]
    for _ in range(30):
        session, stem = sessions[rng.integers(3)], stems[rng.integers(3)]
        ids = stem[: rng.integers(1, 60)] + text(int(rng.integers(0, 12)), int(rng.integers(100)))
        count = int(rng.integers(0, 8))
        match rng.integers(6):
            case 0:
                session.truncate(int(rng.integers(0, 70)))
            case 1:
                stream = session.stream(ids, 8, GREEDY)
                for _ in range(min(count, 8)):
                    next(stream)
                del stream
            case 2:
                with pytest.raises(UsageError):
                    list(session.stream([*ids, 999], 3, GREEDY))
            case 3:
                for which, _ in model.stream_batch([ids, ids[:1]], 4, GREEDY):
                    if which == count % 2:
                        break
            case _:
                assert list(session.stream(ids, count, GREEDY)) == cold(model, ids, count)
        pages = sum(-(-s.cached_tokens // model.executor.page_tokens) for s in sessions)
        assert before - free(model) <= pages + len(sessions)  # a page may be ready for the next token
    for session in sessions:
        session.close()
    assert free(model) == before
