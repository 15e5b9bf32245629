"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hasten.engine.request import Request
from hasten.serve.body import SharedFields, Text
from hasten.serve.endpoints.completions import TokenIds, prompts_of
from hasten.serve.generate import Feed, asker_of
from hasten.serve.prepare import Asker
from hasten.serve.problem import Problem
from hasten.serve.shape import dumped

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from hasten.serve.service import Exchange

    Vector = npt.NDArray[np.float32]


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
        requests = await exchange.work(partial(prepare, spec, asker_of(exchange, served)))
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


def prepare(spec: EmbeddingRequest, asker: Asker) -> list[Request]:
    """One request an input. In a worker thread."""
    requests = []
    for number, text in enumerate(prompts_of(spec.input)):
        one = replace(asker, request_id=f"{asker.request_id}-{number}")
        prompt = one.encode(text, spec.add_special_tokens)
        one.limit(0, len(prompt))
        pooling = spec.pooling or asker.options.pooling
        requests.append(Request(prompt, 0, pooling=pooling, **one.shared(spec)))
    return requests
