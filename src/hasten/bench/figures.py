"""One run of an engine, statistics of several, and the runs that other work disturbed.

On a shared machine other processes can only slow a round down. So the fastest half of the rounds tells what
the engine does undisturbed, and a round far below it measured the neighbours. Throwing such rounds away in
silence would hide how noisy the machine is: every result says how many there were.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hasten.errors import PeerError, UsageError


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
        return cls(**{**record, "ids": tuple(tuple(row) for row in record["ids"])})


@dataclass(frozen=True)
class Answer:
    """What one client saw. Times in seconds since the moment it asked."""

    first_s: float | None  # the first token's text; None: there was none
    last_s: float  # the last token's text, or the end where there was none
    output_tokens: int
    status: int = 200
    text: str = ""
    finish_reason: str | None = None
    error: str = ""  # why it is no good answer; empty: it is one
    sent_s: float = 0.0  # when it asked, on the clock of all answers of the run
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None with fewer than two."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @classmethod
    def none(cls, error: PeerError) -> Answer:
        """What a client saw whose request failed."""
        return cls(None, 0.0, 0, status=0, error=error.message)


class TokenClock:
    """Notes when each token of each sequence arrives; created at the moment the prompts go in."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompt_tokens = sum(len(p) for p in prompts)
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._arrivals: list[tuple[float, int]] = []  # when, which sequence
        self._start = time.perf_counter()

    def push(self, sequence: int, token: int) -> None:
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


def percentile(values: Sequence[float], fraction: float) -> float:
    """Value at `fraction` (0..1) of the sorted values, linear between neighbours (NumPy's default rule)."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians with its 95 % interval."""

    median: float
    low: float
    high: float
    n: int  # paired rounds


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], resamples: int = 2000) -> Ratio:
    """Median of `ours` over median of `theirs`, where entry i of both was measured in the same round.

    The interval is a percentile bootstrap over rounds (Efron 1979): whole rounds are drawn, so what slows a
    round for everybody cancels. With fewer than five rounds it is narrow by chance; read it with n.

    Raises:
        UsageError: no round, or lists of different length.
    """
    if not ours or len(ours) != len(theirs):
        raise UsageError(
            f"a paired ratio needs as many runs on both sides, got {len(ours)} and {len(theirs)}",
            hint="measure both engines in the same rounds",
        )
    draw = random.Random(0)
    rounds = range(len(ours))
    ratios = []
    for _ in range(resamples):
        picks = [draw.choice(rounds) for _ in rounds]
        top = percentile([ours[i] for i in picks], 0.5)
        ratios.append(top / percentile([theirs[i] for i in picks], 0.5))
    return Ratio(
        median=percentile(ours, 0.5) / percentile(theirs, 0.5),
        low=percentile(ratios, 0.025),
        high=percentile(ratios, 0.975),
        n=len(ours),
    )


T = TypeVar("T")

SHARE = 0.75
"""A round with a rate below this share of the typical one was disturbed. Undisturbed rounds on the machines
seen so far lie within 10 % of each other; one busy neighbour on two cores costs 40 %."""


@dataclass(frozen=True)
class Steady(Generic[T]):
    """Rounds in the order they were taken, without the disturbed ones where enough others are left."""

    rounds: tuple[T, ...]
    disturbed: int  # how many of all that were taken
    trusted: bool  # False: too few undisturbed ones came, so that all are in `rounds`


def steady(
    take: Callable[[int], T],
    rates: Callable[[T], Sequence[float]],
    runs: int,
    say: Callable[[str], None] = lambda _: None,
) -> Steady[T]:
    """Take rounds until `runs` of them are undisturbed, at most twice as many as that.

    Args:
        take: takes round `number`, from 1 on. A number is never used twice.
        rates: a round's rates; the same figures in the same places in every round, larger is faster.
        runs: how many are wanted.
        say: told when a round is repeated.
    """
    taken: list[T] = []
    slow: list[bool] = []
    while len(taken) < runs or (sum(not s for s in slow) < runs and len(taken) < 2 * runs):
        taken.append(take(len(taken) + 1))
        slow = disturbed([rates(one) for one in taken])
        if len(taken) >= runs and sum(not s for s in slow) < runs and len(taken) < 2 * runs:
            say(f"{sum(slow)} of {len(taken)} rounds were disturbed by other work: one more")
    good = [one for one, s in zip(taken, slow, strict=True) if not s]
    trusted = len(good) >= runs
    return Steady(tuple(good[-runs:] if trusted else taken), sum(slow), trusted)


def disturbed(rates: Sequence[Sequence[float]]) -> list[bool]:
    """For each round, whether one of its rates is below SHARE of that figure's typical one.

    Typical is the median of the fastest half of the rounds.
    """
    typical = [_typical(column) for column in zip(*rates, strict=True)]
    return [any(rate < SHARE * usual for rate, usual in zip(row, typical, strict=True)) for row in rates]


def _typical(values: Sequence[float]) -> float:
    fastest = sorted(values, reverse=True)[: (len(values) + 1) // 2]
    return percentile(fastest, 0.5)
