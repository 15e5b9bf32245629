"""How far a candidate's next-token distributions are from the source's: KL, perplexity and top-1 agreement.

KL(source || candidate) a token, in nats, over the whole vocabulary (Kullback and Leibler, 1951).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.errors import ModelError
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


def divergence_plain(source: Floats, candidate: Floats, targets: npt.NDArray[np.int32]) -> Divergence:
    """The definition in float64 NumPy, and the test oracle of the native one.

    Args:
        source: [R, V] logits. candidate: [R, V] logits. targets: [R] ids that came next.
    """
    p, q = log_softmax(source), log_softmax(candidate)  # [R, V]
    rows = np.arange(targets.size)
    return Divergence(
        kl=np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0),
        nll_source=-p[rows, targets],
        nll=-q[rows, targets],
        agree=source.argmax(axis=-1) == candidate.argmax(axis=-1),
    )


def divergence(
    source: Floats, candidate: Floats, targets: npt.NDArray[np.int32], threads: int | None = None
) -> Divergence:
    """Same as `divergence_plain`, by the native code on `threads` threads; None: `usable_cores`.

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
