"""The way of every request that generates: engine outputs into a response, whole or as they come."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hasten.serve.feed import Feed, News
from hasten.serve.heartbeat import Heartbeat
from hasten.serve.prepare import Asker
from hasten.serve.problem import Problem, problem_of

if TYPE_CHECKING:
    from hasten.engine.request import Request
    from hasten.serve.exchange import Exchange
    from hasten.serve.pool import Served
    from hasten.serve.protocol.strict import Strict
    from hasten.serve.tally import Tally


class Response(Protocol):
    """What forms the answer: `take` and `document`, or `chunks` and `last` or `failed`."""

    tally: Tally

    def take(self, news: Sequence[News]) -> None: ...

    def document(self) -> dict[str, Any]: ...

    def chunks(self, news: Sequence[News]) -> bytes: ...

    def last(self) -> bytes: ...

    def failed(self, problem: Problem) -> bytes: ...


@dataclass(frozen=True)
class Question:
    """What is asked of which model."""

    served: Served
    spec: Strict
    requests: Sequence[Request]
    stream: bool


def asker_of(exchange: Exchange) -> Asker:
    """Who asks. The engine's id is the request's own and a few random digits: clients may repeat theirs."""
    call = exchange.call
    return Asker(call.client, f"{call.request_id}-{secrets.token_hex(4)}")


async def respond(
    exchange: Exchange, question: Question, response: Response, keep: Callable[[], None] = lambda: None
) -> None:
    """Run requests and answer. `keep` is called when the answer is whole, before its end is sent: what it
    stores is there when the client asks for it.

    The headers of a stream go out with its first token or heartbeat, so that until then an error can have its
    own status. A stream that breaks off, the server's end included, says so in an event.

    Raises:
        Problem, HastenError: before anything was sent.
    """
    async with AsyncExitStack() as stack:
        batches = await _batches(exchange, question, response, stack)
        if not question.stream:
            async for news in batches:
                response.take(news)
            keep()
            await exchange.json(response.document())
            return
        try:
            with Heartbeat(exchange):
                async for news in batches:
                    data = response.chunks(news)
                    if data:
                        await exchange.events(data)
        except asyncio.CancelledError:
            call = exchange.call
            if call.started and not (call.left or call.stalled):  # silence would pass for the end
                await _break_off(exchange, response, Problem(503, "the server is stopping", code="stopping"))
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if not exchange.call.started:
                raise
            await _break_off(exchange, response, problem_of(error))
            return
        keep()
        await exchange.end(response.last())


async def _break_off(exchange: Exchange, response: Response, problem: Problem) -> None:
    exchange.call.fields["error"] = problem.message
    await exchange.end(response.failed(problem))


async def _batches(
    exchange: Exchange, question: Question, response: Response, stack: AsyncExitStack
) -> AsyncIterator[list[News]]:
    """The outputs: from memory where they are known, else from the engine, and then remembered."""
    service, served = exchange.service, question.served
    key = None
    if service.memory is not None:
        memory = service.memory
        key = await exchange.work(lambda: memory.key(served, question.spec, question.requests))
        known = memory.recall(key) if key is not None else None
        if known is not None:
            response.tally.remembered()
            return _once(known)
    feed = await stack.enter_async_context(Feed(served.engine, question.requests))
    if key is None and service.recorder is None:
        return feed.batches()
    return _noted(exchange, question, feed, key)


async def _once(news: list[News]) -> AsyncIterator[list[News]]:
    yield news


async def _noted(
    exchange: Exchange, question: Question, feed: Feed, key: str | None
) -> AsyncIterator[list[News]]:
    """The outputs as they come; recorded, and remembered under `key`, when all of them are there."""
    service = exchange.service
    said: list[News] = []
    recording = service.recorder.follow(question.served, question.requests) if service.recorder else None
    async for news in feed.batches():
        if key is not None:
            said += news
        if recording is not None:
            recording.take(news)
        yield news
    if key is not None and service.memory is not None:
        service.memory.keep(key, said)
