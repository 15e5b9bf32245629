"""Log-probabilities as OpenAI writes them, for chat and for completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.engine.sampling import TokenLogprob
    from hasten.models.tokenizer import Tokenizer

FLOOR = -9999.0
"""What stands for minus infinity, which JSON cannot say; OpenAI's own value."""


class TokenTexts:
    """Texts and bytes of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The token alone as text; bytes that are no character of their own come as U+FFFD."""
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special=False)
        return self._texts[token]

    def chat(self, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat choice."""
        return [
            {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in logprobs
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

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
