"""The engine in a thread: many tasks at once, cancelling, refusals, closing, failing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from asking import all_of, hold_after_a_step, until
from plain_engine import gather, plain, random_prompt

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.async_engine import AsyncEngine, EngineClosed
from hasten.engine.grammar import Grammar
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.errors import QueueFull, UsageError
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)
Body = Callable[[AsyncEngine], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=4, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "w4", options=options)


@pytest.fixture
def run(model: LanguageModel) -> Callable[..., None]:
    """Runs a coroutine on a new engine; afterwards every page is free again."""

    def go(body: Body, **options: Any) -> None:
        async def main() -> None:
            engine = AsyncEngine(model, ServingOptions(**options))
            try:
                await asyncio.wait_for(body(engine), 60)
            finally:
                await engine.close(drain=False)

        asyncio.run(main())
        assert model.executor.pool.free == model.executor.pool.pages

    return go


def request(seed: int, new: int = 12, **rest: Any) -> Request:
    return Request(random_prompt(seed, 30 + seed), new, FOREVER, id=f"r{seed}", **rest)


def test_many_tasks_get_their_own(model: LanguageModel, run: Callable[..., None]) -> None:
    expected = [plain(model, request(seed)) for seed in range(9)]

    async def body(engine: AsyncEngine) -> None:
        outputs = await asyncio.gather(*(all_of(engine.stream(request(seed))) for seed in range(9)))
        for seed, mine in enumerate(outputs):
            assert {one.request_id for one in mine} == {f"r{seed}"}
            assert gather(mine, f"r{seed}") == expected[seed]
        stats = engine.stats()
        assert (stats.requests, stats.running, stats.waiting) == (9, 0, 0)

    run(body)


def test_closing_a_stream_cancels(run: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        stream = engine.stream(request(1, 200))
        first = await anext(stream)
        assert first.token_ids
        await stream.aclose()
        await until(lambda: engine.stats().cancelled == 1)
        assert engine.stats().running == 0

    run(body)


def test_a_cancelled_task_cancels(run: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        goes_on = hold_after_a_step(engine)
        task = asyncio.create_task(all_of(engine.stream(request(1, 200))))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()
        await until(lambda: engine.stats().cancelled == 1)

    run(body)


def test_several_answers(model: LanguageModel, run: Callable[..., None]) -> None:
    asked = Request(random_prompt(3, 40), 8, SamplingOptions(1.0, seed=2, ignore_eos=True), n=3, id="n")

    async def body(engine: AsyncEngine) -> None:
        outputs = await all_of(engine.stream(asked))
        for index in range(3):
            assert gather(outputs, "n", index) == plain(model, asked, index)

    run(body)


def test_refusals_are_raised(run: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(UsageError, match="the context holds"):
            await all_of(engine.stream(Request(random_prompt(0, 300))))
        with pytest.raises(UsageError):
            await all_of(engine.stream(request(1, grammar=Grammar("regex", "(unclosed"))))
        tasks = [asyncio.create_task(all_of(engine.stream(request(i, 100)))) for i in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        full = [one for one in results if isinstance(one, QueueFull)]
        assert 1 <= len(full) < 8
        assert all(isinstance(one, (list, QueueFull)) for one in results)

    run(body, max_waiting=1)


def test_an_error_of_one_grammar_is_not_the_end_of_the_engine(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(engine: AsyncEngine) -> None:
        def fail(grammar: Grammar) -> None:
            raise RuntimeError("out of stack")

        monkeypatch.setattr(engine.engine.compiler(), "compile", fail)
        with pytest.raises(RuntimeError, match="out of stack") as caught:
            await all_of(engine.stream(request(1, grammar=Grammar("regex", "a+"))))
        assert not isinstance(caught.value, EngineClosed)
        await all_of(engine.stream(request(2)))

    run(body)


def test_draining_ends_what_runs_and_takes_nothing_new(
    model: LanguageModel, run: Callable[..., None]
) -> None:
    async def body(engine: AsyncEngine) -> None:
        goes_on = hold_after_a_step(engine)
        task = asyncio.create_task(all_of(engine.stream(request(1, 60))))
        await until(lambda: engine.stats().running == 1)
        closing = asyncio.create_task(engine.close(drain=True))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosed):
            await all_of(engine.stream(request(2)))
        goes_on.set()
        assert gather(await task, "r1") == plain(model, request(1, 60))
        await closing

    run(body)


def test_closing_at_once_tells_those_who_wait(run: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        goes_on = hold_after_a_step(engine)
        task = asyncio.create_task(all_of(engine.stream(request(1, 200))))
        await until(lambda: engine.stats().running == 1)
        closing = asyncio.create_task(engine.close(drain=False))
        await asyncio.sleep(0)
        goes_on.set()
        await closing
        with pytest.raises(EngineClosed):
            await task

    run(body)


def test_a_failing_engine_tells_everybody(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(engine: AsyncEngine) -> None:
        def break_down() -> list[Output]:
            raise RuntimeError("broken")

        monkeypatch.setattr(engine.engine, "step", break_down)
        for _ in range(2):
            with pytest.raises((RuntimeError, EngineClosed)):
                await all_of(engine.stream(request(1)))

    run(body)


def test_idle_engines_settle_answers(model: LanguageModel, run: Callable[..., None]) -> None:
    async def body(engine: AsyncEngine) -> None:
        outputs = await all_of(engine.stream(request(1, 60)))
        answer = gather(outputs, "r1").tokens
        await until(lambda: not engine.engine.untidy)
        turn = Request((*request(1).prompt, *answer, 97, 98), 4, FOREVER)
        usage = (await all_of(engine.stream(turn)))[-1].usage
        assert usage is not None
        assert usage.cached_tokens >= 88

    run(body)
