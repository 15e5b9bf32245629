"""The way of every request that generates: engine outputs into a response, whole or as they come."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hasten.serve.call import NO_FAULT, Problem, problem_of
from hasten.serve.kept import Recording
from hasten.serve.prepare import Asker
from hasten.serve.shape import Answer, News, TokenNumbers, TokenTexts

if TYPE_CHECKING:
    from hasten.engine.async_engine import AsyncEngine
    from hasten.engine.request import Output, Request
    from hasten.serve.body import DrawingFields, SamplingFields
    from hasten.serve.pool import Served
    from hasten.serve.service import Exchange

_FEW = 16  # outputs that are written in one piece: with 20 logprobs each they take a millisecond
AT_ONCE = 64
"""Requests of one call that the engine has at a time: more than it computes together, fewer than may wait, so
that a call with a thousand inputs neither fills the queue for others nor is refused by an idle engine."""


class Feed:
    """Collects outputs while the client is being written to: what waits goes out in one piece.

    What waits is bounded by the answers' own length. An async context manager: leaving it cancels what still
    runs, within one step of the engine.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._requests = requests
        self._coming = iter(enumerate(requests))
        self._news: list[News] = []
        self._arrived = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open = 0
        self._began = time.monotonic()
        self._only: AsyncGenerator[list[Output], None] | None = None

    async def __aenter__(self) -> Feed:
        if len(self._requests) == 1:  # no task between engine and client: each would cost a token's way 30 us
            self._only = self._engine.batches(self._requests[0])
            return self
        loop, self._open = asyncio.get_running_loop(), min(AT_ONCE, len(self._requests))
        self._tasks = [loop.create_task(self._pump()) for _ in range(self._open)]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._only is not None:
            await self._only.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def batches(self) -> AsyncIterator[list[News]]:
        """All news since the last batch, at least one.

        Raises:
            Problem: an answer ended by an error or its deadline.
            HastenError: what the engine says to a request it does not take.
        """
        if self._only is not None:
            async for outputs in self._only:
                yield [(0, _sound(output)) for output in outputs]
            return
        while self._open or self._news:
            await self._arrived.wait()
            self._arrived.clear()
            news, self._news = self._news, []
            if news:
                yield news
            if self._error is not None:
                raise self._error

    async def _pump(self) -> None:
        """Run one request after the other, as long as there are some."""
        try:
            for which, request in self._coming:
                asked = request if which < AT_ONCE else self._in_time(request)
                async with aclosing(self._engine.batches(asked)) as batches:
                    async for outputs in batches:
                        self._news += [(which, _sound(output)) for output in outputs]
                        self._arrived.set()
        except NO_FAULT:
            raise
        except BaseException as error:  # noqa: BLE001  the reader raises it, in the task that serves the client
            self._error = self._error or error
        finally:
            self._open -= 1
            self._arrived.set()

    def _in_time(self, request: Request) -> Request:
        """The request as it is when its turn comes: the deadline counts from the call's arrival."""
        if request.deadline_ms is None:
            return request
        left = request.deadline_ms - 1000 * (time.monotonic() - self._began)
        if left <= 0:
            raise Problem(504, "the deadline passed", code="deadline_exceeded")
        return replace(request, deadline_ms=left)


def _sound(output: Output) -> Output:
    """The output itself.

    Raises:
        Problem: it says that the answer broke off.
    """
    if output.finish_reason in ("error", "deadline", "cancelled"):
        raise _failure(output)
    return output


def _failure(output: Output) -> Problem:
    if output.finish_reason == "deadline":
        return Problem(504, output.error or "the deadline passed", code="deadline_exceeded")
    if output.finish_reason == "cancelled":
        return Problem(503, "the server stopped the request", code="cancelled")
    return Problem(500, output.error or "the answer could not be finished", code="generation_failed")


EVERY_S = 15.0
COMMENT = b": waiting\n\n"
"""A line that readers of server-sent events pass over. Source: WHATWG HTML, 9.2.7 (authoring notes)."""


class Heartbeat:
    """While it is entered, a stream that sent nothing for `EVERY_S` gets a comment, headers first.

    Costs a timer a stream; the task is made when the timer first runs out, which few streams live to see.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._exchange.sent = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._start)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        exchange = self._exchange
        while True:
            silent = time.monotonic() - exchange.sent
            if silent < EVERY_S:
                await asyncio.sleep(EVERY_S - silent)
            elif exchange.call.sending_since is None:
                await exchange.events(COMMENT)
            else:  # what was sent is not read yet: more would not help
                await asyncio.sleep(EVERY_S)


def asker_of(exchange: Exchange, served: Served) -> Asker:
    """Who asks. The engine's id is the request's own and a few random digits: clients may repeat theirs."""
    call = exchange.call
    return Asker(served, exchange.service.options, call.client, f"{call.request_id}-{secrets.token_hex(4)}")


def texts_of(spec: SamplingFields, served: Served) -> TokenTexts:
    """What spells tokens in this answer."""
    return TokenNumbers(served.texts) if spec.return_tokens_as_token_ids else served.texts


async def respond(
    exchange: Exchange,
    served: Served,
    spec: DrawingFields,
    requests: Sequence[Request],
    answer: Answer,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Run requests and answer. `keep` is called when the answer is whole, before its end is sent: what it
    stores is there when the client asks for it.

    The headers of a stream go out with its first token or heartbeat, so that until then an error can have its
    own status. A stream that breaks off, the server's end included, says so in an event.

    Raises:
        Problem, HastenError: before anything was sent.
    """
    async with AsyncExitStack() as stack:
        batches = await _batches(exchange, served, spec, requests, answer, stack)
        if not spec.stream:
            await _taken(exchange, answer, batches)
            keep()
            await exchange.json(
                await exchange.work(answer.document) if answer.is_checked else answer.document()
            )
            return
        try:
            with Heartbeat(exchange):
                async for batch in batches:
                    for news in _few(batch):
                        await _ready(exchange, answer, news)
                        if data := await _written(exchange, answer, news):
                            await exchange.events(data)
        except asyncio.CancelledError:
            call = exchange.call
            if call.started and not (call.left or call.stalled):  # silence would pass for the end
                await _break_off(exchange, answer, Problem(503, "the server is stopping", code="stopping"))
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if not exchange.call.started:
                raise
            await _break_off(exchange, answer, problem_of(error))
            return
        keep()
        await exchange.end(answer.last())


async def _taken(exchange: Exchange, answer: Answer, batches: AsyncIterator[list[News]]) -> None:
    async for batch in batches:
        for news in _few(batch):
            await _ready(exchange, answer, news)
            if _ends(answer, news):
                await exchange.work(partial(answer.take, news))
            else:
                answer.take(news)


async def _written(exchange: Exchange, answer: Answer, news: Sequence[News]) -> bytes:
    return await exchange.work(partial(answer.chunks, news)) if _ends(answer, news) else answer.chunks(news)


def _ends(answer: Answer, news: Sequence[News]) -> bool:
    """Whether an answer that is checked against a schema ends with these outputs: that takes a while."""
    return answer.is_checked and any(output.finish_reason is not None for _, output in news)


STOPPED = "response_cancelled"
"""The code that an answer is told when its client stopped it."""


async def make(
    exchange: Exchange, spec: DrawingFields, request: Request, answer: Answer, keep: Callable[[], None]
) -> None:
    """Make an answer that nobody waits for. What goes wrong is told in it, that it was stopped too; `keep` is
    called before and behind."""
    keep()
    try:
        async with exchange.service.pool.use(spec.model) as served, AsyncExitStack() as stack:
            await _taken(exchange, answer, await _batches(exchange, served, spec, [request], answer, stack))
    except asyncio.CancelledError:
        answer.failed(Problem(503, "the response was cancelled", code=STOPPED))
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001  a panic of a library too
        answer.failed(problem_of(error))
    keep()


def _few(batch: list[News]) -> list[list[News]]:
    """The same outputs, so few at a time that writing them keeps nobody else waiting."""
    return [batch] if len(batch) <= _FEW else [batch[at : at + _FEW] for at in range(0, len(batch), _FEW)]


async def _ready(exchange: Exchange, answer: Answer, news: Sequence[News]) -> None:
    if len(news) == _FEW:  # perhaps of very many: let others have a turn
        await asyncio.sleep(0)
    for which, output in news:
        if output.prompt_logprobs is not None:
            spell = partial(answer.spelled, output.prompt_logprobs)
            answer.prompt_logprobs[which] = await exchange.work(spell)


async def _break_off(exchange: Exchange, answer: Answer, problem: Problem) -> None:
    exchange.call.fields["error"] = problem.message
    await exchange.end(answer.failed(problem))


async def _batches(
    exchange: Exchange,
    served: Served,
    spec: DrawingFields,
    requests: Sequence[Request],
    answer: Answer,
    stack: AsyncExitStack,
) -> AsyncIterator[list[News]]:
    """The outputs: from memory where they are known, else from the engine, and then remembered."""
    service, memory = exchange.service, exchange.service.memory
    key = None
    if memory is not None:
        key, known = await exchange.work(lambda: memory.look(served, spec, requests))
        if known is not None:
            answer.tally.remembered()
            return _once(known)
    feed = await stack.enter_async_context(Feed(served.engine, requests))
    if key is None and service.recorder is None:
        return feed.batches()
    recording = Recording(service.recorder, served, requests) if service.recorder else None
    return _noted(exchange, feed, key, recording)


async def _once(news: list[News]) -> AsyncIterator[list[News]]:
    yield news


async def _noted(
    exchange: Exchange, feed: Feed, key: str | None, recording: Recording | None
) -> AsyncIterator[list[News]]:
    """The outputs as they come; recorded, and remembered under `key`, when all of them are there."""
    said: list[News] = []
    memory = exchange.service.memory
    async for news in feed.batches():
        if key is not None:
            said += news
        if recording is not None:
            recording.take(news)
        yield news
    if key is not None and memory is not None:
        await exchange.work(partial(memory.keep, key, said))
