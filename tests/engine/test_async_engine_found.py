"""Faults of the engine's thread that were found by reading it: each test failed before its repair."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import all_of, hold_after_a_step, until
from plain_engine import gather, plain, random_prompt

import hasten
from hasten.core import EngineOptions
from hasten.engine.async_engine import AsyncEngine, EngineClosed
from hasten.engine.grammar import Grammar
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=512, max_sequences=4, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "w4", options=options)


@pytest.fixture
def engine(model: LanguageModel) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(model)
    yield engine
    asyncio.run(asyncio.wait_for(engine.close(drain=False), 20))
    assert model.executor.pool.free == model.executor.pool.pages


def request(seed: int, new: int = 12, name: str = "") -> Request:
    return Request(random_prompt(seed, 30 + seed), new, FOREVER, id=name or f"r{seed}")


def go(body: Any) -> Any:
    return asyncio.run(asyncio.wait_for(body, 20))


class Gate:
    """Holds the engine's thread in front of a step."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there, self.open = threading.Event(), threading.Event()
        step = engine.engine.step

        def waits() -> list[Output]:
            outputs = step()
            self.there.set()
            assert self.open.wait(20)
            return outputs

        monkeypatch.setattr(engine.engine, "step", waits)


def test_a_loop_that_closed_harms_nobody_else(
    model: LanguageModel, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's loop ends while the engine is in the middle of a step of it."""
    gate = Gate(engine, monkeypatch)

    async def leaves() -> None:
        task = asyncio.create_task(all_of(engine.stream(request(1, 400))))
        await asyncio.to_thread(gate.there.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    go(leaves())
    gate.open.set()
    other = go(all_of(engine.stream(request(2))))
    assert gather(other, "r2") == plain(model, request(2))
    assert engine.stats().cancelled == 1


def test_a_loop_that_was_stopped_gets_its_requests_cancelled(engine: AsyncEngine) -> None:
    """Its tasks could not close their streams any more."""
    loop = asyncio.new_event_loop()

    async def first() -> None:
        streams.append(engine.stream(request(1, 400)))
        await anext(streams[0])

    streams: list[AsyncIterator[Output]] = []
    loop.run_until_complete(first())
    loop.close()

    async def others() -> None:
        await all_of(engine.stream(request(2)))
        await until(lambda: engine.stats().cancelled == 1)

    go(others())


def test_leaving_a_refused_duplicate_keeps_the_first(
    model: LanguageModel, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of an id is closed before it hears that it was refused."""
    gate = Gate(engine, monkeypatch)

    async def body() -> None:
        first = asyncio.create_task(all_of(engine.stream(request(1, 50, "same"))))
        await asyncio.to_thread(gate.there.wait)
        second = asyncio.create_task(all_of(engine.stream(request(2, 50, "same"))))
        await asyncio.sleep(0.02)
        second.cancel()
        gate.open.set()
        assert gather(await first, "same") == plain(model, request(1, 50))

    go(body())


def test_an_id_may_come_again_as_soon_as_it_was_left(
    model: LanguageModel, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new request does not get the old one's end."""
    gate = Gate(engine, monkeypatch)

    async def body() -> None:
        first = asyncio.create_task(all_of(engine.stream(request(1, 400, "same"))))
        await asyncio.to_thread(gate.there.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(all_of(engine.stream(request(2, 20, "same"))))
        await asyncio.sleep(0.02)
        gate.open.set()
        assert gather(await second, "same") == plain(model, request(2, 20))

    go(body())


def test_what_add_cannot_take_fails_alone(
    model: LanguageModel, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.engine.add

    def breaks(asked: Request) -> str:
        if asked.id == "r3":
            raise RuntimeError("broken")
        return add(asked)

    monkeypatch.setattr(engine.engine, "add", breaks)

    async def body() -> None:
        first = asyncio.create_task(all_of(engine.stream(request(1, 100))))
        with pytest.raises(RuntimeError, match="broken"):
            await all_of(engine.stream(request(3)))
        assert gather(await first, "r1") == plain(model, request(1, 100))

    go(body())


@pytest.mark.parametrize("failure", [RuntimeError("broken"), BaseException("panic")], ids=["error", "panic"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_waits_hears_of_a_failure(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """Even where the engine cannot cancel what is left, and whatever failed."""
    engine = AsyncEngine(model)
    entered, leave = threading.Event(), threading.Event()

    def fails() -> list[Output]:
        entered.set()
        assert leave.wait(20)
        raise failure

    def cannot(name: str) -> bool:
        raise RuntimeError("not a moment to cancel")

    cancel = engine.engine.cancel
    monkeypatch.setattr(engine.engine, "step", fails)
    monkeypatch.setattr(engine.engine, "cancel", cannot)

    async def body() -> None:
        tasks = [asyncio.create_task(all_of(engine.stream(request(seed)))) for seed in range(2)]
        await asyncio.to_thread(entered.wait)
        tasks.append(asyncio.create_task(all_of(engine.stream(request(5)))))
        await asyncio.sleep(0.02)
        tasks[1].cancel()
        await asyncio.sleep(0.02)
        leave.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, BaseException)
        await engine.close()

    go(body())
    monkeypatch.undo()
    for name in list(engine.engine._answers):
        cancel(name)
    engine.engine.close()
    assert model.executor.pool.free == model.executor.pool.pages


def test_closing_at_once_stays_at_once(engine: AsyncEngine) -> None:
    """Also if somebody else wants to drain."""

    async def body() -> None:
        goes_on = hold_after_a_step(engine)
        task = asyncio.create_task(all_of(engine.stream(request(1, 400))))
        await until(lambda: engine.stats().running == 1)
        engine._finish(drain=False)
        engine._finish(drain=True)
        goes_on.set()
        with pytest.raises(EngineClosed):
            await task

    go(body())


def test_refusals_are_counted_at_once(engine: AsyncEngine) -> None:
    async def body() -> None:
        with pytest.raises(UsageError):
            await all_of(engine.stream(Request(random_prompt(0, 600))))
        await until(lambda: engine.stats().refused == 1)

    go(body())


def test_grammars_that_wait_hear_that_the_engine_closed(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an error, not as a cancelled task: the one that is being read, and those behind it."""
    entered, leave = threading.Event(), threading.Event()

    def waits(_: Grammar) -> None:
        entered.set()
        assert leave.wait(20)

    monkeypatch.setattr(engine.engine.compiler(), "compile", waits)

    async def body() -> None:
        asked = (replace(request(seed), grammar=Grammar("regex", f"a{seed}")) for seed in range(3))
        tasks = [asyncio.create_task(all_of(engine.stream(one))) for one in asked]
        await asyncio.to_thread(entered.wait)
        await engine.close(drain=False)
        leave.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineClosed)

    go(body())
