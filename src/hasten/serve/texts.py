"""`POST /v1/completions`, `/v1/embeddings`, `/tokenize` and `/detokenize`: for texts as they stand.

Of each: the body, the form of the answer, the way between. The last two are as vLLM has them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hasten.engine.request import Request
from hasten.serve.body import JsonObject, SamplingFields, SharedFields, Strict, Text, TokenId
from hasten.serve.call import Problem, refused
from hasten.serve.chat import Message, ResponseFormat, Tool
from hasten.serve.generate import Feed, asker_of, respond
from hasten.serve.prepare import Asker, check_ids, form_of
from hasten.serve.shape import Part, Shape, dumped, dumps, finite, joined

if TYPE_CHECKING:
    from hasten.engine.request import Output
    from hasten.serve.pool import Served
    from hasten.serve.service import Exchange

Vector = npt.NDArray[np.float32]
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
    spec = await exchange.body(CompletionRequest)
    if spec.stream_options is not None and not spec.stream and exchange.service.options.strict:
        raise refused("stream_options needs stream: true", "stream_options", None)
    async with exchange.service.pool.use(spec.model) as served:
        requests = await exchange.work(partial(_to_complete, spec, asker_of(exchange, served)))
        tally = exchange.tally(served.name)
        shape = CompletionShape(served.name, served.texts, tally, spec.n or 1, len(requests))
        shape.report(spec.stream_options, sum(len(request.prompt) for request in requests))
        await respond(exchange, served, spec, requests, shape)


Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def prompts_of(prompt: Prompts) -> list[str | Sequence[int]]:
    """The four ways to write prompts (or inputs to embed) as one: a list of texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _each(
    prompts: Prompts, add_special: bool | None, asker: Asker
) -> Iterator[tuple[Asker, tuple[int, ...]]]:
    """Each prompt's token ids, and who asks for it: each request has an id of its own. In a worker thread."""
    for number, text in enumerate(prompts_of(prompts)):
        one = replace(asker, request_id=f"{asker.request_id}-{number}")
        yield one, one.encode(text, add_special)


def _to_complete(spec: CompletionRequest, asker: Asker) -> list[Request]:
    grammar = form_of(spec, spec.response_format, strict=asker.options.strict).grammar
    asked = DEFAULT_TOKENS if spec.max_tokens is None else spec.max_tokens
    return [
        one.request(
            spec,
            prompt,
            max_new_tokens=one.limit(asked, len(prompt)),
            logprobs=spec.logprobs,
            grammar=grammar,
        )
        for one, prompt in _each(spec.prompt, spec.add_special_tokens, asker)
    ]


class EmbeddingRequest(SharedFields):
    """The body of `/v1/embeddings`; `pooling` and `add_special_tokens` are extensions."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None


async def embeddings(exchange: Exchange) -> None:
    """Texts as vectors of length 1: hidden states of the last layer, their mean or that of the last token."""
    spec = await exchange.body(EmbeddingRequest)
    async with exchange.service.pool.use(spec.model) as served:
        requests = await exchange.work(partial(_to_embed, spec, asker_of(exchange, served)))
        tally = exchange.tally(served.name)
        vectors: dict[int, Vector] = {}
        async with Feed(served.engine, requests) as feed:
            async for news in feed.batches():
                for which, output in news:
                    tally.take(which, output)
                    if output.embedding is not None:
                        vectors[which] = output.embedding
        plain = spec.encoding_format != "base64"
        found = [vectors[which] for which in range(len(requests))]
        body = await exchange.work(lambda: _body(found, plain, served.name, tally.prompt_tokens))
        await exchange.raw(body, "application/json")


def _body(vectors: Sequence[Vector], plain: bool, model: str, tokens: int) -> list[bytes]:
    """The document in pieces, encoded one by one: the encoder keeps other threads waiting while it runs."""
    entries = [
        b","[: number > 0]
        + dumped({"object": "embedding", "index": number, "embedding": written(vector, plain)})
        for number, vector in enumerate(vectors)
    ]
    about = dumped({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return [b'{"object":"list","data":[', *entries, b"],", about[1:]]


def written(vector: Vector, plain: bool) -> Any:
    """A vector scaled to length 1, as numbers or as base64 of little-endian float32.

    Raises:
        Problem: it holds a number that is not finite.
    """
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length):
        raise Problem(500, "the model computed an embedding that is not finite", code="engine_error")
    unit = (vector / length if length > 0 else vector).astype("<f4")
    return unit.tolist() if plain else base64.b64encode(unit.tobytes()).decode()


def _to_embed(spec: EmbeddingRequest, asker: Asker) -> list[Request]:
    requests = []
    for one, prompt in _each(spec.input, spec.add_special_tokens, asker):
        one.limit(0, len(prompt))
        pooling = spec.pooling or asker.options.pooling
        requests.append(Request(prompt, 0, pooling=pooling, **one.shared(spec)))
    return requests


class TokenizeRequest(Strict):
    """A text (`prompt`) or a chat (`messages`)."""

    model: str | None = Field(None, max_length=1000)
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = Field(None, max_length=1000)
    tokens: Annotated[list[TokenId], Field(max_length=500_000, fail_fast=True)]


MAX_BYTES = 1_000_000
"""Of a text to encode, in UTF-8: more than any context holds, and its ids are made in less than 0.1 s."""


async def tokenize(exchange: Exchange) -> None:
    spec = await exchange.body(TokenizeRequest)
    if (spec.prompt is None) == (spec.messages is None):
        raise refused("give either prompt or messages", "prompt")
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(partial(_tokens, spec, asker_of(exchange, served)))
    await exchange.raw([body], "application/json")


def _tokens(spec: TokenizeRequest, asker: Asker) -> bytes:
    tokenizer = asker.served.model.tokenizer
    ids: Sequence[int]
    if spec.prompt is not None:
        _check_size(spec.prompt, "prompt")
        ids = tokenizer.encode(spec.prompt, spec.add_special_tokens is not False)
    else:
        generation, variables = spec.add_generation_prompt, spec.chat_template_kwargs
        text = asker.chat_text(spec.messages or (), spec.tools or None, generation, variables)
        _check_size(text, "messages")
        ids = asker.chat_tokens(text)
    texts = [tokenizer.decode([one], skip_special=False) for one in ids] if spec.return_token_strs else None
    about = {"count": len(ids), "max_model_len": asker.served.context}
    return dumped({**about, "tokens": ids, "token_strs": texts})


def _check_size(text: str, param: str) -> None:
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        said = f"the text has {size:,} bytes; /tokenize takes {MAX_BYTES:,} at most, split it"
        raise refused(said, param, "text_too_long")


async def detokenize(exchange: Exchange) -> None:
    spec = await exchange.body(DetokenizeRequest)
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(partial(_text, spec.tokens, served))
    await exchange.raw([body], "application/json")


def _text(tokens: Sequence[int], served: Served) -> bytes:
    check_ids(served, tokens, "tokens")
    return dumped({"prompt": served.model.tokenizer.decode(tokens, skip_special=False)})
