"""Speculation: guesses how answers go on, so that one step of the model confirms several tokens.

A guess is what followed the last time a text ended as it does now: in its own prompt and answer, or in a
recent request. It is found in suffix automata (native/draft.h), in O(1) a token. The model confirms or
rejects each guess, so guesses never change a result. A step guesses as many tokens as make the expected
tokens a second the largest. How these are computed, with units:

- A step of M rows takes t(M) seconds. `StepTimes` learns the table from steps that were measured.
- The next token of a draft is confirmed with probability p. `Acceptance` learns p by how many tokens the
  text's end has in common with the place that is copied from (once j tokens are confirmed, the match is j
  tokens longer, so p changes along a draft) and by what else followed those tokens before. A single answer
  may be easier or harder than the others: its odds are the shared ones times factors of its own, its lifts.
- A draft of k tokens then gives 1 + p1 + p1 p2 + ... + p1 ... pk tokens. `choose` takes the drafted tokens of
  all sequences in order of these products and stops where (expected tokens) / t(rows), tokens a second of the
  whole batch, is the largest. Every total is looked at, for t(M) has steps.

What is learnt about p costs nothing: a proposal is compared with the answer whether it was verified or not.
So drafting stops as soon as it does not pay, and starts again with the first match that is worth it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from hasten import _native
from hasten.errors import UsageError

_GAIN = 0.05  # weight of a new measurement in t(M)
_PACE_GAIN = 0.4  # and in the pace
_OUTLIER = 1.5  # a measurement counts at most as so many times what was expected of it
_FORGET = 512  # steps after which an entry of t(M) that was not measured again is no longer believed
_SLOPE = 0.05  # what a row adds to t(1), as a share of it, until measured: low, so that drafts are tried
_MARGIN = 1.02  # drafts must promise so much more than none: what is learnt is not exact
_FLOOR = 0.02  # a token less likely than this is not looked at
_MATCH_LEAST = 1  # tokens: `choose` decides whether so short a match is worth a row


class StepTimes:
    """Seconds a pure decode step takes, by rows: measured, averaged, straight lines in between.

    A step takes pace x t(rows). The pace is what slows all steps alike, longer contexts or others on the
    machine; it follows the last few steps. So entries measured at different times can be compared.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []  # measured, ascending
        self._seconds: dict[int, float] = {}  # at pace 1
        self._seen: dict[int, int] = {}  # when each was last measured, in steps
        self._times: dict[int, int] = {}  # how often it was
        self._pace = 1.0
        self._steps = 0

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took so long."""
        self._steps += 1
        level = seconds / self._pace
        before = self._seconds.get(rows)
        if before is None:
            expected = self.curve(rows, 1)[0] if self._rows else level
            at = bisect_left(self._rows, rows)
            self._rows.insert(at, rows)
            self._seconds[rows] = min(level, _OUTLIER * expected)
            self._times[rows] = 0
        else:
            gain = max(_GAIN, 2 / (2 + self._times[rows]))  # what is new is learnt fast
            self._seconds[rows] += gain * (min(level, _OUTLIER * before) - before)
            if self._times[rows] > 3:
                self._pace += _PACE_GAIN * (min(seconds / before, _OUTLIER * self._pace) - self._pace)
        self._seen[rows] = self._steps
        self._times[rows] += 1
        if self._steps % 64 == 0:
            self._forget()

    def _forget(self) -> None:
        """An entry that was too high by chance would never be measured again if it were believed for ever."""
        self._rows = [rows for rows in self._rows if self._steps - self._seen[rows] <= _FORGET]
        for known in (self._seconds, self._seen, self._times):
            for rows in known.keys() - set(self._rows):
                del known[rows]

    def curve(self, rows: int, count: int) -> list[float]:
        """t(rows), ..., t(rows + count - 1), seconds; in units of the smallest step if none was measured."""
        known, times = self._rows, self._seconds
        if not known:
            return [1.0 + _SLOPE * (row - rows) for row in range(rows, rows + count)]
        first, last = known[0], known[-1]
        slope = beyond = _SLOPE * times[first] / (1.0 + _SLOPE * (first - 1))
        if first < last:  # no row costs more than those before: twice the rows are two steps at worst
            beyond = max(0.0, min((times[last] - times[first]) / (last - first), times[last] / last))
        curve = []
        at = bisect_left(known, rows)
        for row in range(rows, rows + count):
            while at < len(known) and known[at] < row:
                at += 1
            if at == len(known):
                curve.append(times[last] + beyond * (row - last))
            elif known[at] == row:
                curve.append(times[row])
            elif at == 0:
                curve.append(times[first] - slope * (first - row))
            else:
                low, high = known[at - 1], known[at]
                share = (row - low) / (high - low)
                curve.append(times[low] + share * (times[high] - times[low]))
        return curve


SOURCES = 3  # the prompt, recent texts, the answer
_BUCKETS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 65)  # smallest match of each, tokens
_BUCKET = [max(sum(least <= length for least in _BUCKETS) - 1, 0) for length in range(_BUCKETS[-1] + 1)]
_PRIOR = (0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95)
_DOUBT = (0.7, 2.0, 0.5, 0.2)  # odds of each kind of evidence over the ones above
KINDS = len(_DOUBT)
_PRIOR_WEIGHT = 8.0  # tokens
_MEMORY = 1 - 1 / 400  # of what was learnt over all answers, a token
_PACE = 0.25  # of an answer's own factor: the step of its log odds for a token that was not expected at all
_MOST_LIFT = 16.0


def bucket_of(length: int) -> int:
    """Which class a match of so many tokens falls into."""
    return _BUCKET[min(length, _BUCKETS[-1])]


class Acceptance:
    """Odds that the next token of a draft is confirmed, learnt over all answers.

    A class of tokens is a source (see SOURCES), the evidence for the token (`_native.DraftText`: what
    followed the same tokens before) and the length of the match.
    """

    def __init__(self) -> None:
        odds = [[p / (1 - p) * doubt for p in _PRIOR] for doubt in _DOUBT]
        self._hits = [[[_PRIOR_WEIGHT * o / (1 + o) for o in own] for own in odds] for _ in range(SOURCES)]
        self._misses = [[[_PRIOR_WEIGHT / (1 + o) for o in own] for own in odds] for _ in range(SOURCES)]

    def chance(self, source: int, length: int, evidence: int, lift: float = 1.0) -> float:
        """Probability that a token after a match of `length` tokens is the right one, for odds x `lift`."""
        bucket = bucket_of(length)
        hits = lift * self._hits[source][evidence][bucket]
        return hits / (hits + self._misses[source][evidence][bucket])

    def gains(self, source: int, length: int, evidence: Sequence[int], lifts: Sequence[float]) -> list[float]:
        """Expected tokens that each token of a draft adds: products of chances, falling."""
        gains, gain = [], 1.0
        hits, misses = self._hits[source], self._misses[source]
        for matched, kind in enumerate(evidence, length):
            bucket = _BUCKET[matched] if matched < _BUCKETS[-1] else len(_BUCKETS) - 1
            likely = lifts[kind] * hits[kind][bucket]
            gain *= likely / (likely + misses[kind][bucket])
            if gain < _FLOOR:
                break
            gains.append(gain)
        return gains

    def learn(self, source: int, length: int, evidence: int, hit: bool, lift: float) -> float:
        """The token after a match of `length` was or was not the right one; returns the answer's new lift.

        The shared counts fade over some hundred tokens. The lift is logistic regression with one coefficient
        (its log), learnt token by token.
        """
        expected = self.chance(source, length, evidence, lift)
        bucket = bucket_of(length)
        hits, misses = self._hits[source][evidence], self._misses[source][evidence]
        hits[bucket] = hits[bucket] * _MEMORY + hit
        misses[bucket] = misses[bucket] * _MEMORY + (not hit)
        step = 1.0 + _PACE * (hit - expected)
        return min(max(lift * step, 1 / _MOST_LIFT), _MOST_LIFT)


def choose(gains: Sequence[Sequence[float]], times: StepTimes) -> list[int]:
    """Draft lengths of the sequences that decode in this step.

    Args:
        gains: for each sequence the expected tokens that its first, second, ... drafted token adds; falling.
            A sequence without a proposal has none but takes a row all the same.
        times: t(M).

    Returns:
        Tokens to draft for each sequence. O(n log n) in the tokens proposed.
    """
    rows = len(gains)
    ranked = sorted((-gain, which) for which, own in enumerate(gains) for gain in own)
    lengths = [0] * rows
    if not ranked:
        return lengths
    curve = times.curve(rows, len(ranked) + 1)
    expected = float(rows)
    best, taken = _MARGIN * expected / curve[0], 0
    for count, (gain, _) in enumerate(ranked, 1):
        expected -= gain
        rate = expected / curve[count]
        if rate > best:
            best, taken = rate, count
    for _, which in ranked[:taken]:
        lengths[which] += 1
    return lengths


@dataclass
class Draft:
    """The drafting state of one sequence. Its prompt is indexed at its first proposal, not before."""

    prompt: Sequence[int]
    recent: _native.RecentTexts | None  # None: neither read nor joined
    text: _native.DraftText | None = None
    # odds of this answer's drafts over those of all answers, [SOURCES][kinds of evidence]
    lifts: list[list[float]] = field(default_factory=lambda: [[1.0] * KINDS for _ in range(SOURCES)])
    source: int = 0  # of the proposal: 0 the prompt, 1 recent texts, 2 the answer
    matched: int = 0  # tokens that the text has in common with the place that is copied from
    proposal: list[int] = field(default_factory=list)  # all of it, more than is drafted
    evidence: list[int] = field(default_factory=list)  # of each of its tokens

    def native(self) -> _native.DraftText:
        """The sequence's automaton, made when it is first needed: about 0.1 ms for 1,000 tokens of prompt."""
        if self.text is None:
            self.text = _native.DraftText(self.recent)
            self.text.append(self.prompt)
            self.prompt = ()
        return self.text


class Speculator:
    """Drafts for all sequences of an engine. Not for several threads at once; reads no clock.

    Args:
        most: tokens drafted for one sequence in a step at most; 0 drafts none.
        recent_tokens: finished requests are remembered up to so many tokens, about 100 bytes each.

    Raises:
        UsageError: a negative number.
    """

    def __init__(self, most: int = 15, recent_tokens: int = 1 << 16) -> None:
        if most < 0 or recent_tokens < 0:
            raise UsageError(
                f"{most} tokens drafted at most, {recent_tokens} remembered", hint="use 0 or more of each"
            )
        self.most = most
        self.times = StepTimes()
        self.acceptance = Acceptance()
        self._recent = _native.RecentTexts(recent_tokens)

    @property
    def recent_tokens(self) -> int:
        """Tokens of finished requests that are remembered."""
        return int(self._recent.tokens)

    def open(self, prompt: Sequence[int], *, shared: bool = True) -> Draft:
        """The state of a sequence that begins with `prompt`.

        Args:
            prompt: token ids.
            shared: False: this text is not used to draft for other requests, nor theirs for this one. The
                speed of an answer tells whether its text was seen before.
        """
        return Draft(tuple(prompt), self._recent if shared else None)

    def propose(self, drafts: Sequence[Draft | None], room: Sequence[int]) -> list[list[int]]:
        """Tokens to verify in this step, for each of the sequences that decode in it.

        Args:
            drafts: one a sequence; None for one that takes part without drafts.
            room: most draft tokens each may take.

        Returns:
            One list a sequence, often empty.
        """
        gains = [self._gains(*one) for one in zip(drafts, room, strict=True)]
        return [
            draft.proposal[:length] if draft is not None and length else []
            for draft, length in zip(drafts, choose(gains, self.times), strict=True)
        ]

    def _gains(self, draft: Draft | None, room: int) -> list[float]:
        """Look a sequence's proposal up; what its tokens promise."""
        if draft is None:
            return []
        draft.proposal = []
        most = min(room, self.most)
        if most <= 0:
            return []
        source, draft.matched, draft.proposal, draft.evidence = draft.native().propose(most, _MATCH_LEAST)
        draft.source = max(source - 1, 0)
        return self.acceptance.gains(draft.source, draft.matched, draft.evidence, draft.lifts[draft.source])

    def accept(self, draft: Draft, tokens: Sequence[int], drafted: int) -> None:
        """The answer got these tokens: the drafts that were confirmed and the one drawn after them.

        The proposal is compared with them even where it was not verified, so that the odds are learnt without
        cost and drafting starts again when it pays.

        Args:
            draft: the sequence.
            tokens: token ids, from one step; the first ones of an answer come from its prompt's step.
            drafted: how many drafts were verified: of the proposal, or more where a grammar forced them.
        """
        assert len(tokens) <= 1 + drafted, "an answer gets one token beside those that were verified"
        lifts = draft.lifts[draft.source]
        for place, (guess, token) in enumerate(zip(draft.proposal, tokens, strict=False)):
            matched, evidence = draft.matched + place, draft.evidence[place]
            lifts[evidence] = self.acceptance.learn(
                draft.source, matched, evidence, guess == token, lifts[evidence]
            )
            if guess != token:
                break
        draft.proposal = []
        if draft.text is None:
            draft.prompt = (*draft.prompt, *tokens)
        else:
            draft.text.append(tokens)

    def observe(self, rows: int, sequences: int, seconds: float) -> None:
        """A pure decode step took so long.

        Args:
            rows: tokens computed, drafts included.
            sequences: sequences they belong to; every one of them has a row at least.
            seconds: wall time, from the forward pass to the drawn tokens.
        """
        assert rows >= sequences > 0
        self.times.observe(rows, seconds)

    def close(self, draft: Draft, keep: bool = True) -> None:
        """The sequence is finished; with `keep` its text joins the recent requests."""
        if keep and draft.recent is not None and self._recent is draft.recent:
            self._recent.add(draft.native())
        draft.text, draft.prompt, draft.proposal = None, (), []
