"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hasten.serve.body import JsonObject, Strict, Text, TokenId
from hasten.serve.endpoints.chat import Message, Tool
from hasten.serve.prepare import chat_text, chat_tokens, check_ids
from hasten.serve.problem import Problem
from hasten.serve.shape import dumped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.serve.pool import Served
    from hasten.serve.service import Exchange


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
_SLICE = 1 << 16  # ids or characters: writing JSON keeps other threads waiting for one slice only


async def tokenize(exchange: Exchange) -> None:
    """Token ids of a text or a chat."""
    spec = await exchange.body(TokenizeRequest)
    if (spec.prompt is None) == (spec.messages is None):
        raise Problem(400, "give either prompt or messages", param="prompt", code="invalid_value")
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(lambda: _tokens(spec, served))
    await exchange.raw(body, "application/json")


def _tokens(spec: TokenizeRequest, served: Served) -> list[bytes]:
    tokenizer = served.model.tokenizer
    ids: Sequence[int]
    if spec.prompt is not None:
        _check_size(spec.prompt, "prompt")
        ids = tokenizer.encode(spec.prompt, spec.add_special_tokens is not False)
    else:
        generation = spec.add_generation_prompt is not False
        messages = spec.messages or ()
        text = chat_text(served, messages, spec.tools or None, generation, spec.chat_template_kwargs)
        _check_size(text, "messages")
        ids = chat_tokens(served, text)
    texts = [b"null"]
    if spec.return_token_strs:
        texts = _listed([tokenizer.decode([i], skip_special=False) for i in ids])
    head = f'{{"count":{len(ids)},"max_model_len":{served.context},"tokens":'
    return [head.encode(), *_listed(ids), b',"token_strs":', *texts, b"}"]


def _check_size(text: str, param: str) -> None:
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        said = f"the text has {size:,} bytes; /tokenize takes {MAX_BYTES:,} at most, split it"
        raise Problem(400, said, param=param, code="text_too_long")


def _listed(items: Sequence[Any]) -> list[bytes]:
    """A JSON list in pieces."""
    slices = [dumped(items[at : at + _SLICE])[1:-1] for at in range(0, len(items), _SLICE)]
    return [b"[", b",".join(slices), b"]"]


async def detokenize(exchange: Exchange) -> None:
    """The text of token ids."""
    spec = await exchange.body(DetokenizeRequest)
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(lambda: list(_text(spec.tokens, served)))
    await exchange.raw(body, "application/json")


def _text(tokens: Sequence[int], served: Served) -> Iterator[bytes]:
    check_ids(served, tokens, "tokens")
    text = served.model.tokenizer.decode(tokens, skip_special=False)
    yield b'{"prompt":"'
    for at in range(0, len(text), _SLICE):
        yield dumped(text[at : at + _SLICE])[1:-1]
    yield b'"}'
