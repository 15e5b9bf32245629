"""Log-probabilities as OpenAI writes them, for chat and for completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.engine.sampling import TokenLogprob

FLOOR = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own value."""


class TokenTexts:
    """Texts and bytes of single tokens.

    Args:
        values: bytes of every token; called once, when the first is needed. Reading a large vocabulary takes
            half a second: a worker thread has done it before.
    """

    def __init__(self, values: Callable[[], Sequence[bytes]]) -> None:
        self._get_values = values

    @cached_property
    def _values(self) -> Sequence[bytes]:
        return self._get_values()

    def spelled(self, token: int) -> bytes:
        """The token's own bytes; nothing for ids without a meaning."""
        return self._values[token] if token < len(self._values) else b""

    def text(self, token: int) -> str:
        """The token alone as text; bytes that are no character of their own come as U+FFFD."""
        return self.spelled(token).decode("utf-8", "replace")

    def chat(self, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat choice."""
        return [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in logprobs
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": finite(logprob), "bytes": list(self.spelled(token))}

    def completion(self, logprobs: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
        """`logprobs` of a completion choice; `offset` is where in the text the first token begins."""
        result: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for one in logprobs:
            text = self.text(one.token)
            result["tokens"].append(text)
            result["token_logprobs"].append(finite(one.logprob))
            top = {self.text(token): finite(logprob) for token, logprob in reversed(one.top)}
            result["top_logprobs"].append(top or None)
            result["text_offset"].append(offset)
            offset += len(text)
        return result

    def prompt(self, logprobs: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: one entry a prompt token, by token id; null for the first."""
        return [None if one is None else self._ranked(one) for one in logprobs]

    def _ranked(self, one: TokenLogprob) -> dict[str, Any]:
        entries = {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            for rank, (token, logprob) in enumerate(one.top, start=1)
        }
        own = {"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": self.text(one.token)}
        return {str(one.token): own, **{k: v for k, v in entries.items() if k != str(one.token)}}


def finite(logprob: float) -> float:
    """The value, or OpenAI's for minus infinity."""
    return max(FLOOR, logprob)
