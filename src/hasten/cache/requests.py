"""What a server remembers of requests it has seen: token ids of prompts, and whole answers.

Token ids: encoding 2,000 tokens takes 2.4 ms (docs/cache.md): little beside computing them, but the prefix
cache does away with the computing, and what is left of the wait is then partly this. Between special tokens a
text encodes on its own, so pieces are kept, not whole prompts: the turns of a conversation share all but the
last.

Answers (opt-in): a request has one answer only if it says so: temperature 0, or a seed. The engine's answer
to it does not depend on what else runs, so the first answer is every answer, as long as the model is the same
to the bit.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_PIECE_OVERHEAD = 300  # bytes of Python objects an entry costs beside text and ids
_SHORT = 64  # characters: encoding fewer is as quick as looking them up
_PROOFS = 8  # prompts that are encoded both ways before pieces are trusted

WHOLE = frozenset({"stop", "length", "tool_calls", "function_call"})
"""Ends of an answer that are the model's own: not an error, a cancel or a deadline."""

_IRRELEVANT = frozenset({"stream", "stream_options", "user", "safety_identifier"})
_ENTRY_OVERHEAD = 400  # bytes of Python objects an answer costs beside its own


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


@dataclass(frozen=True)
class ResponseCacheStats:
    """What a response cache holds and did."""

    entries: int
    bytes: int
    hits: int
    misses: int
    expired: int
    evicted: int


class ResponseCache:
    """Answers by request, for `ttl_s` seconds, the least recently used go first. For any number of threads.

    Args:
        limit_bytes: most that the answers may take.
        ttl_s: seconds an answer is good for.
        clock: seconds, never going back.
    """

    def __init__(self, limit_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._answers: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # key -> (made, answer)
        self._bytes = self._hits = self._misses = self._expired = self._evicted = 0
        self._lock = threading.Lock()

    @staticmethod
    def key(model_fingerprint: str, request: Mapping[str, Any]) -> str | None:
        """Names a request and all its answer depends on; None where another answer could be as right.

        Args:
            model_fingerprint: of `hasten.engine.loaded`.
            request: the body of the request, as JSON values, and what else the answer depends on (the route).
        """
        if not is_deterministic(request):
            return None
        asked = {name: value for name, value in request.items() if name not in _IRRELEVANT}
        try:
            text = json.dumps([model_fingerprint, asked], sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError):  # no JSON: nothing that a client could have sent
            return None
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> bytes | None:
        """The answer kept under a key, while it is good."""
        now = self._clock()
        with self._lock:
            made, answer = self._answers.get(key, (now, b""))
            if key in self._answers and 0 <= now - made < self._ttl_s:
                self._answers.move_to_end(key)
                self._hits += 1
                return answer
            if key in self._answers:
                self._remove(key)
                self._expired += 1
            self._misses += 1
            return None

    def put(self, key: str, answer: bytes, *, finish_reasons: Iterable[str] = ("stop",)) -> bool:
        """Keep an answer; one that did not end by itself is not kept.

        Args:
            key: of `key`.
            answer: its bytes.
            finish_reasons: how each of its choices ended.

        Returns:
            Whether it is kept.
        """
        if len(answer) + _ENTRY_OVERHEAD > self._limit or not set(finish_reasons) <= WHOLE:
            return False
        with self._lock:
            self._insert(key, self._clock(), bytes(answer))
        return True

    def stats(self) -> ResponseCacheStats:
        """Counters so far."""
        with self._lock:
            return ResponseCacheStats(
                len(self._answers), self._bytes, self._hits, self._misses, self._expired, self._evicted
            )

    def _insert(self, key: str, made: float, answer: bytes) -> None:
        self._remove(key)
        self._answers[key] = (made, answer)
        self._bytes += len(answer) + _ENTRY_OVERHEAD
        while self._bytes > self._limit:
            self._remove(next(iter(self._answers)))
            self._evicted += 1

    def _remove(self, key: str) -> None:
        if (gone := self._answers.pop(key, None)) is not None:
            self._bytes -= len(gone[1]) + _ENTRY_OVERHEAD


def is_deterministic(request: Mapping[str, Any]) -> bool:
    """Whether a request allows one answer only: it says temperature 0, or gives a seed."""
    temperature, seed = request.get("temperature"), request.get("seed")
    is_greedy = (
        isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    )
    return is_greedy or (isinstance(seed, int) and not isinstance(seed, bool))
