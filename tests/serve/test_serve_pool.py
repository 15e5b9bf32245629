"""Several models in one server: loaded when asked for, dropped when unused, never under a request."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from running_server import Running, chat, serving, wait_for
from stand_in_engine import StandInEngine, StandInModel

from hasten.engine.async_engine import EngineClosed
from hasten.errors import ModelError, UsageError
from hasten.serve import pool
from hasten.serve.call import Problem
from hasten.serve.options import ServeOptions, names_of
from hasten.serve.pool import ModelPool

PATH = "/v1/chat/completions"


def test_names_come_from_what_is_served() -> None:
    given = ["/a/b/qwen.hasten", "x/y.gguf", "Qwen/Qwen3-0.6B", "demo", "fast=z.hasten"]
    assert list(names_of(given)) == ["qwen", "y", "Qwen/Qwen3-0.6B", "demo", "fast"]
    assert names_of(["fast=z.hasten"]) == {"fast": "z.hasten"}
    for wrong in ([], ["a/x.gguf", "b/x.gguf"], ["x="]):
        with pytest.raises(UsageError):
            names_of(wrong)


def loaded(server: Running) -> list[str]:
    return [entry["id"] for entry in server.ask("/v1/models").json["data"] if entry["loaded"]]


def test_models_take_turns_in_memory() -> None:
    engines = {"a": StandInEngine("A"), "b": StandInEngine("B"), "c": StandInEngine("C")}
    with serving(ServeOptions(port=0, log=False, max_loaded=2), engines) as server:
        assert loaded(server) == ["a"]
        for name in ("b", "a", "c"):
            reply = server.ask(PATH, chat(model=name)).json
            assert (reply["model"], reply["choices"][0]["message"]["content"]) == (name, name.upper())
        assert loaded(server) == ["a", "c"]  # b was the longest unused
        assert engines["b"].closed
        assert server.models["b"].closed
        assert not engines["a"].closed
        assert server.ask(PATH, chat()).json["model"] == "a"  # the first is the default


def test_a_model_in_use_is_waited_for() -> None:
    engines = {"a": StandInEngine("A" * 20, delay_s=0.02), "b": StandInEngine("B")}
    with serving(ServeOptions(port=0, log=False, max_loaded=1), engines) as server:
        answers: dict[str, Any] = {}

        def ask(name: str) -> None:
            answers[name] = server.ask(PATH, chat(model=name)).json["choices"][0]["message"]["content"]

        first = threading.Thread(target=ask, args=("a",))
        first.start()
        wait_for(lambda: engines["a"].running == 1)
        ask("b")
        first.join()
        assert answers == {"a": "A" * 20, "b": "B"}  # a's answer was not cut short for b
        assert engines["a"].closed
        ask("a")  # and comes back, while nobody uses b
        assert loaded(server) == ["a"]


def test_a_model_that_cannot_be_loaded_fails_its_requests_alone() -> None:
    good = StandInEngine("A")

    def load(ref: str) -> tuple[Any, Any]:
        if ref == "b":
            raise ModelError("b is damaged", hint="download it again")
        return StandInModel(ref), good

    with serving(ServeOptions(port=0, log=False), {"a": good, "b": good}, load) as server:
        reply = server.ask(PATH, chat(model="b"))
        assert (reply.status, reply.error["code"]) == (503, "load_failed")
        assert "b is damaged" in reply.error["message"]
        assert server.ask(PATH, chat(model="a")).status == 200


def test_one_load_serves_all_who_wait_and_outlives_a_client() -> None:
    loads = []
    gate = threading.Event()

    def load(ref: str) -> tuple[Any, Any]:
        loads.append(ref)
        gate.wait(5)
        return StandInModel(ref), StandInEngine()

    async def scenario() -> None:
        pool = ModelPool({"a": "a"}, load, 1)

        async def use() -> str:
            async with pool.use("a") as served:
                return served.name

        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert done[1:] == ["a"] * 4
        assert loads == ["a"]
        with pytest.raises(Problem):
            await use_unknown(pool)
        await pool.close()

    async def use_unknown(pool: ModelPool) -> None:
        async with pool.use("A"):
            pass

    asyncio.run(scenario())


def test_an_engine_that_failed_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_LOOK_S", 60.0)
    engines = [StandInEngine(error=EngineClosed("the engine failed")), StandInEngine("fine")]
    spare = iter(engines)
    with serving(
        ServeOptions(port=0, log=False), {"a": engines[0]}, lambda ref: (StandInModel(ref), next(spare))
    ) as server:
        reply = server.ask(PATH, chat())
        assert (reply.status, reply.error["code"]) == (503, "engine_stopped")
        assert server.ask("/ready").status == 503
        assert server.ask(PATH, chat()).json["choices"][0]["message"]["content"] == "fine"
        assert engines[0].closed
        assert server.ask("/ready").status == 200


def test_a_request_has_an_engine_loaded_anew_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No request has to fail first."""
    monkeypatch.setattr(pool, "_LOOK_S", 60.0)
    engines = [StandInEngine("old"), StandInEngine("new")]
    spare = iter(engines)
    with serving(
        ServeOptions(port=0, log=False), {"a": engines[0]}, lambda ref: (StandInModel(ref), next(spare))
    ) as server:
        assert server.ask("/ready").status == 200
        engines[0].failed = True
        assert server.ask("/ready").status == 503
        assert server.ask(PATH, chat()).json["choices"][0]["message"]["content"] == "new"
        assert engines[0].closed and server.ask("/ready").status == 200


def test_a_model_whose_engine_failed_comes_back_though_nobody_asks() -> None:
    """After a load that fails, too: a second later."""
    engines = [StandInEngine("old"), StandInEngine("new")]
    spare = iter(engines)
    loads: list[str] = []

    def load(ref: str) -> Any:
        loads.append(ref)
        if len(loads) == 2:
            raise ModelError("no memory just now")
        return StandInModel(ref), next(spare)

    with serving(ServeOptions(port=0, log=False), {"a": engines[0]}, load) as server:
        engines[0].failed = True
        wait_for(lambda: len(loads) == 3)
        wait_for(lambda: server.ask("/ready").status == 200)
        assert engines[0].closed
        assert server.ask(PATH, chat()).json["choices"][0]["message"]["content"] == "new"


def test_an_engine_that_fails_again_and_again_gets_ever_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load(ref: str) -> Any:
        loads.append(ref)
        return StandInModel(ref), StandInEngine(failed=True) if len(loads) > 1 else first

    first = StandInEngine()
    with serving(ServeOptions(port=0, log=False), {"a": first}, load) as server:
        first.failed = True
        wait_for(lambda: len(loads) == 3)  # at once, and a second later
        reply = server.ask(PATH, chat())
        assert (reply.status, reply.error["code"]) == (503, "engine_stopped")
        assert 1 <= int(reply.headers["retry-after"]) <= 2 and len(loads) == 3
    falls, now = pool._Falls(), [1000.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    waits = []
    for _ in range(9):
        now[0] += max(0.0, falls.wait_s)
        falls.begin()
        now[0] += 20  # what the load takes is no time that the engine ran
        falls.end()
        waits.append(falls.wait_s)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now[0] += pool._FORGOTTEN_S
    falls.begin()
    assert falls.count == 1


def test_a_model_that_comes_back_takes_no_place_from_one_that_is_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_LOOK_S", 0.02)
    loads: list[str] = []
    began, go = threading.Event(), threading.Event()
    engines = {"a": StandInEngine("a"), "b": StandInEngine("b")}

    def load(ref: str) -> Any:
        loads.append(ref)
        if ref == "b":
            began.set()
            assert go.wait(10)
        return StandInModel(ref), engines[ref]

    with serving(ServeOptions(port=0, log=False, max_loaded=1), engines, load) as server:
        asked = threading.Thread(target=server.ask, args=(PATH, chat(model="b")), daemon=True)
        asked.start()
        assert began.wait(10)  # a has left its place to b
        known: ModelPool = server.server.service.pool
        known._down.add("a")
        time.sleep(0.2)  # ten looks
        go.set()
        asked.join(10)
        wait_for(lambda: not known._down)
        assert loads == ["a", "b"] and not engines["b"].closed


def test_two_models_that_share_one_place_both_get_on() -> None:
    loads: list[str] = []

    def load(ref: str) -> Any:
        loads.append(ref)
        return StandInModel(ref), StandInEngine(ref.upper())

    engines = {"a": StandInEngine(), "b": StandInEngine()}
    answers: list[tuple[str, str]] = []

    def ask(server: Running, first: int) -> None:
        for turn in range(4):
            name = "ab"[(first + turn) % 2]
            reply = server.ask(PATH, chat(model=name)).json
            answers.append((name, reply["choices"][0]["message"]["content"]))

    with serving(ServeOptions(port=0, log=False, max_loaded=1), engines, load) as server:
        threads = [threading.Thread(target=ask, args=(server, i), daemon=True) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), f"{len(loads)} loads and no answer"
    assert sorted(answers) == sorted([("a", "A"), ("b", "B")] * 12)
    assert len(loads) <= 25


def test_who_leaves_while_a_model_loads_keeps_no_place() -> None:
    go = threading.Event()

    def load(ref: str) -> Any:
        if ref == "b":
            assert go.wait(10)
        return StandInModel(ref), StandInEngine()

    async def run() -> None:
        pool = ModelPool({"a": "a", "b": "b"}, load, most=1)

        async def use(name: str) -> None:
            async with pool.use(name):
                pass

        waiting = asyncio.create_task(use("b"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        go.set()
        await asyncio.wait_for(use("a"), 5)  # b must go for it: nobody uses b
        await asyncio.wait_for(use("b"), 5)
        await pool.close()

    asyncio.run(run())
