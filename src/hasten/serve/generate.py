"""The way of every request that generates: engine outputs into a response, whole or as they come."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hasten.serve.feed import Feed, News
from hasten.serve.prepare import Asker
from hasten.serve.problem import Problem, problem_of

if TYPE_CHECKING:
    from hasten.engine.request import Request
    from hasten.serve.exchange import Exchange
    from hasten.serve.pool import Served


class Response(Protocol):
    """What forms the answer: `take` and `document`, or `chunks` and `last`."""

    def take(self, news: Sequence[News]) -> None: ...

    def document(self) -> dict[str, Any]: ...

    def chunks(self, news: Sequence[News]) -> bytes: ...

    def last(self) -> bytes: ...

    def failed(self, problem: Problem) -> bytes: ...


def asker_of(exchange: Exchange) -> Asker:
    """Who asks. The engine's id is the request's own and a few random digits: clients may repeat theirs."""
    call = exchange.call
    return Asker(call.client, f"{call.request_id}-{secrets.token_hex(4)}")


async def respond(
    exchange: Exchange, served: Served, requests: Sequence[Request], response: Response, stream: bool
) -> dict[str, Any] | None:
    """Run requests and answer; the document, where it was sent in one piece.

    The headers of a stream go out with its first token, so that until then an error can have its own status.

    Raises:
        Problem, HastenError: before anything was sent.
    """
    recorder = exchange.service.recorder
    recording = recorder.follow(served, requests) if recorder is not None else None
    async with Feed(served.engine, requests) as feed:
        if not stream:
            async for news in feed.batches():
                response.take(news)
                if recording is not None:
                    recording.take(news)
            document = response.document()
            await exchange.json(document)
            return document
        try:
            async for news in feed.batches():
                data = response.chunks(news)
                if recording is not None:
                    recording.take(news)
                if data:
                    await exchange.events(data)
        except Exception as error:
            if not exchange.call.started:
                raise
            problem = problem_of(error)
            exchange.call.fields["error"] = problem.message
            await exchange.end(response.failed(problem))
            return None
        await exchange.end(response.last())
        return None
