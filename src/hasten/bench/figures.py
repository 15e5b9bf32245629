"""One run of an engine, statistics of several, and the runs that other work disturbed.

On a shared machine other processes can only slow a round down. So the fastest half of the rounds tells what
the engine does undisturbed, and a round far below it measured the neighbours. Throwing such rounds away in
silence would hide how noisy the machine is: every result says how many there were.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, Literal, TypeVar

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
    gaps_s: tuple[float, ...] = ()  # from a sequence's token to its next, of all sequences; empty: not noted

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

    @property
    def whole_s(self) -> float:
        """Seconds from the prompts to the last token of all sequences."""
        return self.ttft_s + self.decode_s

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Sample:
        ids = tuple(tuple(row) for row in record["ids"])
        return cls(**{**record, "ids": ids, "gaps_s": tuple(record.get("gaps_s", ()))})


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
            gaps_s=tuple(self._gaps()),
        )

    def _gaps(self) -> Iterator[float]:
        last: dict[int, float] = {}
        for when, sequence in self._arrivals:
            if sequence in last:
                yield when - last[sequence]
            last[sequence] = when


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


Summary = Callable[[Sequence[float]], float]
FEW = 5
"""With fewer rounds on a side a bootstrap's interval is narrow by chance: `change` takes the range."""
_RESAMPLES = 2000


def summary_named(name: str) -> Summary | None:
    """`p50` (`p99`, `p99.9`), `median`, `mean`, `min` or `max` as a function of values; None: unknown."""
    known: dict[str, Summary] = {"min": min, "max": max, "median": lambda values: percentile(values, 0.5)}
    known["mean"] = lambda values: sum(values) / len(values)
    share = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)", name)
    if share is None:
        return known.get(name)
    return lambda values: percentile(values, float(share[1]) / 100)


@dataclass(frozen=True)
class Change:
    """How much a figure is larger than before: 0.05 is +5 %, or 5 points of a share."""

    value: float
    low: float | None  # of the 95 % interval; None: one round on a side, so none is known
    high: float | None
    paired: bool


def change(
    before: Sequence[float],
    after: Sequence[float],
    summary: Summary,
    *,
    paired: bool,
    is_share: bool = False,
) -> Change:
    """A figure after something over the figure before it, minus one; of shares the difference.

    The interval is a percentile bootstrap (Efron 1979). Where entries belong together, pairs are drawn: what
    moves both of them alike, a busy minute or a long prompt, cancels. Else each side is drawn for itself.
    With fewer than five rounds on a side it is the range of all changes from one round to another.

    Args:
        before, after: of each round, in the order taken; more than 0 unless they are shares.
        summary: what makes one figure of several.
        paired: entry i of both was taken in the same round, or on the same request.
        is_share: of something, such as requests in time: 0 is a value like any other.

    Raises:
        UsageError: nothing to compare, a figure of 0 before, or pairs of different number.
    """
    if not before or not after or (paired and len(before) != len(after)):
        raise UsageError(
            f"there are {len(before)} rounds to compare with {len(after)}", hint="measure both alike"
        )
    relate = _difference if is_share else _relative
    value = relate(summary(before), summary(after))
    if value is None:
        raise UsageError("a change against a figure of 0 is no number", hint="compare another figure")
    if min(len(before), len(after)) < 2:
        return Change(value, None, None, paired)
    few = min(len(before), len(after)) < FEW
    pairs = _singles(before, after, paired) if few else _draws(before, after, summary, paired)
    found = sorted(one for b, a in pairs if (one := relate(b, a)) is not None)
    if few:
        return Change(value, min([*found, value]), max([*found, value]), paired)
    return Change(value, percentile(found, 0.025), percentile(found, 0.975), paired)


def _relative(before: float, after: float) -> float | None:
    return after / before - 1 if before > 0 else None


def _difference(before: float, after: float) -> float | None:
    return after - before


def _singles(before: Sequence[float], after: Sequence[float], paired: bool) -> Iterable[tuple[float, float]]:
    return zip(before, after, strict=True) if paired else ((b, a) for b in before for a in after)


def _draws(
    before: Sequence[float], after: Sequence[float], summary: Summary, paired: bool
) -> Iterator[tuple[float, float]]:
    """The figure before and after, of rounds drawn with replacement."""
    draw = random.Random(0)
    for _ in range(_RESAMPLES):
        if paired:
            picks = draw.choices(range(len(before)), k=len(before))
            yield summary([before[i] for i in picks]), summary([after[i] for i in picks])
        else:
            theirs = draw.choices(before, k=len(before))
            yield summary(theirs), summary(draw.choices(after, k=len(after)))


def interval(values: Sequence[float], summary: Summary) -> tuple[float, float] | None:
    """The 95 % interval of one figure by the same rules as `change`; None: one round alone."""
    if len(values) < 2:
        return None
    if len(values) < FEW:
        return min(values), max(values)
    draw = random.Random(0)
    found = sorted(summary(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return percentile(found, 0.025), percentile(found, 0.975)


@dataclass(frozen=True)
class Metric:
    """What a figure is: its unit, which way is worse, and the summary that is meant where none is named."""

    unit: str
    more_is_better: bool = False
    is_share: bool = False  # of something: changes are points, limits in % are its own value
    usual: str = "p50"


METRICS = {
    "ttft_ms": Metric("ms"),
    "tpot_ms": Metric("ms"),
    "latency_ms": Metric("ms"),
    "decode_tok_per_s": Metric("tok/s", more_is_better=True),
    "prefill_tok_per_s": Metric("tok/s", more_is_better=True),
    "output_tok_per_s": Metric("tok/s", more_is_better=True),
    "goodput": Metric("", more_is_better=True, is_share=True, usual="mean"),
    "refused": Metric("", is_share=True, usual="mean"),
    "failed": Metric("", is_share=True, usual="mean"),
    "cached": Metric("", more_is_better=True, is_share=True, usual="mean"),
    "peak_rss_bytes": Metric("bytes"),
    "weight_bytes": Metric("bytes"),
    "ppl_increase": Metric("", is_share=True),
    "kl_mean": Metric("nats"),
    "kl_p99": Metric("nats"),
    "top1_agreement": Metric("", more_is_better=True, is_share=True),
}


Verdict = Literal["kept", "crossed", "undecided", "unknown"]
_EXPRESSION = re.compile(
    r"\s*(?P<metric>[A-Za-z_0-9]+)(?:\.(?P<summary>[A-Za-z0-9.]+))?\s*(?P<sign>[<>])=?\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)
_EXAMPLE = 'write it as "tpot_ms.p50 > 5%" or "ttft_ms.p95 > 300"'


@dataclass(frozen=True)
class Limit:
    """What must not be of one figure: its change, or its value on the second side."""

    text: str
    metric: str
    summary: str
    above: bool  # crossed above the limit; False: below it
    bound: float
    of_change: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Reads `METRIC[.SUMMARY] > NUMBER[%]`, or with `<`.

        Raises:
            UsageError: it is written otherwise, or names no figure there is.
        """
        found = _EXPRESSION.fullmatch(text)
        if found is None:
            raise UsageError(f"--fail-if {text!r} cannot be read", hint=_EXAMPLE)
        metric = found["metric"]
        if metric not in METRICS:
            near = get_close_matches(metric, METRICS, n=1, cutoff=0.4)
            known = f"did you mean {near[0]}? figures are" if near else "figures are"
            raise UsageError(
                f"--fail-if {text!r}: there is no figure {metric!r}", hint=f"{known} {', '.join(METRICS)}"
            )
        kind = METRICS[metric]
        summary = found["summary"] or kind.usual
        if summary_named(summary) is None:
            raise UsageError(
                f"--fail-if {text!r}: there is no summary {summary!r}",
                hint="summaries are p50, p90, p95, p99 and the like, mean, median, min, max",
            )
        percent = bool(found["percent"])
        bound = float(found["number"]) / (100 if percent else 1)
        of_change = percent and not kind.is_share
        return cls(text.strip(), metric, summary, found["sign"] == ">", bound, of_change)

    def decide(self, value: float, spread: tuple[float, float] | None) -> Verdict:
        """Crossed where the whole interval is beyond the limit, kept where none of it is."""
        low, high = spread or (value, value)
        if not self.above:
            low, high, bound = -high, -low, -self.bound
        else:
            bound = self.bound
        return "crossed" if low > bound else "kept" if high <= bound else "undecided"


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
