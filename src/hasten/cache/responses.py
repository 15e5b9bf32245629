"""Whole answers to requests that can have no other: asked again, they cost nothing. Opt-in.

A request is deterministic if it says so: temperature 0, or a seed. The engine's answer to it does not depend
on what else runs, so the first answer is every answer, as long as the model is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.cache.response_folder import ResponseFolder

WHOLE = frozenset({"stop", "length", "tool_calls", "function_call"})
"""Ends of an answer that are the model's own: not an error, a cancel or a deadline."""

_IRRELEVANT = frozenset({"stream", "stream_options", "user", "safety_identifier"})
_ENTRY_OVERHEAD = 400  # bytes of Python objects an answer costs beside its own


@dataclass(frozen=True)
class ResponseCacheStats:
    """What a response cache holds and did."""

    entries: int  # in memory
    bytes: int  # in memory
    hits: int
    misses: int
    expired: int
    evicted: int


class ResponseCache:
    """Answers by request, for `ttl_s` seconds, the least recently used go first. For any number of threads.

    Args:
        limit_bytes: most that the answers may take in memory; as much again in `folder`.
        ttl_s: seconds an answer is good for.
        clock: seconds, never going back.
        folder: keeps the answers over restarts too.
    """

    def __init__(
        self,
        limit_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        folder: ResponseFolder | None = None,
    ) -> None:
        self._limit = limit_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._folder = folder
        self._answers: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # key -> (made, answer)
        self._bytes = self._hits = self._misses = self._expired = self._evicted = 0
        self._lock = threading.Lock()

    @staticmethod
    def key(model_fingerprint: str, request: Mapping[str, Any]) -> str | None:
        """Names a request and all its answer depends on; None where another answer could be as right.

        Args:
            model_fingerprint: of `hasten.engine.fingerprint`.
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
        kept = self._folder.read(key, self._ttl_s) if self._folder is not None else None
        with self._lock:
            if kept is None:
                self._misses += 1
                return None
            age, answer = kept
            self._insert(key, now - age, answer)
            self._hits += 1
            return answer

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
        if self._folder is not None:
            self._folder.write(key, answer, self._limit)
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
