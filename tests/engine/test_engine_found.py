"""Faults that were found by reading the engine: each test failed before its repair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_engine import finish, gather, plain, random_prompt

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.grammar_compiler import GrammarState
from hasten.engine.model import LanguageModel
from hasten.engine.request import Pooling, Request
from hasten.engine.scheduler import Forecast
from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)
Load = Callable[..., LanguageModel]


@pytest.fixture
def load(tiny_folder: Callable[..., Path]) -> Load:
    def get(
        name: str = "qwen3", recipe: str = "bf16", pages: int | None = None, **options: Any
    ) -> LanguageModel:
        known = {"threads": 1, "context": 128, "max_sequences": 6, "prefill_chunk": 512, **options}
        model = hasten.load(tiny_folder(name), recipe, options=EngineOptions(**known))
        if pages is None:
            return model
        known["kv_gb"] = (pages + 0.5) * model.executor.page_bytes / 1e9
        return hasten.load(tiny_folder(name), recipe, options=EngineOptions(**known))

    return get


def test_pages_before_the_threshold_are_not_taken_for_those_after(load: Load) -> None:
    """LongRoPE, threshold at a page's end: pages with short factors must not be found by longer prompts."""
    model = load("phi3", "bf16")
    model.executor._long_threshold = 64
    first = Request(random_prompt(1, 60), 5, FOREVER)  # its 65th token is known when the 64th is computed
    answer = plain(model, first)
    assert len(first.prompt) + len(answer.tokens) == 65
    turn = Request((*first.prompt, *answer.tokens, 97, 98, 99), 8, SamplingOptions(1.0, ignore_eos=True))
    expected = plain(model, turn)
    for new in (5, 20):  # it ends at the threshold, or goes on
        with Engine(model, ServingOptions(speculate=False)) as engine:
            engine.add(replace(first, max_new_tokens=new))
            finish(engine)
            name = engine.add(turn)
            assert gather(finish(engine), name) == expected


@pytest.mark.parametrize("most", [1, 64])
def test_requests_that_run_wait_for_a_place_in_a_full_queue(load: Load, most: int) -> None:
    """Others fill the place and the queue when `run` begins; it adds its requests when they have ended."""
    model = load(max_sequences=1)
    first, second, third = (Request(random_prompt(seed, 20), 4, FOREVER) for seed in range(3))
    with Engine(model, ServingOptions(speculate=False, max_waiting=most)) as engine:
        engine.add(first)
        engine.step()
        engine.add(second)
        told = [token for output in engine.run([third]) for token in output.token_ids]
    assert told == plain(model, third).tokens


@pytest.mark.parametrize("pooling", ["none", "mean"])
def test_a_prompt_is_read_once_however_often_it_is_computed(load: Load, pooling: Pooling) -> None:
    """Preempted in its prompt and in its answer: logprobs and the mean are those of one computation."""
    model = load(max_sequences=1, prefill_chunk=16)
    wanted = Request(
        random_prompt(2, 50), 0 if pooling == "mean" else 8, FOREVER, prompt_logprobs=1, pooling=pooling
    )

    def result(steps: Sequence[int]) -> tuple[Any, Any, int]:
        """Interrupted after so many of its steps by one of a higher priority."""
        with Engine(model, ServingOptions(prefix_cache=False, speculate=False)) as engine:
            name, outputs = engine.add(wanted), []
            for count in steps:
                for _ in range(count):
                    outputs += engine.step()
                engine.add(Request(random_prompt(9, 5), 2, FOREVER, priority=1))
                for _ in range(4):
                    outputs += engine.step()
            outputs += finish(engine)
            mine = [one for one in outputs if one.request_id == name]
            usage = mine[-1].usage
            assert usage is not None
            return (
                [one.prompt_logprobs for one in mine if one.prompt_logprobs],
                mine[-1].embedding,
                usage.preemptions,
            )

    expected, vector, _ = result([])
    assert len(expected) == 1
    for steps in ([2], [2, 1], [6]) if pooling == "none" else ([2], [1, 1]):
        logprobs, got, preemptions = result(steps)
        assert preemptions == len(steps)
        assert logprobs == expected
        if vector is not None:
            np.testing.assert_array_equal(got, vector)


@pytest.mark.parametrize("slots", [2, 6])
def test_every_one_of_n_has_the_prompt_s_logprobs(load: Load, slots: int) -> None:
    """Whether it found a place at once or had to wait."""
    model = load(max_sequences=slots)
    with Engine(model) as engine:
        engine.add(Request(random_prompt(3, 40), 5, FOREVER, n=4, prompt_logprobs=0, id="n"))
        outputs = finish(engine)
        several = [one.prompt_logprobs for one in outputs if one.prompt_logprobs is not None]
        assert len(several) == 4
        assert all(len(one) == 40 and one == several[0] for one in several)
        assert engine.stats().prompt_tokens < 2 * 40


def test_several_answers_of_no_tokens_end(load: Load) -> None:
    model = load()
    with Engine(model) as engine:
        engine.add(Request(random_prompt(3, 40), 0, n=3, pooling="last", id="n"))
        outputs = finish(engine)
        assert [(one.index, one.finish_reason) for one in outputs] == [(i, "length") for i in range(3)]
        for one in outputs:
            assert one.embedding is not None
            np.testing.assert_array_equal(one.embedding, outputs[0].embedding)


def test_a_grammar_that_fails_late_fails_its_own_request_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, among n > 1 and with drafts: `GrammarState.masks` may raise at any token."""
    model = load()
    other = Request(random_prompt(5, 20), 12, FOREVER, id="other")
    expected = plain(model, other)
    whole = GrammarState.masks

    def fails(state: GrammarState, drafts: Sequence[int]) -> Any:
        if len(state._accepted) == 3:
            state.failure = UsageError("the grammar needs too much work")
        return whole(state, drafts)

    with Engine(model) as engine:
        grammar = Grammar("regex", "[a-f]{9}")
        engine.compiler().compile(grammar)
        monkeypatch.setattr(GrammarState, "masks", fails)
        engine.add(Request(random_prompt(6, 20), 20, grammar=grammar, n=2, id="bad"))
        engine.add(other)
        outputs = finish(engine)
        assert gather(outputs, "other") == expected
        for index in range(2):
            bad = [one for one in outputs if one.request_id == "bad" and one.index == index]
            assert bad[-1].finish_reason == "error"
            assert "too much work" in bad[-1].error
            assert len(gather(outputs, "bad", index).tokens) == 3
    assert model.executor.pool.free == model.executor.pool.pages


def test_numbers_that_are_none_fail_their_own_request_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt logprobs of a model that overflows for one prompt."""
    model = load()
    other = Request(random_prompt(5, 20), 12, FOREVER, id="other")
    expected = plain(model, other)
    head, poisoned = model.executor.head, []

    def overflows(hidden: Any) -> Any:
        logits = head(hidden)
        if len(hidden) == 29:  # the prompt's rows but the last
            logits[7] = np.nan
            poisoned.append(True)
        return logits

    monkeypatch.setattr(model.executor, "head", overflows)
    with Engine(model) as engine:
        engine.add(Request(random_prompt(6, 30), 20, prompt_logprobs=0, n=2, id="bad"))
        engine.add(other)
        outputs = finish(engine)
        assert poisoned
        assert gather(outputs, "other") == expected
        bad = [one for one in outputs if one.request_id == "bad"]
        assert [(one.index, one.finish_reason) for one in bad] == [(0, "error"), (1, "error")]
        assert all("no numbers" in one.error for one in bad)
    assert model.executor.pool.free == model.executor.pool.pages


def test_each_answer_has_its_own_clock(load: Load) -> None:
    """One of n that has to wait gets its first token with the first one's prompt, and the rest later."""
    with Engine(load(max_sequences=1)) as engine:
        engine.add(Request(random_prompt(7, 40), 30, FOREVER, n=2))
        usages = [one.usage for one in finish(engine) if one.usage is not None]
        assert [usage.output_tokens for usage in usages] == [30, 30]
        first, second = usages
        assert first.ttft_ms is not None
        assert second.ttft_ms is not None
        assert first.queue_ms <= second.queue_ms <= second.ttft_ms
        assert second.ttft_ms >= first.ttft_ms
        assert second.e2e_ms > first.e2e_ms


def test_cached_tokens_are_prompt_tokens(load: Load) -> None:
    """A text that LongRoPE computes anew finds its own answer in the cache: that is no hit of the prompt."""
    model = load("phi3", "bf16")
    model.executor._long_threshold = 64
    with Engine(model, ServingOptions(speculate=False)) as engine:
        for _ in range(2):
            engine.add(Request(random_prompt(1, 40), 60, FOREVER))
            usage = finish(engine)[-1].usage
            assert usage is not None
            assert usage.cached_tokens < usage.prompt_tokens
        stats = engine.stats()
        assert stats.prefix_query_tokens == 80
        assert stats.prefix_hit_tokens < 80


def test_a_stream_that_ended_lets_its_id_go(load: Load) -> None:
    """A second request of that id is not cancelled when the first one's iterator goes."""
    with Engine(load()) as engine:
        asked = Request(random_prompt(8, 20), 4, FOREVER, id="same")
        first = engine.stream(asked)
        while next(first).finish_reason is None:
            pass
        second = engine.stream(asked)
        next(second)
        first.close()  # type: ignore[attr-defined]
        assert [one.finish_reason for one in second][-1] == "length"
        assert not engine.busy
        assert not engine._mail


def test_a_stream_that_nobody_reads_is_cancelled(load: Load) -> None:
    with Engine(load()) as engine:
        stream = engine.stream(Request(random_prompt(8, 20), 100, FOREVER))
        del stream
        assert engine.stats().cancelled == 1
        finish(engine)
        assert not engine._mail


def test_a_grammar_may_force_more_than_was_proposed(load: Load) -> None:
    """Tokens without a choice are drafts that no text proposed; the speculator takes them as they come."""
    model = load()
    asked = Request(
        random_prompt(4, 30), 40, grammar=Grammar("regex", "hello wonderful (old|new) world"), id="g"
    )
    with Engine(model) as engine:
        engine.add(asked)
        assert gather(finish(engine), "g") == plain(model, asked)
        assert engine.stats().accepted_tokens > 0


def test_one_slow_moment_does_not_refuse_all_deadlines() -> None:
    """Whoever is refused is not measured: a forecast that is far too long would stay so."""
    forecast = Forecast()
    for _ in range(9):
        forecast.observe(100, 0, 0.01)
        forecast.observe(0, 1, 0.001)
    usual = forecast.finish_s(100, 10, 1)
    forecast.observe(100, 0, 30.0)
    forecast.observe(0, 1, 30.0)
    late = forecast.finish_s(100, 10, 1)
    assert usual is not None
    assert late is not None
    assert usual < late < 2 * usual
    for _ in range(30):
        forecast.observe(0, 1, 0.005)  # it did become slower
    assert forecast.decode_s(1) == pytest.approx(0.005, rel=0.05)
