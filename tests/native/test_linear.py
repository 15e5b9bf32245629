"""Linear kernels against float64, alone and in company, on every instruction set of this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import kernel_twins as twin
import numpy as np
import pytest
from kernel_twins import ISAS, activations, fewer, linear_native, random_weights
from twins import PANEL, Format

from hasten import _native

FORMATS = [Format(16)] + [
    Format(b, g, s) for b in (8, 6, 5, 4) for g in (16, 32, 64, 128) for s in (True, False)
]
# rows, columns: no whole panel, no whole group, one panel, more than one piece of 1024 inputs
SHAPES = [(40, 96), (1, 40), (72, 160), (17, 896), (33, 1100), (24, 4864)]
TOKENS = fewer([*range(1, 21), 33, 97, 200], [1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 33])


def shape_of(fmt: Format, which: int) -> tuple[int, int]:
    return SHAPES[(FORMATS.index(fmt) + which) % len(SHAPES)]


def tokens_for(cols: int) -> Sequence[int]:
    """All counts where that is quick, else those at which kernels change."""
    return TOKENS if cols < 1000 else [1, 2, 6, 7, 9, 16, 17, 33]


@functools.cache  # one for all instruction sets
def expected(fmt: Format, rows: int, cols: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    w, x = random_weights(fmt, rows, cols), activations(tokens, cols)
    if fmt.bits == 16:
        return twin.linear_bf16(w, x)
    return twin.linear_int(w, *twin.quantize(x))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("which", [0, 3])
def test_equals_the_twin_whatever_the_company(isa: str, fmt: Format, which: int) -> None:
    """Values to rounding; and a token's row has the same bits alone as among others."""
    rows, cols = shape_of(fmt, which)
    w, counts = random_weights(fmt, rows, cols), tokens_for(cols)
    x = activations(max(counts), cols)
    wanted, tolerance = expected(fmt, rows, cols, len(x))
    alone = np.concatenate([linear_native(w, x[t : t + 1]) for t in range(max(counts))])
    error = np.abs(alone - wanted)
    assert (error <= tolerance).all(), f"row, column {np.argwhere(error > tolerance)[:4].tolist()}"
    for m in counts:
        np.testing.assert_array_equal(linear_native(w, x[:m]), alone[:m], err_msg=f"{m} tokens")


@pytest.mark.parametrize("fmt", FORMATS[:1] + FORMATS[2::3], ids=str)
def test_adds_the_same_whatever_the_company(isa: str, fmt: Format) -> None:
    """`add` onto what is there: the same bits however many tokens and however deep."""
    for rows, cols in [(40, 96), (24, 2200)]:
        w = random_weights(fmt, rows, cols)
        x = activations(40, cols)
        before = np.random.default_rng(1).standard_normal((40, len(w.u))).astype(np.float32) * 100
        sums = linear_native(w, x, out=before.copy(), add=True)
        np.testing.assert_allclose(sums, before + linear_native(w, x), rtol=2e-6, atol=1e-3)
        for m in (1, 5, 7, 16, 20, 33):
            out = linear_native(w, x[:m], out=before[:m].copy(), add=True)
            np.testing.assert_array_equal(out, sums[:m], err_msg=f"{m} tokens, {cols}")


@pytest.mark.parametrize(
    "fmt", [Format(16), Format(8), Format(6, 16), Format(5, 64), Format(4, 32, False)], ids=str
)
@pytest.mark.parametrize("m", [1, 3, 16, 40])
def test_panels_by_themselves(isa: str, fmt: Format, m: int) -> None:
    """A range of panels gives the same bits as the whole and touches nothing else, wide rows included."""
    w = random_weights(fmt, 7 * PANEL - 5, 160)
    x = activations(m, 160)
    whole = linear_native(w, x)
    for first, last in [(0, 1), (1, 2), (0, 3), (2, 7), (5, 7), (3, 3)]:
        out = np.full((m, 8 * PANEL), 7.25, np.float32)
        linear_native(w, x, (first, last), out)
        inside = slice(first * PANEL, last * PANEL)
        np.testing.assert_array_equal(out[:, inside], whole[:, inside])
        out[:, inside] = 7.25
        assert (out == 7.25).all()


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
@pytest.mark.parametrize("m", [1, 19])
def test_integers_agree_to_the_bit_between_instruction_sets(fmt: Format, m: int) -> None:
    """They all do the same float operations in the same order, one multiply-add a group."""
    w = random_weights(fmt, 40, 1100)
    x = activations(m, 1100)
    results, before = {}, _native.isa()
    for name in ISAS:
        _native.use_isa(name)
        results[name] = linear_native(w, x)
    _native.use_isa(before)
    for name in ISAS:
        np.testing.assert_array_equal(results[name], results[ISAS[0]], err_msg=name)


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_every_way_gives_the_same_bits(integer_isa: str, fmt: Format) -> None:
    """Tiles, panels side by side, prefetch, unpacking: a choice of these may cost time, never a bit."""
    if len(_native.int_ways()) == 1:
        pytest.skip(f"{integer_isa} has one way only")
    many = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 25, 201)
    counts = fewer(many, many if fmt.group == 32 else many[:9])
    w, x = random_weights(fmt, 5 * PANEL - 5, 160), activations(max(counts), 160)
    what = (fmt.bits, fmt.group, fmt.symmetric)
    before = np.random.default_rng(1).standard_normal((7, len(w.u))).astype(np.float32)
    wanted = linear_native(w, x)
    added = linear_native(w, x[:7], out=before.copy(), add=True)
    try:
        for way in _native.int_ways():
            for row_class in range(len(_native.row_classes())):
                _native.choose_way(*what, row_class, way)
            for m in counts:
                assert _native.way_for(*what, m) == way
                np.testing.assert_array_equal(
                    linear_native(w, x[:m]), wanted[:m], err_msg=f"{way}, {m} tokens"
                )
            out = linear_native(w, x[:7], out=before.copy(), add=True)
            np.testing.assert_array_equal(out, added, err_msg=f"{way}, added")
    finally:
        _native.forget_ways()


def test_a_choice_holds_for_its_format_and_its_rows() -> None:
    ways, classes = _native.int_ways(), _native.row_classes()
    usual = {m: _native.way_for(4, 32, True, m) for m in (1, 2, 3, 5, 9, 25, 1000)}
    other = next((way for way in ways if way != usual[5]), None)
    if other is None:
        pytest.skip("this machine has one way only")
    try:
        _native.choose_way(4, 32, True, classes.index(8), other)
        assert _native.way_for(4, 32, True, 5) == _native.way_for(4, 32, True, 8) == other
        assert {m: _native.way_for(4, 32, True, m) for m in (1, 2, 3, 9, 25, 1000)} == {
            m: way for m, way in usual.items() if m != 5
        }
        assert _native.way_for(4, 32, False, 5) == _native.way_for(5, 32, True, 5) == usual[5]
    finally:
        _native.forget_ways()
    assert _native.way_for(4, 32, True, 5) == usual[5]


@pytest.mark.parametrize(("row_class", "way"), [(0, "nonsense"), (-1, None), (99, None)])
def test_no_such_choice(row_class: int, way: str | None) -> None:
    with pytest.raises(ValueError, match=r"no way|no such class"):
        _native.choose_way(4, 32, True, row_class, way or _native.int_ways()[0])


def test_every_way_is_timed_that_is_no_other_one() -> None:
    same = {1: {"avx512 two panels, eight tokens"}, 30: {"avx512 four panels, prefetch"}}
    for tokens, skipped in same.items():
        seconds = _native.time_ways(4, 32, True, 160, 96, tokens, 2, 2)
        for way, s in zip(_native.int_ways(), seconds, strict=True):
            assert s == float("inf") if way in skipped else 0 < s < 60


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_prompts_equal_the_twin_whatever_the_company(isa: str, fmt: Format) -> None:
    """Where an instruction set has a kernel of its own for prompts; elsewhere it is the one for decoding."""
    for rows, cols in [(40, 96), (17, 1100)]:
        w, x = random_weights(fmt, rows, cols), activations(70, cols)
        whole = linear_native(w, x, prefill=True)
        if np.array_equal(whole, linear_native(w, x)):
            return
        wanted, tolerance = twin.linear_wide(w, x)
        error = np.abs(whole - wanted)
        assert (error <= tolerance).all(), f"row, column {np.argwhere(error > tolerance)[:4].tolist()}"
        before = np.random.default_rng(1).standard_normal(whole.shape).astype(np.float32) * 100
        sums = linear_native(w, x, out=before.copy(), add=True, prefill=True)
        np.testing.assert_allclose(
            sums, before + whole, rtol=1e-6, atol=2e-4
        )  # added piece by piece of the depth
        for m in (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 65):
            np.testing.assert_array_equal(
                linear_native(w, x[:m], prefill=True), whole[:m], err_msg=f"{m} tokens"
            )
            added = linear_native(w, x[:m], out=before[:m].copy(), add=True, prefill=True)
            np.testing.assert_array_equal(added, sums[:m])
        last = len(w.u) // PANEL
        part = linear_native(w, x, (1, last), np.full_like(whole, 7.25), prefill=True)
        np.testing.assert_array_equal(part[:, PANEL:], whole[:, PANEL:])
        assert (part[:, :PANEL] == 7.25).all()


@pytest.mark.parametrize("fmt", [Format(16), Format(8), Format(4), Format(4, 32, False)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(isa: str, fmt: Format, bad: float) -> None:
    """Damaged weights must show in the logits, not vanish in the rounding of activations."""
    w = random_weights(fmt, 16, 96)
    x = activations(8, 96)
    x[3, 41] = bad
    out = linear_native(w, x)
    assert not np.isfinite(out[3]).any() if fmt.bits == 16 else not np.isfinite(out[3]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="neon9"):
        _native.use_isa("neon9")
