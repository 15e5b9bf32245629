"""How far a candidate's next-token distributions are from the source's: KL, perplexity and top-1 agreement.

KL(source || candidate) a token, in nats, over the whole vocabulary (Kullback and Leibler, 1951).

From the figures to a verdict: the candidate and the source read the same tokens, so the difference of their
losses is paired: its interval is far narrower than either perplexity's. Interval: percentile bootstrap over
blocks of neighbouring tokens, whose losses are not independent (Efron, 1979; Künsch, 1989), seeded, so that
the same figures give the same verdict.

A model whose vocabulary is a part of its source's writes a word that it lacks in pieces. So every token of
the source stands for one piece or more, and both models are asked the same, token by token of the source:

- surprise: the candidate's of a token is the sum over the token's pieces. Perplexities are per token of the
  source, and what the longer way costs is in them.
- divergence: between distributions of the next piece. The source's gives a piece the probability of all
  tokens that begin with it, so no probability is lost; top-1 agreement is of the same two.

A lost token is cut by the candidate's own merges, inside the token. Where its merges would join pieces of two
neighbours, the candidate is judged on a spelling that is right and not its usual one.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.core import Budget, Status, Verdict
from hasten.errors import DiskError, ModelError, UsageError
from hasten.machine.cores import usable_cores
from hasten.quality.text import Window
from hasten.weights.work_store import WorkStore, read_checked, touch, write_checked

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_log = logging.getLogger("hasten.quality")

ROWS = 128
"""Rows of logits compared at once: 128 x 152k words x 4 bytes x 2 = 156 MB for the largest vocabularies."""


class Runnable(Protocol):
    """What judging needs of a model; hasten.engine.model.LanguageModel is one."""

    @property
    def threads(self) -> int:
        """Threads it runs on; comparing takes no more."""
        ...

    def hidden(self, tokens: npt.NDArray[np.int32]) -> Floats:
        """[T] ids -> [T, E] states after the final norm, from an empty cache."""
        ...

    def logits_of(self, hidden: Floats) -> Floats:
        """[R, E] -> [R, V], the head."""
        ...


@dataclass(frozen=True)
class Divergence:
    """Token by token figures of one comparison, all [N], in text order within a window."""

    kl: Doubles  # nats
    nll_source: Doubles  # nats, of the token that came next
    nll: Doubles  # nats, the candidate's
    agree: npt.NDArray[np.bool_]  # same most likely token

    @property
    def tokens(self) -> int:
        return int(self.kl.size)

    @classmethod
    def join(cls, parts: Iterable[Divergence]) -> Divergence:
        """One after the other."""
        columns = zip(*((p.kl, p.nll_source, p.nll, p.agree) for p in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


def divergence(
    source: Floats, candidate: Floats, targets: npt.NDArray[np.int32], threads: int | None = None
) -> Divergence:
    """Figures of rows of logits, by the native code on `threads` threads; None: `usable_cores`.

    Raises:
        ModelError: logits that are not finite.
    """
    from hasten import _native

    kl, nll_source, nll, agree = _native.divergence(source, candidate, targets, threads or usable_cores())
    found = Divergence(
        np.asarray(kl), np.asarray(nll_source), np.asarray(nll), np.asarray(agree, dtype=np.bool_)
    )
    _need_finite(np.isfinite(found.kl).all() & np.isfinite(found.nll).all())
    return found


class States:
    """Final hidden states of one model on disk, a file a window: a source is run over a text once.

    They share the limit of the cache with packed weights (docs/cache.md): 29 MB for 8,192 tokens of a model
    896 wide, 134 MB at 4,096. A damaged file is a miss, and a disk that cannot be written costs a warning.

    Args:
        identity: `hasten.engine.loaded.fingerprint` of the model.
        name: of the model, for people.
    """

    def __init__(self, identity: str, name: str) -> None:
        self._store = WorkStore()
        self._folder = self._store.place("states", identity[:32])
        self._name = name
        self._refused = False

    def read(self, inputs: npt.NDArray[np.int32]) -> Floats | None:
        """[T, E] of a window's inputs, [T]; None: not kept."""
        data = read_checked(self._path(inputs))
        if data is None:
            return None
        touch(self._folder)
        return data.view(np.float32).reshape(inputs.size, -1)

    def write(self, inputs: npt.NDArray[np.int32], hidden: Floats) -> None:
        """Keep [T, E]."""
        if self._refused:
            return
        try:
            data = np.ascontiguousarray(hidden, np.float32).view(np.uint8).reshape(-1)
            self._store.make_room(self._folder, data.size)
            self._store.mark(self._folder, self._name)
            write_checked(self._path(inputs), data)
        except (DiskError, OSError) as error:
            self._refused = True
            _log.warning("the source's states are not kept: %s", error)

    def _path(self, inputs: npt.NDArray[np.int32]) -> Path:
        return self._folder / f"{hashlib.sha256(inputs.tobytes()).hexdigest()[:32]}.states"


class Reference:
    """The source model in bf16 over some windows, run once; what every candidate is held against.

    It keeps final hidden states, [T, E] float32 a window (1.8 MB at T 512, E 896), not logits, [T, V] (311 MB
    at V 152k): 16 windows of logits would be 5 GB. Logits are computed again from the states for each
    comparison, which costs one head, a quarter of a small model's pass. `keep_logits` keeps them instead, for
    a window that is compared a hundred times. `states` keeps the hidden states on disk, for later runs.
    """

    def __init__(
        self,
        model: Runnable,
        windows: tuple[Window, ...],
        *,
        keep_logits: bool = False,
        states: States | None = None,
    ) -> None:
        self.windows = windows
        self._model = model
        self._states = states
        self._keep = keep_logits
        self._hidden: dict[int, Floats] = {}
        self._logits: dict[int, Floats] = {}

    def hidden(self, index: int) -> Floats:
        """[T, E] of one window, computed at first use."""
        if index not in self._hidden:
            inputs = self.windows[index].inputs
            found = self._states.read(inputs) if self._states is not None else None
            if found is None:
                found = self._model.hidden(inputs)
                if self._states is not None:
                    self._states.write(inputs, found)
            self._hidden[index] = found
        return self._hidden[index]

    def logits(self, index: int, rows: slice) -> Floats:
        """[R, V] of some rows of one window."""
        if not self._keep:
            return self._model.logits_of(np.ascontiguousarray(self.hidden(index)[rows]))
        if index not in self._logits:
            self._logits[index] = self._model.logits_of(self.hidden(index))
        return self._logits[index][rows]

    def compare(self, candidate: Runnable, index: int) -> Divergence:
        """One window of a candidate against the source."""
        window = self.windows[index]
        hidden = candidate.hidden(window.inputs)  # [T, E]
        parts = []
        for at in range(0, window.targets.size, ROWS):
            rows = slice(at, at + ROWS)
            logits = candidate.logits_of(np.ascontiguousarray(hidden[rows]))  # [R, V]
            parts.append(
                divergence(self.logits(index, rows), logits, window.targets[rows], candidate.threads)
            )
        return Divergence.join(parts)


def log_softmax(logits: Floats) -> Doubles:
    """[R, V] -> [R, V], natural logarithms in float64.

    Raises:
        ModelError: logits that are not finite.
    """
    _need_finite(np.isfinite(logits).all())
    shifted: Doubles = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _need_finite(finite: np.bool_) -> None:
    if not finite:
        raise ModelError(
            "the model's logits are not finite on the evaluation text",
            hint="check the model's files: hasten eval MODEL",
        )


Step = Callable[[int, int], None]  # windows done, windows in all

BLOCK = 256
"""Tokens whose differences of loss are drawn together: what a text is about lasts longer than a sentence.

Which size holds the truth in 95 of 100 cases was measured (benchmarks/judgements.py).
"""
KL_BLOCK = 512
"""Tokens whose KL divergences are drawn together. They depend on one another over more tokens than losses do:
with 64 tokens, 4 of 5 intervals hold the truth."""
FEWEST_TOKENS = 1024
"""Below this many no interval of the perplexity is trusted."""
FEWEST_KL_TOKENS = 4096
"""Nor one of the mean KL."""
_RESAMPLES = 2000
Z = 1.959964
"""The normal distribution's 97.5 % point: of 95 % intervals."""
_NINE_OF_TEN = 1.281552  # the normal distribution's 90 % point


@dataclass(frozen=True)
class Interval:
    """A mean over a sample, with what chance alone could make of it."""

    mean: float
    low: float  # of the 95 % interval
    high: float
    error: float  # standard error of the mean
    clusters: int  # drawn together: the sample's true size

    @property
    def detectable(self) -> float:
        """The smallest true difference from a limit that nine of ten samples of this kind show.

        Half the interval, and what leaves nine of ten means on the right side of it (Cohen, 1988).
        """
        return (_student(self.clusters - 1) + _NINE_OF_TEN) * self.error


def interval(values: Doubles, cluster: int = 1, *, seed: int = 0) -> Interval:
    """The mean of `values`, [N], and its interval: a bootstrap over clusters of `cluster` neighbours.

    Percentiles are moved outwards as far as Student's distribution is wider than the normal one and a sample
    of few clusters varies too little (the expanded percentile interval: Hesterberg, 2015). Without that, the
    interval of a sample of few clusters is too narrow. Costs 2,000 draws: 10 ms for 128 clusters. The same
    values and seed give the same interval.
    """
    starts = np.arange(0, values.size, cluster)
    sums, sizes = np.add.reduceat(values, starts), np.diff(np.append(starts, values.size))
    drawn = np.random.default_rng(seed).integers(0, starts.size, size=(_RESAMPLES, starts.size))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    count = starts.size
    few = math.sqrt(count / max(count - 1, 1))
    tail = 0.5 * math.erfc(_student(count - 1) * few / math.sqrt(2))
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high), float(means.std()) * few, count)


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's distribution, to 1 % from 4 degrees of freedom on (Fisher, Cornish)."""
    z, n = Z, max(freedom, 1)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)


def judge(found: Divergence, budget: Budget) -> Verdict:
    """Holds a comparison against a budget.

    `pass`: the whole 95 % interval of the perplexity increase is within the budget. `fail`: the whole
    interval is above it. `insufficient`: the budget lies inside the interval, or there are fewer than 1,024
    tokens; more tokens narrow it. A comparison without any difference passes at any length. Where the budget
    limits the mean KL too, which takes 4,096 tokens, both must pass, and one that fails is enough to fail.
    """
    rise, kl = interval(found.nll - found.nll_source, BLOCK), interval(found.kl, KL_BLOCK)
    low, high = float(np.expm1(rise.low)), float(np.expm1(rise.high))
    identical = bool(np.array_equal(found.nll, found.nll_source))
    parts = [within(low, high, budget.max_ppl_increase, identical or found.tokens >= FEWEST_TOKENS)]
    if budget.max_kl is not None:
        parts.append(within(kl.low, kl.high, budget.max_kl, identical or found.tokens >= FEWEST_KL_TOKENS))
    return Verdict(
        status=worst(parts),
        ppl=float(np.exp(found.nll.mean())),
        ppl_source=float(np.exp(found.nll_source.mean())),
        ppl_increase=float(np.expm1(rise.mean)),
        ppl_increase_low=low,
        ppl_increase_high=high,
        kl_mean=kl.mean,
        kl_p99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=float(found.agree.mean()),
        tokens=found.tokens,
        kl_mean_low=kl.low,
        kl_mean_high=kl.high,
        ppl_detectable=float(np.expm1(rise.detectable)),
    )


def within(low: float, high: float, limit: float, enough: bool = True) -> Status:
    """Holds an interval against the most that is allowed; `insufficient` where the sample is not `enough`."""
    if not enough:
        return "insufficient"
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "insufficient"


def worst(statuses: Iterable[Status]) -> Status:
    """What several verdicts say together: one `fail` fails, all must `pass`; none at all is a `pass`."""
    return max(statuses, key=("pass", "insufficient", "fail").index, default="pass")


def tokens_needed(verdict: Verdict, budget: Budget) -> int | None:
    """Tokens that would decide an `insufficient` verdict if its estimate is right; None: no text would.

    Intervals narrow with the square root of the tokens. A tenth is added, and the answer is at least the
    1,024 tokens below which nothing is judged.
    """
    gap = abs(verdict.ppl_increase - budget.max_ppl_increase)
    half = (verdict.ppl_increase_high - verdict.ppl_increase_low) / 2
    if gap == 0:
        return None
    return max(math.ceil(1.1 * verdict.tokens * (half / gap) ** 2), FEWEST_TOKENS)


def evaluate(
    candidate: Runnable, reference: Reference, budget: Budget, step: Step = lambda done, total: None
) -> Verdict:
    """Compares every window and judges.

    Args:
        candidate: the model in question.
        reference: the source in bf16 over the windows to read.
        budget: what a perplexity increase is held against.
        step: told before each window.
    """
    total = len(reference.windows)
    parts = []
    for index in range(total):
        step(index, total)
        parts.append(reference.compare(candidate, index))
    step(total, total)
    return judge(Divergence.join(parts), budget)


_ROWS = 32
"""Rows of logits compared at once, in float64: 39 MB for 152k words."""
Ids = npt.NDArray[np.int32]


class Words(Protocol):
    """What is needed of a tokenizer."""

    def vocabulary(self) -> Mapping[str, int]:
        """Every token by its own spelling, with its id."""
        ...

    def split(self, token: str) -> list[int]:
        """Ids of the pieces that a token's spelling is written with."""
        ...


@dataclass(frozen=True)
class Pieces:
    """How each token of a source is written with a candidate's."""

    ids: tuple[tuple[int, ...], ...]  # by the source's id; empty: a row that no token has
    order: Ids  # source's ids that are tokens, by their first piece
    starts: npt.NDArray[np.intp]  # where in `order` another first piece begins
    firsts: Ids  # that first piece

    @classmethod
    def of(cls, source: Words, candidate: Words, rows: int) -> Pieces:
        """Of `rows` ids of the source.

        Raises:
            UsageError: the candidate has tokens that the source lacks, or cannot write one of the source's.
        """
        theirs, ours = source.vocabulary(), candidate.vocabulary()
        strange = next((token for token in ours if token not in theirs), None)
        if strange is not None:
            raise UsageError(
                f"the two models have different vocabularies: only one of them has the token {strange!r:.40}",
                hint="give --against the model that this one was made from",
            )
        ids: list[tuple[int, ...]] = [()] * rows
        for token, index in theirs.items():
            if index < rows:
                ids[index] = (ours[token],) if token in ours else tuple(candidate.split(token))
                if not ids[index]:
                    raise UsageError(
                        f"the token {token!r:.40} cannot be written with the smaller vocabulary",
                        hint="judge it by what it says: hasten generate ARTIFACT -p TEXT",
                    )
        named = np.array([index for index, pieces in enumerate(ids) if pieces], np.int32)
        first = np.array([ids[index][0] for index in named], np.int32)
        by_first = np.argsort(first, kind="stable")
        firsts, starts = np.unique(first[by_first], return_index=True)
        return cls(tuple(ids), named[by_first], starts, firsts)


def same_words(source: Words, candidate: Words) -> bool:
    return dict(source.vocabulary()) == dict(candidate.vocabulary())


class OtherVocabulary(Reference):
    """A reference for candidates with a part of its vocabulary.

    Args:
        model: the source. windows: the text, in the source's tokens. pieces: how the candidate writes them.
        states: as for `Reference`.
    """

    def __init__(
        self,
        model: Runnable,
        windows: tuple[Window, ...],
        pieces: Pieces,
        states: States | None = None,
    ) -> None:
        super().__init__(model, windows, states=states)
        self._pieces = pieces

    def compare(self, candidate: Runnable, index: int) -> Divergence:
        """One window of a candidate against the source, token by token of the source."""
        window, pieces = self.windows[index], self._pieces.ids
        opening = list(pieces[int(window.inputs[0])])
        written = [pieces[int(token)] for token in window.targets]
        ids = np.array([*opening, *(piece for token in written for piece in token)], np.int32)
        ends = len(opening) + np.cumsum([len(token) for token in written])  # behind each token
        begins = np.concatenate([[len(opening)], ends[:-1]])
        hidden = candidate.hidden(ids[:-1])  # row r predicts ids[r + 1]
        parts = []
        for at in range(0, len(written), _ROWS):
            cut = slice(at, min(at + _ROWS, len(written)))
            rows = slice(int(begins[cut.start]) - 1, int(ends[cut.stop - 1]) - 1)
            ours = log_softmax(candidate.logits_of(np.ascontiguousarray(hidden[rows])))
            theirs = log_softmax(self.logits(index, cut))
            next_ids = ids[rows.start + 1 : rows.stop + 1]
            surprise = -ours[np.arange(next_ids.size), next_ids]
            first = begins[cut] - begins[cut.start]
            parts.append(
                self._part(theirs, ours[first], window.targets[cut], np.add.reduceat(surprise, first))
            )
        return Divergence.join(parts)

    def _part(self, theirs: Doubles, ours: Doubles, targets: Ids, surprise: Doubles) -> Divergence:
        """Of log-probabilities: the source's [R, V], the candidate's [R, V'] of the next piece."""
        known = self._pieces
        p = np.add.reduceat(np.exp(theirs[:, known.order]), known.starts, axis=1)  # [R, first pieces]
        p /= p.sum(axis=1, keepdims=True)  # rows that no token has
        log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
        kl = np.maximum((p * (log_p - ours[:, known.firsts])).sum(axis=1), 0.0)
        return Divergence(
            kl=kl,
            nll_source=-theirs[np.arange(targets.size), targets],
            nll=surprise,
            agree=known.firsts[p.argmax(axis=1)] == ours.argmax(axis=1),
        )
