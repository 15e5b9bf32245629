"""KL, loss and agreement: the definition, the native code, and that source and candidate read the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fakes import ALPHABET, FakeModel, FakeWorkshop, LetterTokenizer
from hasten.core import Recipe
from hasten.errors import ModelError
from hasten.quality.divergence import Divergence, Reference, States, divergence, log_softmax
from hasten.quality.text import windows
from hasten.weights.work_store import WorkStore

FIGURES = ("kl", "nll_source", "nll")


def logits(rows: int, words: int, seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, scale, (rows, words))).astype(np.float32)


def divergence_plain(source: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> Divergence:
    """The definition in float64 NumPy, the twin of the native one.

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


def test_plain_is_the_textbook() -> None:
    source, candidate = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    found = divergence_plain(source.astype(np.float32), candidate.astype(np.float32), np.array([2], np.int32))
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-6)
    assert found.nll_source[0] == pytest.approx(math.log(4), abs=1e-6)
    assert found.nll[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not found.agree[0]


def test_plain_does_not_mind_a_shift_of_logits() -> None:
    a, b, targets = logits(5, 40, 0), logits(5, 40, 1), np.arange(5, dtype=np.int32)
    shifted = divergence_plain(a + 100, b - 300, targets)
    for figure in FIGURES:
        np.testing.assert_allclose(
            getattr(shifted, figure), getattr(divergence_plain(a, b, targets), figure), atol=1e-3
        )


@pytest.mark.parametrize(("rows", "words"), [(1, 1), (1, 7), (3, 17), (5, 1000), (33, 513), (2, 152_064)])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_native_is_the_plain_one(rows: int, words: int, scale: float) -> None:
    a, b = logits(rows, words, 2, scale), logits(rows, words, 3, scale)
    targets = np.random.default_rng(4).integers(0, words, rows).astype(np.int32)
    mine, plain = divergence(a, b, targets), divergence_plain(a, b, targets)
    for figure in FIGURES:
        np.testing.assert_allclose(getattr(mine, figure), getattr(plain, figure), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(mine.agree, plain.agree)


def test_native_says_zero_for_the_same_logits() -> None:
    a = logits(4, 5000, 5)
    found = divergence(a, a.copy(), np.zeros(4, np.int32))
    assert np.abs(found.kl).max() < 1e-6
    assert found.agree.all()


def test_logits_that_are_not_finite_are_an_error() -> None:
    a, b = logits(2, 10, 6), logits(2, 10, 7)
    b[1, 3] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        divergence(a, b, np.zeros(2, np.int32))


@pytest.fixture
def source() -> FakeModel:
    return FakeWorkshop().build(Recipe.parse("bf16"))


@pytest.fixture
def narrow() -> FakeModel:
    return FakeWorkshop().build(Recipe.parse("w4"))


TEXT = "".join(ALPHABET[(i * i * 7 + i // 3) % 48] for i in range(3000))


def test_the_source_runs_once_however_many_compare(source: FakeModel, narrow: FakeModel) -> None:
    reference = Reference(source, windows(TEXT, LetterTokenizer(), tokens=1024))
    for _ in range(3):
        for index in range(2):
            reference.compare(narrow, index)
    assert source.calls == 2
    assert narrow.calls == 6


def test_kept_logits_give_the_same(source: FakeModel, narrow: FakeModel) -> None:
    """But for a rounding: NumPy's products of many rows and of few may take different ways."""
    cut = windows(TEXT, LetterTokenizer(), tokens=700, length=300)
    kept, again = Reference(source, cut, keep_logits=True), Reference(source, cut)
    for index in range(len(cut)):
        np.testing.assert_allclose(
            kept.compare(narrow, index).kl, again.compare(narrow, index).kl, rtol=1e-4, atol=1e-6
        )


def test_rows_are_paired(source: FakeModel, narrow: FakeModel) -> None:
    """Row r of both models is the same place of the text, across the borders of row chunks."""
    (window,) = windows(TEXT, LetterTokenizer(), tokens=300, length=300)
    found = Reference(source, (window,)).compare(narrow, 0)
    whole = divergence_plain(
        source.logits_of(source.hidden(window.inputs)),
        narrow.logits_of(narrow.hidden(window.inputs)),
        window.targets,
    )
    assert found.tokens == 300
    np.testing.assert_allclose(found.kl, whole.kl, atol=1e-5)
    np.testing.assert_allclose(found.nll, whole.nll, atol=1e-5)
    same = Reference(source, (window,)).compare(source, 0)
    np.testing.assert_array_equal(same.nll, same.nll_source)


def test_joined_in_order() -> None:
    parts = [Divergence(np.full(n, float(n)), np.zeros(n), np.ones(n), np.ones(n, np.bool_)) for n in (2, 3)]
    assert Divergence.join(parts).kl.tolist() == [2, 2, 3, 3, 3]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(source: FakeModel, narrow: FakeModel, tokens: int, identity: str = "a") -> list[Divergence]:
    cut = windows(TEXT, LetterTokenizer(), tokens=tokens, length=300)
    held = Reference(source, cut, states=States(identity, "letters"))
    return [held.compare(narrow, index) for index in range(len(cut))]


def test_the_source_runs_once_over_a_text(cache: Path, source: FakeModel, narrow: FakeModel) -> None:
    first = kept(source, narrow, 600)
    assert source.calls == 2
    again = kept(source, narrow, 900)
    assert source.calls == 3  # the third window is new
    for one, other in zip(first, again, strict=False):
        np.testing.assert_array_equal(one.kl, other.kl)
    kept(source, narrow, 300, identity="b")
    assert source.calls == 4


def test_states_that_were_damaged_are_computed_again(
    cache: Path, source: FakeModel, narrow: FakeModel
) -> None:
    first = kept(source, narrow, 300)
    (file,) = cache.glob("compress/states/*/*.states")
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    np.testing.assert_array_equal(kept(source, narrow, 300)[0].nll, first[0].nll)
    assert source.calls == 2


def test_states_that_cannot_be_kept_cost_a_warning(
    cache: Path, source: FakeModel, narrow: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "compress").mkdir(parents=True)
    (cache / "compress" / "states").write_text("a file where the folder should be")
    assert len(kept(source, narrow, 600)) == 2
    assert caplog.text.count("not kept") == 1


def test_kept_states_share_the_limit(cache: Path, source: FakeModel, narrow: FakeModel) -> None:
    kept(source, narrow, 300)
    (held,) = WorkStore().held()
    assert held.path.parent.name == "states"
    assert WorkStore().model(held.path) == "letters"
    assert WorkStore().verify(held.path) is None
