"""A fault that belongs to one request ends that request alone, and no page is lost, whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_engine import finish, gather, plain, random_prompt

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine import async_engine
from hasten.engine.answer import Answer, AnswerText, PromptResults
from hasten.engine.async_engine import AsyncEngine, EngineClosed
from hasten.engine.engine import Engine
from hasten.engine.grammar import Grammar
from hasten.engine.grammar_compiler import GrammarState
from hasten.engine.keep import PrefixKeeper
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.engine.speculate import Speculator
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)


class Panic(BaseException):
    """As pyo3's PanicException: no `Exception`."""


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=6, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "w8", options=options)


@pytest.fixture(scope="module")
def small(tiny_folder: Callable[..., Path]) -> LanguageModel:
    """A cache of ten pages."""
    options = EngineOptions(threads=1, context=128, max_sequences=4, prefill_chunk=64)
    page = hasten.load(tiny_folder("qwen3"), "w8", options=options).executor.page_bytes
    few = EngineOptions(threads=1, context=128, max_sequences=4, prefill_chunk=64, kv_gb=10.5 * page / 1e9)
    return hasten.load(tiny_folder("qwen3"), "w8", options=few)


def check_pages(engine: Engine) -> None:
    """Of an engine without requests: every page is free or in the prefix cache, and there once."""
    pool, prefix = engine.model.executor.pool, engine._keeper._prefix
    assert prefix is not None
    held = [entry.page for entry in prefix._entries.values()]
    assert len(held) == len(set(held)), "a page is cached under two keys"
    assert all(pool.owners(page) == 1 for page in held)
    assert pool.free + len(held) == pool.pages


def after_calls(function: Callable[..., Any], is_bad: Callable[..., bool], wrong: BaseException) -> Any:
    """`function`, which fails for what `is_bad`."""

    def fails(*args: Any, **rest: Any) -> Any:
        if is_bad(*args):
            raise wrong
        return function(*args, **rest)

    return fails


def of(name: str) -> Callable[..., bool]:
    """Whether the second argument is an answer of this request."""
    return lambda _, answer, *rest: isinstance(answer, Answer) and answer.request.id == name


def bad_state(state: GrammarState, *_: Any) -> bool:
    return state._compiled.grammar.source == "bad+"


def compiled(engine: Engine, *grammars: Grammar | None) -> None:
    """Have them ready: compiling takes a few tokens on trial."""
    for grammar in grammars:
        if grammar is not None:
            engine.compiler().compile(grammar)


# (where, what fails there, for which calls): all that the engine does for one answer
PLACES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "masks": (GrammarState, "masks", bad_state),
    "accept": (GrammarState, "accept", bad_state),
    "forced": (GrammarState, "forced", bad_state),
    "begin": (PrefixKeeper, "begin", of("bad")),
    "catch up": (PrefixKeeper, "catch_up", of("bad")),
    "reserve": (PrefixKeeper, "reserve", of("bad")),
    "publish": (PrefixKeeper, "publish", of("bad")),
    "fork": (PrefixKeeper, "fork", of("bad")),
    "stop texts and text": (AnswerText, "push", lambda text, _: text.request.id == "bad"),
    "output": (Answer, "take", lambda answer, _: answer.request.id == "bad"),
    "prompt logprobs": (PromptResults, "read", lambda results, *rest: results.request.id == "bad"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrong", [RuntimeError("broken"), Panic("panic")], ids=["error", "panic"])
def test_one_request_fails_and_its_neighbours_go_on(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, place: str, wrong: BaseException
) -> None:
    good = [Request(random_prompt(seed, 40), 12, FOREVER, id=f"good{seed}") for seed in (1, 2)]
    good.append(Request(random_prompt(3, 33), 9, grammar=Grammar("regex", "[a-c]{4}"), id="good3"))
    expected = [plain(model, one) for one in good]
    bad = Request(
        random_prompt(9, 64),
        20,
        n=2,
        grammar=Grammar("regex", "bad+"),
        prompt_logprobs=0,
        stop=("zzz",),
        id="bad",
    )
    owner, name, is_bad = PLACES[place]
    with Engine(model) as engine:
        compiled(engine, bad.grammar, good[2].grammar)
        monkeypatch.setattr(owner, name, after_calls(getattr(owner, name), is_bad, wrong))
        for one in (good[0], bad, *good[1:]):
            engine.add(one)
        outputs = finish(engine)
        assert [gather(outputs, one.id) for one in good] == expected
        ends = [one for one in outputs if one.request_id == "bad" and one.finish_reason is not None]
        assert [one.index for one in sorted(ends, key=lambda one: one.index)] == [0, 1]
        failed = [one for one in ends if one.finish_reason == "error"]
        assert failed and all(type(wrong).__name__ in one.error for one in failed)
        assert "broken" not in failed[0].error, "an error's text may hold what another client said"
        check_pages(engine)


def test_a_prompt_of_whole_pages_that_fails_at_its_first_token_gives_its_pages_back(
    small: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one cut the shared page and kept it under a second key: after eight no page was left."""
    head, broken = small.executor.head, [True]

    def no_numbers(hidden: Any) -> Any:
        return np.full_like(head(hidden), np.nan) if broken[0] else head(hidden)

    monkeypatch.setattr(small.executor, "head", no_numbers)
    with Engine(small) as engine:
        for turn in range(12):
            engine.add(Request(random_prompt(turn, (32, 64, 96)[turn % 3]), 4, FOREVER))
            assert [one.finish_reason for one in finish(engine)] == ["error"]
            check_pages(engine)
        broken[0] = False
        asked = Request(random_prompt(77, 120), 8, FOREVER, id="after")
        engine.add(asked)
        assert gather(finish(engine), "after").finish == "length"
        check_pages(engine)


@pytest.mark.parametrize("seed", range(12))
def test_no_page_is_lost_whatever_happens(
    small: LanguageModel, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Failures at random places, cancelled and preempted answers, several answers, ten pages for all."""
    chance = random.Random(seed)
    grammars = [None, None, Grammar("regex", "[a-f]{3,9}"), Grammar("json_object")]
    engine = Engine(small)
    compiled(engine, *grammars)

    def now_and_then(*_: Any) -> bool:
        return chance.random() < 0.03

    for owner, name, _ in PLACES.values():
        wrong = Panic("panic") if chance.random() < 0.5 else RuntimeError("broken")
        monkeypatch.setattr(owner, name, after_calls(getattr(owner, name), now_and_then, wrong))
    decoder = small.executor._decoder

    def copy(source: int, target: int) -> None:
        if chance.random() < 0.2:
            raise RuntimeError("no copy")
        decoder.copy_page(source, target)

    monkeypatch.setattr(small.executor, "copy_page", copy)
    with engine:
        asked, ended = 0, 0
        for _ in range(120):
            if chance.random() < 0.4:
                length = chance.choice([1, 5, 31, 32, 33, 64, 90])
                engine.add(
                    Request(
                        random_prompt(chance.randrange(3), length),
                        chance.choice([0, 1, 5, 20]),
                        FOREVER,
                        n=chance.choice([1, 1, 3]),
                        grammar=chance.choice(grammars),
                        priority=chance.choice([0, 0, 1, 2]),
                        id=f"r{asked}",
                    )
                )
                asked += 1
            if engine._answers and chance.random() < 0.1:
                engine.cancel(chance.choice(sorted(engine._answers)))
            outputs = engine.step()
            ended += sum(one.finish_reason is not None for one in outputs)
        ended += sum(one.finish_reason is not None for one in finish(engine))
        assert ended >= asked
        assert not engine._scheduler.running and not engine._scheduler.waiting
        check_pages(engine)
    assert small.executor.pool.free == small.executor.pool.pages


def test_a_replaced_layer_leaves_nothing_stale(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The prefix cache and the disk below it held keys and values of the layer that went."""
    options = EngineOptions(threads=1, context=256, max_sequences=4, prefill_chunk=64)
    model = hasten.load(tiny_folder("qwen3"), "w8", options=options)
    name = next(name for name in model.packed.linears if "attn" in name or ".k" in name or "0" in name)
    # the next layer's: the same layer in fewer bits draws the same tokens on some machines
    other = model.packed.linears[name.replace(".0.", ".1.")]
    asked = Request(random_prompt(1, 100), 12, FOREVER, id="r")
    before = plain(model, asked)
    with Engine(model, ServingOptions(kv_disk=tmp_path / "kv")) as engine:
        engine.add(asked)
        assert gather(finish(engine), "r") == before
        running = Request(random_prompt(2, 100), 40, FOREVER, id="running")
        engine.add(running)
        outputs = [output for _ in range(12) for output in engine.step()]
        model.replace(name, other)
        after = plain(model, asked)
        assert after != before, "the layer changes nothing: the test cannot fail"
        engine.add(asked)
        outputs += finish(engine)
        assert gather(outputs, "r") == after
        usage = next(one.usage for one in outputs if one.request_id == "r" and one.usage is not None)
        assert usage.cached_tokens == 0
        made = gather(outputs, "running").tokens
        first = sum(len(one.token_ids) for one in outputs[:12] if one.request_id == "running")
        rest = Request((*running.prompt, *made[:first]), 40 - first, FOREVER)
        if model.executor.name != "amx":  # else the answer so far would be computed as prompt
            assert made[first:] == plain(model, rest).tokens
        check_pages(engine)
    fresh = hasten.load(tiny_folder("qwen3"), "w8", options=options)
    with Engine(fresh, ServingOptions(kv_disk=tmp_path / "kv")) as engine:
        engine.add(asked)
        assert gather(finish(engine), "r") == before


def test_speculation_that_fails_is_switched_off(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Speculator, "propose", after_calls(Speculator.propose, lambda *_: True, RuntimeError("broken"))
    )
    asked = Request(random_prompt(1, 40), 12, FOREVER, id="r")
    with Engine(model) as engine:
        engine.add(asked)
        assert gather(finish(engine), "r") == plain(model, asked)


# The engine's thread ----------------------------------------------------------------------------------------


@pytest.fixture
def served(model: LanguageModel) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(model, ServingOptions())
    yield engine
    asyncio.run(asyncio.wait_for(engine.close(drain=False), 20))
    assert model.executor.pool.free == model.executor.pool.pages


async def all_of(engine: AsyncEngine, asked: Request) -> list[Output]:
    return [output async for output in engine.stream(asked)]


@pytest.mark.parametrize("beside", [True, False])
def test_a_delivery_that_fails_cancels_that_request_alone(
    model: LanguageModel, served: AsyncEngine, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    listener_of = served._listeners
    put = async_engine._Listener.put

    def fails(listener: Any, news: Any) -> bool:
        if listener is listener_of.get("bad"):
            monkeypatch.setattr(listener, "loop", None)
        return put(listener, news)

    monkeypatch.setattr(async_engine._Listener, "put", fails)
    good = Request(random_prompt(1, 40), 30, FOREVER, id="good")

    async def body() -> None:
        bad = asyncio.create_task(all_of(served, Request(random_prompt(2, 40), 30, FOREVER, id="bad")))
        if beside:
            assert gather(await all_of(served, good), "good") == plain(model, good)
        while served.stats().cancelled == 0:  # counted at once: no other request's step need follow
            await asyncio.sleep(0.002)
        bad.cancel()

    asyncio.run(asyncio.wait_for(body(), 20))


@pytest.mark.parametrize("wrong", [RuntimeError("broken"), Panic("panic")], ids=["error", "panic"])
def test_a_request_that_cannot_be_added_is_refused_alone(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch, wrong: BaseException
) -> None:
    monkeypatch.setattr(served.engine, "_answers_of", after_calls(lambda _: [], lambda _: True, wrong))

    async def body() -> None:
        with pytest.raises(Exception, match=r"broken|panic"):
            await all_of(served, Request(random_prompt(2, 40), 3, FOREVER))
        monkeypatch.undo()
        assert len(await all_of(served, Request(random_prompt(2, 40), 3, FOREVER))) == 3

    asyncio.run(asyncio.wait_for(body(), 20))
    assert not served.failed


@pytest.mark.parametrize("wrong", [RuntimeError("broken"), Panic("panic")], ids=["error", "panic"])
def test_a_step_that_fails_ends_the_engine_with_an_error_of_ours(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch, wrong: BaseException
) -> None:
    """The native step is shared: nobody can be served any more, everybody hears it, nobody waits."""
    executor = served.engine.model.executor
    monkeypatch.setattr(executor, "collect", after_calls(lambda *_: [], lambda *_: True, wrong))

    async def body() -> None:
        asked = [Request(random_prompt(seed, 40), 30, FOREVER) for seed in range(3)]
        results = await asyncio.gather(*(all_of(served, one) for one in asked), return_exceptions=True)
        assert all(isinstance(one, EngineClosed) for one in results), results
        assert served.failed
        with pytest.raises(EngineClosed):
            await all_of(served, asked[0])

    asyncio.run(asyncio.wait_for(body(), 20))


def test_work_ahead_that_fails_harms_nobody(
    model: LanguageModel, served: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = served.engine._keeper
    settled = []

    def fails() -> bool:
        settled.append(keeper._unsettled.pop())
        raise RuntimeError("broken")

    monkeypatch.setattr(keeper, "settle", fails)
    keeper._unsettled.append(([97] * 40, ""))

    async def body() -> None:
        served._order(lambda: None)
        while not settled:
            await asyncio.sleep(0.01)
        asked = Request(random_prompt(1, 40), 8, FOREVER, id="r")
        assert gather(await all_of(served, asked), "r") == plain(model, asked)

    asyncio.run(asyncio.wait_for(body(), 20))
