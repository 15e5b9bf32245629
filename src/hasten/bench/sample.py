"""What one run of one engine gives, and the clock that takes it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hasten.errors import PeerError


@dataclass(frozen=True)
class Sample:
    """One run: a prompt (or a batch of them) in, tokens out.

    `ttft_s` ends when every sequence has its first token; what came later is decode. With one sequence that
    is first token to last.
    """

    prompt_tokens: int  # of all sequences together
    ttft_s: float
    decode_tokens: int  # of all sequences together, after ttft
    decode_s: float
    ids: tuple[tuple[int, ...], ...]  # per sequence, the tokens it gave

    @property
    def prefill_tok_per_s(self) -> float:
        """Prompt tokens of all sequences over the time to their first tokens."""
        return self.prompt_tokens / self.ttft_s

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first ones, summed over sequences, over the time they took."""
        return self.decode_tokens / self.decode_s

    @property
    def tpot_ms(self) -> float:
        """Milliseconds from one token of a sequence to its next."""
        return 1000.0 * self.decode_s * len(self.ids) / self.decode_tokens

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        """Inverse of `core.as_json`."""
        return cls(**{**record, "ids": tuple(tuple(row) for row in record["ids"])})


class TokenClock:
    """Notes when each token of each sequence arrives; created at the moment the prompts go in."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompt_tokens = sum(len(p) for p in prompts)
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._arrivals: list[tuple[float, int]] = []  # when, which sequence
        self._start = time.perf_counter()

    def push(self, sequence: int, token: int) -> None:
        """A token of one sequence has arrived now."""
        self._arrivals.append((time.perf_counter(), sequence))
        self._ids[sequence].append(token)

    def finish(self) -> Sample:
        """The run's figures.

        Raises:
            PeerError: a sequence gave no token, or none gave a second one.
        """
        silent = [sequence for sequence, row in enumerate(self._ids) if not row]
        if silent:
            raise PeerError(f"sequence {silent[0]} of {len(self._ids)} gave no token")
        firsts: dict[int, int] = {}  # sequence -> place of its first arrival
        for place, (_, sequence) in enumerate(self._arrivals):
            firsts.setdefault(sequence, place)
        last_first = max(firsts.values())
        when, later = self._arrivals[last_first][0], self._arrivals[last_first + 1 :]
        if not later:
            raise PeerError("every sequence stopped at its first token: there is no decode to time")
        return Sample(
            prompt_tokens=self._prompt_tokens,
            ttft_s=when - self._start,
            decode_tokens=len(later),
            decode_s=later[-1][0] - when,
            ids=tuple(tuple(row) for row in self._ids),
        )
