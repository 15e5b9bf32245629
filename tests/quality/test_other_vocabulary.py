"""Judging a model with a part of its source's vocabulary: against plain sums, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.quality.divergence import OtherVocabulary, Pieces, Reference, same_words
from hasten.quality.text import Window

SOURCE = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "ca": 6}  # no token has row 5
SMALLER = {"c": 0, "a": 1, "b": 2, "ab": 3}
WIDTH = 8


class Letters:
    """A tokenizer that merges a and b."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self.tokens = tokens

    def vocabulary(self) -> Mapping[str, int]:
        return self.tokens

    def split(self, token: str) -> list[int]:
        parts = ["ab", *token[2:]] if token.startswith("ab") and "ab" in self.tokens else list(token)
        return [self.tokens[part] for part in parts if part in self.tokens]


class Table:
    """A model whose states depend on the last two tokens, through `names`: equal texts, equal states."""

    threads = 1

    def __init__(self, rows: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.states = rng.standard_normal((rows + 1, rows, WIDTH)).astype(np.float32)
        self.head = rng.standard_normal((WIDTH, rows)).astype(np.float32)

    def hidden(self, tokens: np.ndarray) -> np.ndarray:
        before = [-1, *tokens[:-1].tolist()]
        return np.stack([self.states[b, t] for b, t in zip(before, tokens.tolist(), strict=True)])

    def logits_of(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.head


def log_p(model: Table, ids: list[int]) -> np.ndarray:
    """Log-probabilities of what follows ids, float64 [V]."""
    logits = model.logits_of(model.hidden(np.array(ids)))[-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


WRITTEN = {0: [1], 1: [2], 2: [0], 3: [3], 4: [3, 0], 6: [0, 1]}
TEXT = np.random.default_rng(3).choice([0, 1, 2, 3, 4, 6], 90).astype(np.int32)
WINDOW = Window(inputs=TEXT[:-1], targets=TEXT[1:])


def test_against_plain_sums() -> None:
    source, candidate = Table(7, 1), Table(4, 2)
    pieces = Pieces.of(Letters(SOURCE), Letters(SMALLER), 7)
    assert [list(one) for one in pieces.ids] == [WRITTEN.get(i, []) for i in range(7)]
    found = OtherVocabulary(source, (WINDOW,), pieces).compare(candidate, 0)
    ours = list(WRITTEN[int(TEXT[0])])
    for i, target in enumerate(WINDOW.targets.tolist()):
        p, q = log_p(source, TEXT[: i + 1].tolist()), log_p(candidate, ours)
        begins = np.zeros(4)
        for token, written in WRITTEN.items():
            begins[written[0]] += np.exp(p[token])
        begins /= begins.sum()
        seen = begins > 0
        assert found.kl[i] == pytest.approx((begins[seen] * (np.log(begins[seen]) - q[seen])).sum(), abs=1e-6)
        assert found.agree[i] == (begins.argmax() == q.argmax())
        assert found.nll_source[i] == pytest.approx(-p[target], rel=1e-6)
        surprise = 0.0
        for piece in WRITTEN[target]:
            surprise -= log_p(candidate, ours)[piece]
            ours.append(piece)
        assert found.nll[i] == pytest.approx(surprise, rel=1e-6)
    assert found.tokens == TEXT.size - 1


def test_the_same_words_under_other_ids() -> None:
    """Nothing is lost: the figures are those of the usual comparison."""
    source, candidate, moved = Table(7, 1), Table(7, 1), Table(6, 0)
    candidate.head = source.head + np.float32(0.1) * Table(7, 5).head
    for one in (source, candidate):
        one.states[..., -1] = 1
        one.head[-1, 5] = -1e4  # never: no token has this row
    order = [4, 0, 6, 2, 1, 3]  # new id -> old id
    moved.states, moved.head = candidate.states[[*order, -1]][:, order], candidate.head[:, order]
    words = {token: order.index(old) for token, old in SOURCE.items()}
    assert not same_words(Letters(SOURCE), Letters(words)) and same_words(
        Letters(SOURCE), Letters({**SOURCE})
    )
    found = OtherVocabulary(source, (WINDOW,), Pieces.of(Letters(SOURCE), Letters(words), 7)).compare(
        moved, 0
    )
    usual = Reference(source, (WINDOW,)).compare(candidate, 0)
    assert usual.kl.mean() > 0.001
    for name in ("kl", "nll", "nll_source"):
        np.testing.assert_allclose(getattr(found, name), getattr(usual, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.agree, usual.agree)


def test_vocabularies_that_are_no_part_of_each_other() -> None:
    with pytest.raises(UsageError, match=r"different vocabularies.*'z'") as caught:
        Pieces.of(Letters(SOURCE), Letters({**SMALLER, "z": 4}), 7)
    assert "--against" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'b' cannot be written"):
        Pieces.of(Letters(SOURCE), Letters({"a": 0, "c": 1}), 7)
