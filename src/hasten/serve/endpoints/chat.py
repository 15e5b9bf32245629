"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.serve.chat_shape import ChatShape
from hasten.serve.generate import Question, asker_of, respond
from hasten.serve.logprobs import TokenTexts
from hasten.serve.prepare import prepare_chat
from hasten.serve.problem import Problem
from hasten.serve.protocol.chat import ChatRequest
from hasten.serve.tally import Tally

if TYPE_CHECKING:
    from hasten.serve.exchange import Exchange


async def chat(exchange: Exchange) -> None:
    """Answer a conversation."""
    spec = await exchange.body(ChatRequest)
    check(spec)
    service = exchange.service
    async with service.pool.use(spec.model) as served:
        asker = asker_of(exchange)
        request, tools = await exchange.work(lambda: prepare_chat(spec, served, asker, service.options))
        reports = spec.stream_options or {}
        usage = bool(reports.get("include_usage"))
        shape = ChatShape(
            served.name,
            TokenTexts(lambda: served.token_bytes),
            Tally(service.metrics, served.name, exchange.call),
            request.n,
            usage,
            reader=tools.reader if tools else None,
            with_logprobs=request.logprobs is not None,
        )
        if usage and reports.get("continuous_usage_stats"):
            shape.report_running(len(request.prompt))
        await respond(exchange, Question(served, spec, [request], bool(spec.stream)), shape)


def check(spec: ChatRequest) -> None:
    """What one field alone cannot tell.

    Raises:
        Problem: fields contradict each other.
    """
    if spec.max_tokens is not None and spec.max_completion_tokens is not None:
        raise Problem(400, "max_tokens and max_completion_tokens are both given", param="max_tokens")
    if spec.top_logprobs is not None and not spec.logprobs:
        raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if spec.stream_options is not None and not spec.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options")
