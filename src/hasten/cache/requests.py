"""What a server remembers of requests it has seen: token ids of prompts, and whole answers.

Token ids: encoding a long prompt takes milliseconds. That is little beside computing it, but much of the wait
where the prefix cache has it computed. A text between special tokens encodes on its own. So pieces are kept,
not whole prompts: the turns of a conversation share all pieces but the last.

Answers (opt-in): a request with temperature 0 or a seed has one answer. It does not depend on what else the
engine runs, so the first answer is kept for all later ones, as long as the model is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

_PIECE_OVERHEAD = 300  # bytes of Python objects an entry costs beside text and ids
_SHORT = 64  # characters: encoding fewer is as quick as looking them up
_PROOFS = 8  # prompts that are encoded both ways before pieces are trusted

WHOLE = frozenset({"stop", "length", "tool_calls", "function_call"})
"""How an answer ends by itself: not by an error, a cancel or a deadline."""

_IRRELEVANT = frozenset({"stream", "stream_options", "user", "safety_identifier"})
_ENTRY_OVERHEAD = 400  # bytes of Python objects an answer costs beside its own


class Encoder(Protocol):
    """What a tokenizer must do here; `hasten.models.tokenizer.Tokenizer` does."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text."""

    def pieces(self, text: str) -> Sequence[str]:
        """The text cut so that the pieces' ids, joined, are the text's."""


class PromptCache:
    """Remembers the ids of long pieces of prompts, the least recently used go first. Thread-safe.

    Args:
        tokenizer: encodes what is new.
        limit_bytes: most that texts and ids may take; `bytes` is what they take now.
    """

    def __init__(self, tokenizer: Encoder, limit_bytes: int = 16 << 20) -> None:
        self._tokenizer = tokenizer
        self._limit = limit_bytes
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self.bytes = 0
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

    def _proved(self, text: str, pieces: Sequence[str]) -> list[int]:
        """Encode whole and in pieces; if the two ever differ, texts are no longer cut."""
        whole = self._tokenizer.encode(text, add_special=False)
        same = self._joined(pieces) == whole
        with self._lock:
            self._proofs += 1
            if not same:
                self._cuts = False
                self._ids.clear()
                self.bytes = 0
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
            if (known := self._ids.get(text)) is not None:
                self._ids.move_to_end(text)
                return known
        new = array("i", self._tokenizer.encode(text, add_special=False))
        size = _size(text, new)
        with self._lock:
            if size <= self._limit and text not in self._ids:
                self._ids[text] = new
                self.bytes += size
                while self.bytes > self._limit:
                    self.bytes -= _size(*self._ids.popitem(last=False))
        return new


def _size(text: str, ids: array[int]) -> int:
    return 4 * len(text) + ids.itemsize * len(ids) + _PIECE_OVERHEAD  # 4: the most a character takes


class ResponseCache:
    """Answers by request, for `ttl_s` seconds, the least recently used go first. For any number of threads.

    Args:
        limit_bytes: most that the answers may take; `bytes` is what they take now.
        ttl_s: seconds an answer is good for.
        clock: seconds, never going back.
    """

    def __init__(self, limit_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._answers: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # key -> (made, answer)
        self.bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def key(model_fingerprint: str, request: Mapping[str, Any]) -> str | None:
        """The key of a request and all its answer depends on; None where another answer could be as right.

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
                return answer
            self._remove(key)
            return None

    def put(self, key: str, answer: bytes, *, finish_reasons: Iterable[str] = ("stop",)) -> bool:
        """Keep an answer, unless it ended by an error, a cancel or a deadline.

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
            self._remove(key)
            self._answers[key] = (self._clock(), bytes(answer))
            self.bytes += len(answer) + _ENTRY_OVERHEAD
            while self.bytes > self._limit:
                self._remove(next(iter(self._answers)))
        return True

    def _remove(self, key: str) -> None:
        if (gone := self._answers.pop(key, None)) is not None:
            self.bytes -= len(gone[1]) + _ENTRY_OVERHEAD


def is_deterministic(request: Mapping[str, Any]) -> bool:
    """Whether a request allows one answer only: it says temperature 0, or gives a seed."""
    temperature, seed = request.get("temperature"), request.get("seed")
    is_greedy = (
        isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    )
    return is_greedy or (isinstance(seed, int) and not isinstance(seed, bool))
