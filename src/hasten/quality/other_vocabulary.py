"""A model whose vocabulary is a part of its source's, judged against it on the same text.

A word that the candidate lacks it writes in pieces. So every token of the source stands for one piece or
more, and both models are asked the same things, token by token of the source:

- surprise: the candidate's of a token is the sum over the token's pieces. Perplexities are per token of the
  source, and what the longer way costs is in them.
- divergence: between distributions of the next piece. The source's gives a piece the probability of all
  tokens that begin with it, so no probability is lost; top-1 agreement is of the same two.

A lost token is cut by the candidate's own merges, inside the token. Where its merges would join pieces of two
neighbours, the candidate is judged on a spelling that is right and not its usual one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError
from hasten.quality.divergence import Divergence, Doubles, Reference, Runnable, log_softmax
from hasten.quality.text import Window

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
    """Whether two tokenizers give the same tokens the same ids."""
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
