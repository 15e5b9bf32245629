"""`--response-cache-ttl`: what the engine said to a deterministic request, said again, not computed.

What is kept are the engine's outputs, not the response: a stream and a document, chat and responses are all
made of them, each with an id and a time of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hasten.cache.responses import ResponseCache
from hasten.engine.request import Output, Request, Usage
from hasten.engine.sampling import TokenLogprob

if TYPE_CHECKING:
    from hasten.serve.feed import News
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import Served
    from hasten.serve.protocol.strict import Strict


class ResponseMemory:
    """Outputs by request.

    Args:
        ttl_s: seconds they are good for.
        limit_bytes: most they may take.
    """

    def __init__(self, ttl_s: float, limit_bytes: int) -> None:
        self._cache = ResponseCache(limit_bytes, ttl_s)

    @classmethod
    def of(cls, options: ServeOptions) -> ResponseMemory | None:
        """The memory that the options ask for."""
        if options.response_cache_ttl is None:
            return None
        return cls(options.response_cache_ttl, int(options.response_cache_mb * 1_000_000))

    def key(self, served: Served, spec: Strict, requests: Sequence[Request]) -> str | None:
        """Names what was asked, to the token; None where another answer could be as right.

        The prompts' tokens count and not the messages alone: a template may tell the model today's date.
        Runs in a worker thread: the fingerprint may take a while.
        """
        asked = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        asked["hasten.kind"] = type(spec).__name__
        asked["hasten.prompts"] = [request.prompt for request in requests]
        return ResponseCache.key(served.fingerprint, asked)

    def recall(self, key: str) -> list[News] | None:
        """The outputs kept under a key."""
        kept = self._cache.get(key)
        return None if kept is None else [_unpacked(entry) for entry in json.loads(kept)]

    def keep(self, key: str, news: Sequence[News]) -> None:
        """Keep all outputs of a call."""
        ends = [output.finish_reason for _, output in news if output.finish_reason is not None]
        self._cache.put(key, json.dumps([_packed(*one) for one in news]).encode(), finish_reasons=ends)


def _packed(which: int, output: Output) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(output).items() if value not in (None, "", ())}
    return {"which": which, **fields}


def _unpacked(entry: dict[str, Any]) -> News:
    which = entry.pop("which")
    if "usage" in entry:
        entry["usage"] = Usage(**entry["usage"])
    entry["token_ids"] = tuple(entry.get("token_ids", ()))
    entry["logprobs"] = tuple(_logprob(one) for one in entry.get("logprobs", ()))
    if "prompt_logprobs" in entry:
        entry["prompt_logprobs"] = tuple(one and _logprob(one) for one in entry["prompt_logprobs"])
    return which, Output(**entry)


def _logprob(entry: dict[str, Any]) -> TokenLogprob:
    return TokenLogprob(**{**entry, "top": tuple(tuple(pair) for pair in entry["top"])})
