"""`POST /tokenize` and `POST /detokenize`, as vLLM answers them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.serve.prepare import chat_tokens, encode
from hasten.serve.problem import Problem
from hasten.serve.protocol.tokens import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hasten.serve.exchange import Exchange
    from hasten.serve.pool import Served


async def tokenize(exchange: Exchange) -> None:
    """Token ids of a text or a chat."""
    spec = await exchange.body(TokenizeRequest)
    if (spec.prompt is None) == (spec.messages is None):
        raise Problem(400, "give either prompt or messages", param="prompt", code="invalid_value")
    async with exchange.service.pool.use(spec.model) as served:
        document = await exchange.work(lambda: _tokens(spec, served))
    await exchange.json(document)


def _tokens(spec: TokenizeRequest, served: Served) -> dict[str, Any]:
    tokenizer = served.model.tokenizer
    if spec.prompt is not None:
        ids = tokenizer.encode(spec.prompt, spec.add_special_tokens is not False)
    else:
        generation = spec.add_generation_prompt is not False
        messages = spec.messages or ()
        ids = list(chat_tokens(served, messages, spec.tools or None, generation, spec.chat_template_kwargs))
    texts = [tokenizer.decode([i], skip_special=False) for i in ids] if spec.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": texts}


async def detokenize(exchange: Exchange) -> None:
    """The text of token ids."""
    spec = await exchange.body(DetokenizeRequest)
    async with exchange.service.pool.use(spec.model) as served:
        text = await exchange.work(lambda: _text(spec.tokens, served))
    await exchange.json({"prompt": text})


def _text(tokens: Sequence[int], served: Served) -> str:
    known = encode(served, tokens, param="tokens")
    return served.model.tokenizer.decode(known, skip_special=False)
