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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.core import Budget, Status, Verdict
from hasten.errors import ModelError, UsageError
from hasten.machine.cores import usable_cores
from hasten.quality.text import Window

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

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


class Reference:
    """The source model in bf16 over some windows, run once; what every candidate is held against.

    It keeps final hidden states, [T, E] float32 a window (1.8 MB at T 512, E 896), not logits, [T, V] (311 MB
    at V 152k): 16 windows of logits would be 5 GB. Logits are computed again from the states for each
    comparison, which costs one head, a quarter of a small model's pass. `keep_logits` keeps them instead, for
    a window that is compared a hundred times.
    """

    def __init__(self, model: Runnable, windows: tuple[Window, ...], *, keep_logits: bool = False) -> None:
        self.windows = windows
        self._model = model
        self._keep = keep_logits
        self._hidden: dict[int, Floats] = {}
        self._logits: dict[int, Floats] = {}

    def hidden(self, index: int) -> Floats:
        """[T, E] of one window, computed at first use."""
        if index not in self._hidden:
            self._hidden[index] = self._model.hidden(self.windows[index].inputs)
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

BLOCK = 64
"""Tokens that are drawn together."""
FEWEST_BLOCKS = 16
"""Below this many blocks (1,024 tokens) no interval is trusted."""
_RESAMPLES = 2000


def judge(found: Divergence, budget: Budget) -> Verdict:
    """Holds a comparison against a budget.

    `pass`: the whole 95 % interval of the perplexity increase is within the budget. `fail`: the whole
    interval is above it. `insufficient`: the budget lies inside the interval, or there are fewer than 1,024
    tokens; more tokens narrow it. A comparison without any difference passes at any length.
    """
    low, high = ppl_interval(found)
    identical = bool(np.array_equal(found.nll, found.nll_source))
    enough = identical or found.tokens >= BLOCK * FEWEST_BLOCKS
    status: Status = "insufficient"
    if enough and high <= budget.max_ppl_increase:
        status = "pass"
    elif enough and low > budget.max_ppl_increase:
        status = "fail"
    return Verdict(
        status=status,
        ppl=float(np.exp(found.nll.mean())),
        ppl_source=float(np.exp(found.nll_source.mean())),
        ppl_increase=float(np.expm1((found.nll - found.nll_source).mean())),
        ppl_increase_low=low,
        ppl_increase_high=high,
        kl_mean=float(found.kl.mean()),
        kl_p99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=float(found.agree.mean()),
        tokens=found.tokens,
    )


def ppl_interval(found: Divergence, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the perplexity increase (0.01 = +1 %), paired, over blocks of 64 tokens."""
    starts = np.arange(0, found.tokens, BLOCK)
    sums = np.add.reduceat(found.nll - found.nll_source, starts)
    sizes = np.diff(np.append(starts, found.tokens))
    drawn = np.random.default_rng(seed).integers(0, starts.size, size=(_RESAMPLES, starts.size))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.expm1(low)), float(np.expm1(high))


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
    """

    def __init__(self, model: Runnable, windows: tuple[Window, ...], pieces: Pieces) -> None:
        super().__init__(model, windows)
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
