"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.serve.chat_shape import ChatShape
from hasten.serve.generate import asker_of, respond
from hasten.serve.logprobs import TokenTexts
from hasten.serve.prepare import Asker, grammar_of, limit_of, messages_of, request_of
from hasten.serve.problem import Problem
from hasten.serve.protocol.chat import ChatRequest
from hasten.serve.tally import Tally

if TYPE_CHECKING:
    from hasten.engine.request import Request
    from hasten.serve.exchange import Exchange
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served


async def chat(exchange: Exchange) -> None:
    """Answer a conversation."""
    spec = await exchange.body(ChatRequest)
    check(spec)
    service = exchange.service
    async with service.pool.use(spec.model) as served:
        asker = asker_of(exchange)
        request = await service.work(lambda: prepare(spec, served, asker, service.options))
        usage = bool((spec.stream_options or {}).get("include_usage"))
        shape = ChatShape(
            served.name,
            TokenTexts(served.model.tokenizer),
            Tally(service.metrics, served.name, exchange.call),
            request.n,
            usage,
            with_logprobs=request.logprobs is not None,
        )
        await respond(exchange, served, [request], shape, bool(spec.stream))


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


def prepare(spec: ChatRequest, served: Served, asker: Asker, options: ServeOptions) -> Request:
    """The engine's request: template, tokens, limits and grammar. In a worker thread."""
    prompt = served.model.tokenizer.encode_chat(
        messages_of(spec.messages),
        spec.add_generation_prompt is not False,
        variables=spec.chat_template_kwargs,
    )
    asked = spec.max_tokens if spec.max_completion_tokens is None else spec.max_completion_tokens
    return request_of(
        spec,
        tuple(prompt),
        asker,
        max_new_tokens=limit_of(asked, len(prompt), served, options),
        logprobs=(spec.top_logprobs or 0) if spec.logprobs else None,
        grammar=grammar_of(spec, spec.response_format),
    )
