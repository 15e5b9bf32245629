"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hasten.serve.body import JsonObject, Strict, Text, TokenId
from hasten.serve.endpoints.chat import Message, Tool
from hasten.serve.generate import asker_of
from hasten.serve.prepare import Asker, check_ids
from hasten.serve.problem import refused
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


async def tokenize(exchange: Exchange) -> None:
    """Token ids of a text or a chat."""
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
    """The text of token ids."""
    spec = await exchange.body(DetokenizeRequest)
    async with exchange.service.pool.use(spec.model) as served:
        body = await exchange.work(partial(_text, spec.tokens, served))
    await exchange.raw([body], "application/json")


def _text(tokens: Sequence[int], served: Served) -> bytes:
    check_ids(served, tokens, "tokens")
    return dumped({"prompt": served.model.tokenizer.decode(tokens, skip_special=False)})
