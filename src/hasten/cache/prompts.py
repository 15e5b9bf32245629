"""Token ids of texts that were encoded before: a system prompt is tokenised once, not in every request.

Encoding 2,000 tokens takes 2.4 ms (docs/cache.md): little beside computing them, but the engine's prefix
cache does away with the computing, and what is left of the wait is then partly this. Between special tokens a
text encodes on its own, so pieces are kept, not whole prompts: the turns of a conversation share all but the
last.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_PIECE_OVERHEAD = 300  # bytes of Python objects an entry costs beside text and ids
_SHORT = 64  # characters: encoding fewer is as quick as looking them up
_PROOFS = 8  # prompts that are encoded both ways before pieces are trusted


class Encoder(Protocol):
    """What a tokenizer must do here; `hasten.models.tokenizer.Tokenizer` does."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text."""

    def pieces(self, text: str) -> Sequence[str]:
        """The text cut so that the pieces' ids, joined, are the text's."""


@dataclass(frozen=True)
class PromptCacheStats:
    """What a prompt cache holds and did. `hit_chars` of `chars` asked for were not encoded."""

    pieces: int
    bytes: int
    chars: int
    hit_chars: int


class PromptCache:
    """Remembers the ids of long pieces of prompts, the least recently used go first. Thread-safe.

    Args:
        tokenizer: encodes what is new.
        limit_bytes: most that texts and ids may take.
    """

    def __init__(self, tokenizer: Encoder, limit_bytes: int = 16 << 20) -> None:
        self._tokenizer = tokenizer
        self._limit = limit_bytes
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._bytes = self._chars = self._hit_chars = 0
        self._proofs = 0
        self._cuts = True
        self._lock = threading.Lock()

    def get_or_encode(self, text: str) -> list[int]:
        """What `tokenizer.encode(text, add_special=False)` gives: for texts of a chat template.

        Raises:
            UsageError, TokenizerError: as `encode`.
        """
        pieces = self._tokenizer.pieces(text) if self._cuts else [text]
        if len(pieces) > 1 and self._proofs < _PROOFS:
            return self._proved(text, pieces)
        return self._joined(pieces)

    def stats(self) -> PromptCacheStats:
        """Counters so far."""
        with self._lock:
            return PromptCacheStats(len(self._ids), self._bytes, self._chars, self._hit_chars)

    def _proved(self, text: str, pieces: Sequence[str]) -> list[int]:
        """Both ways; should they ever differ, texts are not cut any more."""
        whole = self._tokenizer.encode(text, add_special=False)
        same = self._joined(pieces) == whole
        with self._lock:
            self._proofs += 1
            if not same:
                self._cuts = False
                self._ids.clear()
                self._bytes = 0
        return whole

    def _joined(self, pieces: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._one(piece)
        return ids

    def _one(self, text: str) -> Sequence[int]:
        if len(text) < _SHORT:
            return self._tokenizer.encode(text, add_special=False)
        with self._lock:
            self._chars += len(text)
            if (known := self._ids.get(text)) is not None:
                self._ids.move_to_end(text)
                self._hit_chars += len(text)
                return known
        new = array("i", self._tokenizer.encode(text, add_special=False))
        size = _size(text, new)
        with self._lock:
            if size <= self._limit and text not in self._ids:
                self._ids[text] = new
                self._bytes += size
                while self._bytes > self._limit:
                    self._bytes -= _size(*self._ids.popitem(last=False))
        return new


def _size(text: str, ids: array[int]) -> int:
    return 4 * len(text) + ids.itemsize * len(ids) + _PIECE_OVERHEAD  # 4: the most a character takes
