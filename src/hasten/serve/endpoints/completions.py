"""`POST /v1/completions`: the body, the form of the answer, the way between."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hasten.serve.body import SamplingFields, Text, TokenId
from hasten.serve.endpoints.chat import ResponseFormat
from hasten.serve.generate import asker_of, respond
from hasten.serve.prepare import Asker, grammar_of
from hasten.serve.problem import refused
from hasten.serve.shape import Part, Shape, dumps, finite, joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.engine.request import Output, Request
    from hasten.serve.service import Exchange

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=500_000, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class CompletionShape(Shape):
    """`/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _entries(self, part: Part, output: Output) -> list[tuple[str, ...]]:
        """Of each token: its text, its logprob, the likeliest ones, and where in the text it begins."""
        found: list[tuple[str, ...]] = []
        for one in output.logprobs:
            text = self.texts.text(one.token)
            top = {self.texts.text(token): finite(logprob) for token, logprob in reversed(one.top)}
            found.append((dumps(text), dumps(finite(one.logprob)), dumps(top or None), str(part.length)))
            part.length += len(text)
        return found

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        logprobs = dumps(_columns(self._entries(part, output)))
        end = "null"
        extra = ""
        if output.finish_reason is not None:
            end = f'"{output.finish_reason}"'
            extra = f',"stop_reason":{dumps(output.stop)}'
        prompt = self.prompt_logprobs.pop(number // self.answers, None)
        if prompt is not None:
            extra += f',"prompt_logprobs":{dumps(prompt)}'
        return (
            f'{self.head}{{"index":{number},"text":{encode_basestring(output.text)},"logprobs":{logprobs},'
            f'"finish_reason":{end}{extra}}}{self.tail}'
        )

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        choice = {
            "index": number,
            "text": part.text,
            "logprobs": _columns(part.logprobs),
            "finish_reason": part.finish,
            "stop_reason": part.stop,
        }
        prompt = self.prompt_logprobs.get(number // self.answers)
        return choice if prompt is None else {**choice, "prompt_logprobs": prompt}


def _columns(entries: list[tuple[str, ...]]) -> dict[str, Any] | None:
    """Completions have a list a column, not an object a token."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return dict(zip(names, map(joined, zip(*entries, strict=True)), strict=True)) if entries else None


DEFAULT_TOKENS = 16  # OpenAI's


async def completions(exchange: Exchange) -> None:
    """Continue one or more texts as they stand."""
    spec = await exchange.body(CompletionRequest)
    if spec.stream_options is not None and not spec.stream:
        raise refused("stream_options needs stream: true", "stream_options", None)
    async with exchange.service.pool.use(spec.model) as served:
        requests = await exchange.work(partial(prepare, spec, asker_of(exchange, served)))
        tally = exchange.tally(served.name)
        shape = CompletionShape(served.name, served.texts, tally, spec.n or 1, len(requests))
        shape.report(spec.stream_options, sum(len(request.prompt) for request in requests))
        await respond(exchange, served, spec, requests, shape)


def prompts_of(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
) -> list[str | Sequence[int]]:
    """The four ways to write prompts (or inputs to embed) as one: a list of texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def prepare(spec: CompletionRequest, asker: Asker) -> list[Request]:
    """One request a prompt. In a worker thread."""
    grammar = grammar_of(spec, spec.response_format)
    asked = DEFAULT_TOKENS if spec.max_tokens is None else spec.max_tokens
    requests = []
    for number, text in enumerate(prompts_of(spec.prompt)):
        one = replace(asker, request_id=f"{asker.request_id}-{number}")
        prompt = one.encode(text, spec.add_special_tokens)
        limit = one.limit(asked, len(prompt))
        requests.append(
            one.request(spec, prompt, max_new_tokens=limit, logprobs=spec.logprobs, grammar=grammar)
        )
    return requests
