"""`POST /v1/completions`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hasten.serve.generate import Question, asker_of, respond
from hasten.serve.logprobs import TokenTexts
from hasten.serve.prepare import Asker, encode, grammar_of, limit_of, request_of
from hasten.serve.problem import Problem
from hasten.serve.protocol.completion import CompletionRequest
from hasten.serve.shape import CompletionShape
from hasten.serve.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.engine.request import Request
    from hasten.serve.exchange import Exchange
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served

DEFAULT_TOKENS = 16  # OpenAI's


async def completions(exchange: Exchange) -> None:
    """Continue one or more texts as they stand."""
    spec = await exchange.body(CompletionRequest)
    if spec.stream_options is not None and not spec.stream:
        raise Problem(400, "stream_options needs stream: true", param="stream_options")
    service = exchange.service
    async with service.pool.use(spec.model) as served:
        asker = asker_of(exchange)
        requests = await exchange.work(lambda: prepare(spec, served, asker, service.options))
        reports = spec.stream_options or {}
        usage = bool(reports.get("include_usage"))
        tally = Tally(service.metrics, served.name, exchange.call)
        texts = TokenTexts(lambda: served.token_bytes)
        shape = CompletionShape(served.name, texts, tally, spec.n or 1, len(requests), usage)
        if usage and reports.get("continuous_usage_stats"):
            shape.report_running(sum(len(request.prompt) for request in requests))
        await respond(exchange, Question(served, spec, requests, bool(spec.stream)), shape)


def prompts_of(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> list[str | Sequence[int]]:
    """The four ways to write prompts (or inputs to embed) as one: a list of texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def prepare(spec: CompletionRequest, served: Served, asker: Asker, options: ServeOptions) -> list[Request]:
    """One request a prompt. In a worker thread."""
    grammar = grammar_of(spec, spec.response_format)
    asked = DEFAULT_TOKENS if spec.max_tokens is None else spec.max_tokens
    requests = []
    for number, text in enumerate(prompts_of(spec.prompt)):
        prompt = encode(served, text, options, spec.add_special_tokens is not False)
        limit = limit_of(asked, len(prompt), served, options)
        one = replace(asker, request_id=f"{asker.request_id}-{number}")
        requests.append(
            request_of(
                served, spec, prompt, one, max_new_tokens=limit, logprobs=spec.logprobs, grammar=grammar
            )
        )
    return requests
