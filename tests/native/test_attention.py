"""Attention over the paged cache against float64 softmax, and what must not change its bits."""

from __future__ import annotations

from collections.abc import Sequence

import kernel_twins as twin
import numpy as np
import pytest
from kernel_twins import PAGE, Masks, fewer

from hasten import _native

PART = 256  # tokens attention works through at a time
CONTEXTS = [1, 2, 16, 17, 31, 32, 33, 64, 255, 256, 257, 300, 511, 512, 513, 700]
HEADS = [(1, 1), (2, 1), (7, 1), (8, 1), (4, 2), (14, 2)]  # query heads, KV heads
SIZES = [16, 32, 64, 80, 96, 128, 256]


class Context:
    """Keys and values of one sequence in a cache full of older ones, its pages in random order."""

    def __init__(
        self, tokens: int, heads: tuple[int, int], size: int, int8: bool = False, seed: int = 0
    ) -> None:
        rng = np.random.default_rng([seed, tokens, *heads, size])
        self.q = rng.standard_normal((tokens, heads[0], size)).astype(np.float32)
        self.keys, self.values = rng.standard_normal((2, tokens, heads[1], size)).astype(np.float32)
        if int8 and tokens > 3:
            self.keys[1] = self.values[2] = 0
        self.int8 = int8
        pages = -(-tokens // PAGE) + 2
        self.table = rng.permutation(pages).astype(np.int32)[:-2]
        self.cache = _native.kernels.KernelCache(heads[1], size, pages, int8)
        old = rng.standard_normal((pages * PAGE, heads[1], size)).astype(np.float32) * 100
        self.cache.write(old, old, 0, np.arange(pages, dtype=np.int32))
        self.cache.write(self.keys, self.values, 0, self.table)

    def attend(self, past: int, count: int, masks: Masks, threads: int = 1) -> np.ndarray:
        counts, pasts = np.array([count], np.int32), np.array([past], np.int32)
        q = self.q[past : past + count]
        return self.cache.attend(
            q, counts, pasts, self.table[None], masks.scale, masks.window, masks.softcap, threads
        )

    def expect(self, past: int, count: int, masks: Masks) -> None:
        end = past + count
        wanted, tolerance = twin.attend(
            self.q[past:end], self.keys[:end], self.values[:end], past, masks, self.int8
        )
        error = np.abs(self.attend(past, count, masks) - wanted)
        assert (error <= tolerance).all(), (
            f"token, head, dim {np.argwhere(error > tolerance)[:3].tolist()}: {(error / tolerance).max()} x"
        )


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(size, total - at)) for at in range(0, total, size)]


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("which", range(len(CONTEXTS)))
def test_one_token_equals_the_twin(isa: str, which: int, int8: bool) -> None:
    """A decoded token at every kind of border, head sizes and groups in turn."""
    for turn in range(3):
        heads, size = HEADS[(which + 2 * turn) % len(HEADS)], SIZES[(which + 3 * turn) % len(SIZES)]
        context = Context(CONTEXTS[which], heads, size, int8)
        context.expect(CONTEXTS[which] - 1, 1, Masks(size**-0.5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", HEADS[::2], ids=str)
def test_a_prompt_equals_the_twin(isa: str, heads: tuple[int, int], size: int) -> None:
    Context(70, heads, size).expect(0, 70, Masks(size**-0.5))
    Context(290, heads, size).expect(230, 60, Masks(size**-0.5))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 256, 257, 1000])
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_sliding_windows(isa: str, window: int, int8: bool) -> None:
    context = Context(530, (4, 2), 32, int8)
    for past, count in [(0, 40), (240, 50), (529, 1)]:
        context.expect(past, count, Masks(0.2, window))


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("softcap", [0.5, 4.0, 50.0])
def test_soft_caps(isa: str, softcap: float, window: int) -> None:
    Context(300, (2, 1), 64).expect(250, 50, Masks(1.0, window, softcap))
    Context(300, (2, 1), 64, int8=True).expect(299, 1, Masks(1.0, window, softcap))


def test_large_scores_do_not_overflow(isa: str) -> None:
    """Scores of some hundreds: softmax is then all but a choice of one key."""
    context = Context(600, (2, 1), 64)
    out = context.attend(599, 1, Masks(40.0))
    assert np.isfinite(out).all()
    wanted, _ = twin.attend(context.q[599:], context.keys, context.values, 599, Masks(40.0), False)
    np.testing.assert_allclose(out, wanted, atol=0.05)


CASES = [
    ((8, 1), 64, False, Masks(0.125)),
    ((7, 1), 64, False, Masks(0.125)),
    ((4, 2), 80, True, Masks(0.2)),
    ((2, 1), 32, False, Masks(0.2, window=70)),
    ((4, 4), 16, True, Masks(0.3, window=300, softcap=5.0)),
]


@pytest.mark.parametrize("heads, size, int8, masks", CASES)
def test_chunks_do_not_change_a_bit(
    isa: str, heads: tuple[int, int], size: int, int8: bool, masks: Masks
) -> None:
    context = Context(530, heads, size, int8)
    whole = context.attend(0, 530, masks)
    for chunk in fewer((7, 64, 300), (64,)):
        parts = [context.attend(past, count, masks) for past, count in pieces(530, chunk)]
        np.testing.assert_array_equal(np.concatenate(parts), whole, err_msg=f"chunks of {chunk}")
    for past in fewer((0, 1, 31, 32, 255, 256, 511, 512, 529), (0, 31, 256, 529)):
        np.testing.assert_array_equal(context.attend(past, 1, masks)[0], whole[past], err_msg=f"token {past}")


@pytest.mark.parametrize("heads, size, int8, masks", CASES)
def test_threads_do_not_change_a_bit(
    isa: str, heads: tuple[int, int], size: int, int8: bool, masks: Masks
) -> None:
    """Few queries are split by parts of the context, many by blocks: both give the same bits."""
    context = Context(530, heads, size, int8)
    for past, count in [(529, 1), (510, 20), (0, 30), (300, 230)]:
        one = context.attend(past, count, masks)
        for threads in fewer((2, 3, 5), (3,)):
            np.testing.assert_array_equal(
                context.attend(past, count, masks, threads), one, err_msg=f"{threads} threads, {count} tokens"
            )


def attend_together(
    cache: object, batch: Sequence[tuple[np.ndarray, int, np.ndarray]], masks: Masks, threads: int
) -> list[np.ndarray]:
    """(queries, past, page table) of several sequences in one call."""
    tables = np.full((len(batch), max(len(table) for *_, table in batch)), -1, np.int32)
    for row, (_, _, table) in zip(tables, batch, strict=True):
        row[: len(table)] = table
    counts = np.array([len(q) for q, *_ in batch], np.int32)
    pasts = np.array([past for _, past, _ in batch], np.int32)
    q = np.concatenate([q for q, *_ in batch])
    out = cache.attend(q, counts, pasts, tables, masks.scale, masks.window, masks.softcap, threads)
    return np.split(out, np.cumsum(counts)[:-1])


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_company_does_not_change_a_bit(isa: str, threads: int, int8: bool) -> None:
    """Ragged sequences that decode and prefill together: each gets what it gets alone, in any order."""
    rng = np.random.default_rng(3)
    lengths, news = [1, 40, 257, 700, 33, 300], [1, 40, 1, 1, 20, 130]
    order = rng.permutation(sum(-(-n // PAGE) for n in lengths)).astype(np.int32)
    cache = _native.kernels.KernelCache(2, 48, len(order), int8)
    batch = []
    for length, new in zip(lengths, news, strict=True):
        table, order = np.split(order, [-(-length // PAGE)])
        keys, values = rng.standard_normal((2, length, 2, 48)).astype(np.float32)
        cache.write(keys, values, 0, table)
        batch.append((rng.standard_normal((new, 6, 48)).astype(np.float32), length - new, table))
    masks = Masks(0.2)
    alone = [attend_together(cache, [one], masks, 1)[0] for one in batch]
    for turn in (list(range(6)), [5, 3, 1, 0, 2, 4]):
        together = attend_together(cache, [batch[i] for i in turn], masks, threads)
        for i, out in zip(turn, together, strict=True):
            np.testing.assert_array_equal(out, alone[i], err_msg=f"sequence {i}")


def test_instruction_sets_agree_to_rounding() -> None:
    before, results = _native.isa(), []
    context = Context(400, (14, 2), 64)
    for name in twin.ISAS:
        _native.use_isa(name)
        results.append(context.attend(350, 50, Masks(0.125)))
    _native.use_isa(before)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-3)


# What is no number ----------------------------------------------------------------------------------------

BROKEN = fewer([np.inf, -np.inf, np.nan], [np.nan])
MASKS = [Masks(0.2), Masks(0.2, window=40), Masks(0.2, softcap=5.0)]


def filled(tokens: int, heads: tuple[int, int], size: int, int8: bool, old: float) -> Context:
    """A context whose pages were full of `old` before."""
    context = Context(tokens, heads, size, int8)
    pages = len(context.table) + 2
    before = np.full((pages * PAGE, heads[1], size), old, np.float32)
    context.cache.write(before, before, 0, np.arange(pages, dtype=np.int32))
    context.cache.write(context.keys, context.values, 0, context.table)
    return context


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("old", BROKEN)
def test_what_a_page_held_before_changes_nothing(isa: str, old: float, masks: Masks, int8: bool) -> None:
    """Behind the last token of a page lies what another text left there: it weighs nothing, even NaN."""
    for tokens, heads, size in [(1, (7, 1), 64), (33, (4, 2), 80), (300, (14, 2), 64), (270, (2, 2), 128)]:
        clean, dirty = (filled(tokens, heads, size, int8, what) for what in (0.0, old))
        # one row, and more rows than one tile holds, at the start, in the middle and up to the end
        few = min(tokens, 40)
        for past, count in [(tokens - 1, 1), (0, few), (tokens // 2, (few + 1) // 2), (tokens - few, few)]:
            wanted = clean.attend(past, count, masks, 1)
            for threads in fewer((1, 3), (3,)):
                np.testing.assert_array_equal(dirty.attend(past, count, masks, threads), wanted)


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("which", fewer(["keys", "values", "both"], ["both"]))
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_token_reaches_those_who_see_it_and_nobody_else(
    isa: str, broken: float, which: str, int8: bool
) -> None:
    """One token of a prompt overflows: those before it keep their bits, those who look back on it are NaN."""
    at, window = 280, 50
    for masks in (Masks(0.2), Masks(0.2, window=window), Masks(0.2, window=window, softcap=5.0)):
        context = Context(400, (2, 1), 64, int8)
        wanted = context.attend(0, 400, masks)
        keys, values = (
            np.where(which in (name, "both"), np.float32(broken), whole[at : at + 1])
            for name, whole in (("keys", context.keys), ("values", context.values))
        )
        context.cache.write(keys.astype(np.float32), values.astype(np.float32), at, context.table)
        out = context.attend(0, 400, masks)
        after = min(400, at + masks.window) if masks.window else 400
        unhurt = [*range(at), *range(after, 400)]
        np.testing.assert_array_equal(out[unhurt], wanted[unhurt])
        assert not np.isfinite(out[at:after]).any()
        for number, (past, count) in enumerate(pieces(400, 64)):
            again = context.attend(past, count, masks, 1 + 2 * (number % 2))
            np.testing.assert_array_equal(again, out[past : past + count])


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_a_query_that_is_no_number_gives_no_numbers(isa: str, masks: Masks, int8: bool) -> None:
    """Its scores are all NaN, which is not to see nothing."""
    context = Context(300, (4, 2), 64, int8)
    wanted = context.attend(200, 100, masks)
    context.q[250, 1] = np.nan
    for threads in (1, 3):
        out = context.attend(200, 100, masks, threads)
        assert np.isnan(out[50, 1]).all()
        out[50, 1] = wanted[50, 1]
        np.testing.assert_array_equal(out, wanted)


def test_scores_that_are_all_minus_infinity_are_no_numbers(isa: str) -> None:
    context = Context(3, (1, 1), 32)
    context.cache.write(np.full((3, 1, 32), -np.inf, np.float32), context.values, 0, context.table)
    context.q[:] = 1
    assert np.isnan(context.attend(0, 3, Masks(0.2))).all()
