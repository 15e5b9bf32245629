"""What a service is asked: lengths of prompts and answers, what all prompts begin with, when requests come.

The one home of workloads: `hasten optimize --workload`, `hasten estimate --workload` and `hasten bench
--workload` take the same names and files. A `Traffic` gives two things:

    typical()    one shape in the middle of its lengths, which searches and predictions use
    requests()   token ids and moments of arrival, the same for the same seed, which a server is loaded with

The lengths of the named ones are round figures that we chose, no statistics of anybody's service. What a
service really gets is recorded with `hasten serve MODEL --record TRACE.jsonl`; that file is a workload too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.cache.reading import read_text_stream
from hasten.core import Workload
from hasten.errors import UsageError

_MOST_TOKENS = 1 << 24
_MOST_BYTES = 1 << 32


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: one of ten is at most `low`, half at most `median`, nine of ten at most `high`."""

    low: int
    median: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.median <= self.high <= _MOST_TOKENS:
            raise UsageError(
                f"lengths must be three whole numbers from 1 on that do not fall, got {self.low}, "
                f"{self.median}, {self.high}",
                hint="give one number, or [low, median, high] such as [50, 100, 300]",
            )

    @classmethod
    def of(cls, written: object, key: str) -> Lengths:
        """`100`, or `[50, 100, 300]`.

        Raises:
            UsageError: neither.
        """
        parts = written if isinstance(written, list) else [written] * 3
        if len(parts) != 3 or not all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
            raise UsageError(
                f"{key!r} must be a number of tokens or three of them, got {written!r:.60}",
                hint=f'write "{key}": 100, or "{key}": [50, 100, 300]',
            )
        return cls(*parts)

    def at(self, share: float) -> int:
        """The length that so large a share of requests (0 to 1) does not exceed.

        Between the three points it is even in the logarithm; the outer tenths have the outer points' length.
        """
        if share <= 0.5:
            first, last, part = self.low, self.median, (share - 0.1) / 0.4
        else:
            first, last, part = self.median, self.high, (share - 0.5) / 0.4
        return round(first * math.pow(last / first, min(max(part, 0.0), 1.0)))


@dataclass(frozen=True)
class Recorded:
    """One request of a recorded service."""

    at_s: float  # since the first one
    prompt: int  # tokens, what all prompts begin with included
    output: int


@dataclass(frozen=True)
class Arrival:
    """One request of a load."""

    at_s: float  # since the load began
    prompt: tuple[int, ...]  # token ids
    output: int  # tokens to generate


@dataclass(frozen=True)
class Traffic:
    """What a service is asked, request by request, and what its users wait for."""

    name: str
    about: str
    prompt: Lengths  # a request's own tokens, behind what all begin with
    output: Lengths
    shared: int = 0  # tokens that all prompts begin with: instructions, a schema
    ttft_ms: float | None = None  # an answer that begins later is too late; None: nobody waits for that
    tpot_ms: float | None = None  # from a token to the next, mean over an answer
    deadline_ms: float | None = None  # for the whole answer
    recorded: tuple[Recorded, ...] = ()  # what was asked, one by one; else lengths are drawn

    def typical(self, batch: int = 1) -> Workload:
        """One request in the middle of the lengths, `batch` of them at once."""
        return Workload(self.shared + self.prompt.median, self.output.median, batch, self.shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        known = [one.prompt + one.output for one in self.recorded]
        return max(known, default=self.shared + self.prompt.high + self.output.high)

    def in_time(self, ttft_ms: float, tpot_ms: float | None, whole_ms: float) -> bool:
        """Whether an answer was good enough to count as goodput.

        Args:
            ttft_ms: from asking to the first token.
            tpot_ms: from a token to the next; None: the answer had one token.
            whole_ms: from asking to the last token.
        """
        return (
            (self.ttft_ms is None or ttft_ms <= self.ttft_ms)
            and (self.tpot_ms is None or tpot_ms is None or tpot_ms <= self.tpot_ms)
            and (self.deadline_ms is None or whole_ms <= self.deadline_ms)
        )

    def requests(
        self, ids: Sequence[int], count: int, rate: float | None = None, *, seed: int = 0
    ) -> Iterator[Arrival]:
        """`count` requests in the order they come.

        Args:
            ids: tokens of any text, of which prompts are cut. What all prompts begin with is the start of
                it; a request's own tokens are taken behind that, on and on, so that no two prompts are alike
                further than they should be.
            count: how many.
            rate: requests a second, at random moments (Poisson). None: as recorded, or all at once where
                nothing was. A recorded service is asked faster or slower with it, in its own rhythm.
            seed: draws lengths and moments. The same seed gives the same lengths at any rate.

        Raises:
            UsageError: no ids, no count, or a rate that is none.
        """
        if not ids or count < 1 or (rate is not None and not 0 < rate < math.inf):
            raise UsageError(
                f"a load needs text, at least one request and a rate above 0, got {len(ids)} tokens, {count} "
                f"requests, rate {rate}",
                hint="use --rate 2",
            )
        lengths, moments = random.Random(seed), random.Random(seed + 1)
        at, place, begun = 0.0, self.shared, set[int]()
        for number in range(count):
            own, output = self._lengths(number, lengths)
            while place % len(ids) in begun and len(begun) < len(ids):
                place += 1  # the text began again: no two prompts begin at the same place of it
            begun.add(place % len(ids))
            prompt = (*_cut(ids, 0, self.shared), *_cut(ids, place, own))
            yield Arrival(self._moment(number, rate) if self.recorded else at, prompt, output)
            place += own
            if rate is not None:
                at += moments.expovariate(rate)

    def _lengths(self, number: int, draw: random.Random) -> tuple[int, int]:
        """A request's own tokens and those of its answer."""
        if self.recorded:
            one = self.recorded[number % len(self.recorded)]
            return max(1, one.prompt - self.shared), max(1, one.output)
        return self.prompt.at(draw.random()), self.output.at(draw.random())

    def _moment(self, number: int, rate: float | None) -> float:
        """When a recorded request comes; past the end the recording begins again."""
        count, last = len(self.recorded), self.recorded[-1].at_s
        span = last * count / max(count - 1, 1) or count * 1.0  # of one recording, to the next one's start
        at = span * (number // count) + self.recorded[number % count].at_s
        return at if rate is None else at * (count / span) / rate


def _cut(ids: Sequence[int], start: int, length: int) -> Iterator[int]:
    """So many of the ids from a place on, beginning again at the end."""
    return (ids[(start + i) % len(ids)] for i in range(length))


TRAFFICS: Mapping[str, Traffic] = {
    one.name: one
    for one in (
        Traffic(
            "chat",
            "a person talks: short turns behind a conversation, answers are read while they come",
            prompt=Lengths(40, 300, 1500),
            output=Lengths(40, 200, 500),
            shared=100,
            ttft_ms=1000,
            tpot_ms=100,
        ),
        Traffic(
            "support",
            "customer service: long instructions that all requests share, short questions and answers",
            prompt=Lengths(20, 60, 200),
            output=Lengths(30, 100, 250),
            shared=1200,
            ttft_ms=1000,
            tpot_ms=100,
        ),
        Traffic(
            "translate",
            "translation: the answer is as long as the text",
            prompt=Lengths(60, 200, 600),
            output=Lengths(60, 200, 600),
            shared=40,
            ttft_ms=2000,
            tpot_ms=100,
        ),
        Traffic(
            "summarize",
            "summaries: long texts in, a paragraph out",
            prompt=Lengths(800, 2000, 5000),
            output=Lengths(80, 150, 300),
            shared=40,
            ttft_ms=5000,
            tpot_ms=100,
        ),
        Traffic(
            "decide",
            "decisions: a fixed schema, a short state in, a few tokens out, all of it by a deadline",
            prompt=Lengths(60, 100, 150),
            output=Lengths(12, 16, 24),
            shared=300,
            deadline_ms=300,
        ),
        Traffic(
            "code",
            "completion in an editor: the file around the cursor in, a few lines out",
            prompt=Lengths(300, 1000, 3000),
            output=Lengths(10, 40, 120),
            shared=60,
            ttft_ms=1000,
            tpot_ms=50,
        ),
    )
}
"""By name. Each is a use that the article names, or the usual one of its model."""


def traffic(name: str) -> Traffic:
    """A workload by its name, or from a file.

    Args:
        name: of `TRAFFICS`; or a JSON file of one object with the fields of `Traffic` (`prompt` and `output`
            are needed, lengths are one number or three); or a trace of `hasten serve --record`.

    Raises:
        UsageError: no such name and no such file, or a file that is neither.
    """
    if name in TRAFFICS:
        return TRAFFICS[name]
    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name, TRAFFICS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"unknown workload {name!r}: no such name and no such file",
            hint=f"{hint}workloads are {', '.join(TRAFFICS)}, or a JSON file",
        )
    text = read_text_stream(path, _MOST_BYTES, "workload", "give a JSON file of one object")
    if text.lstrip().startswith('{"hasten_trace"'):
        return _from_trace(path)
    return _from_json(text, name)


def _from_json(text: str, name: str) -> Traffic:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"the workload {name} is no JSON: {error}", hint='write {"prompt": 300, "output": [50, 100, 300]}'
        ) from None
    if not isinstance(values, dict):
        raise UsageError(
            f"the workload {name} must be one JSON object, got {type(values).__name__}",
            hint='write {"prompt": 300, "output": [50, 100, 300]}',
        )
    _check_keys(values, name)
    prompt, output = (Lengths.of(values[key], key) for key in ("prompt", "output"))
    ttft, tpot, deadline = (_positive(values, key) for key in ("ttft_ms", "tpot_ms", "deadline_ms"))
    shared = values.get("shared", 0)
    if not isinstance(shared, int) or isinstance(shared, bool) or not 0 <= shared <= _MOST_TOKENS:
        raise UsageError(
            f"'shared' must be a number of tokens from 0 on, got {shared!r:.60}", hint='write "shared": 500'
        )
    named, about = str(values.get("name", Path(name).stem)), str(values.get("about", ""))
    return Traffic(named, about, prompt, output, shared, ttft, tpot, deadline)


def _check_keys(values: Mapping[str, Any], name: str) -> None:
    known = [one.name for one in dataclasses.fields(Traffic) if one.name != "recorded"]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"the workload {name} has an unknown key {key!r}", hint=f"{meant}keys are {', '.join(known)}"
            )
    for key in ("prompt", "output"):
        if key not in values:
            raise UsageError(f"the workload {name} lacks {key!r}", hint=f'add "{key}": [50, 100, 300]')


def _positive(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(
            f"{key!r} must be milliseconds above 0, got {value!r:.60}", hint=f'write "{key}": 500'
        )
    return float(value)


def _from_trace(path: Path) -> Traffic:
    """A recorded service: its lengths, what all its prompts begin with, and its moments."""
    import numpy as np

    from hasten.engine.trace import read_trace

    requests = sorted(read_trace(path).requests, key=lambda one: one.arrived)
    first = requests[0]
    shared = max(0, min(len(one.prompt) for one in requests) - 1) if len(requests) > 1 else 0
    for one in requests[1:]:
        same = one.prompt[:shared] == first.prompt[:shared]
        shared = shared if same.all() else int(np.argmin(same))
    recorded = tuple(
        Recorded(one.arrived - first.arrived, len(one.prompt), max(1, sum(map(len, one.outputs))))
        for one in requests
    )
    own = [max(1, one.prompt - shared) for one in recorded]
    return Traffic(path.stem, f"recorded: {len(recorded):,} requests", _spread(own),
                   _spread([one.output for one in recorded]), shared, recorded=recorded)  # fmt: skip


def _spread(values: Sequence[int]) -> Lengths:
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9)]
    return Lengths(*at)
