"""The page pool: nobody loses a page, nobody shares one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UsageError
from hasten.runtime.pages import PagePool, Sequence

PAGES, TOKENS = 12, 4


def check(pool: PagePool, sequences: list[Sequence]) -> None:
    owned = [page for sequence in sequences for page in sequence.pages]
    assert sorted(owned + pool._free) == list(range(PAGES))
    assert pool.free == PAGES - len(owned)
    for sequence in sequences:
        assert 0 <= sequence.length <= TOKENS * len(sequence.pages)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["grow", "cut", "end"]), st.integers(0, 30)), max_size=60
    )
)
def test_no_page_is_lost_or_shared(steps: list[tuple[int, str, int]]) -> None:
    pool, sequences = PagePool(PAGES, TOKENS), [Sequence() for _ in range(5)]
    for which, step, count in steps:
        sequence = sequences[which]
        if step == "grow":
            wanted = sequence.length + count
            missing = -(-wanted // TOKENS) - len(sequence.pages)
            before = list(sequence.pages)
            if missing > pool.free:
                with pytest.raises(UsageError, match="free pages"):
                    pool.grow(sequence, wanted)
                assert sequence.pages == before
            else:
                pool.grow(sequence, wanted)
                assert sequence.pages[: len(before)] == before
                assert len(sequence.pages) == max(len(before), -(-wanted // TOKENS))
                sequence.length = wanted
        else:
            length = 0 if step == "end" else count
            kept = sequence.pages[: -(-length // TOKENS)]
            pool.truncate(sequence, length)
            assert sequence.pages == kept and sequence.length <= length
        check(pool, sequences)
    for sequence in sequences:
        pool.truncate(sequence, 0)
    assert pool.free == PAGES


def test_a_page_used_last_comes_first() -> None:
    """Its memory is warm."""
    pool, one, two = PagePool(PAGES, TOKENS), Sequence(), Sequence()
    pool.grow(one, 5)
    assert one.pages == [0, 1]
    pool.truncate(one, 0)
    pool.grow(two, 3)
    assert two.pages == [0]


@pytest.mark.parametrize("length, pages", [(0, 0), (1, 1), (4, 1), (5, 2), (48, 12)])
def test_whole_pages(length: int, pages: int) -> None:
    pool, sequence = PagePool(PAGES, TOKENS), Sequence()
    pool.grow(sequence, length)
    assert len(sequence.pages) == pages
    pool.grow(sequence, 0)
    assert len(sequence.pages) == pages
