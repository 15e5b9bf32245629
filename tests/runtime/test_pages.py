"""The page pool: nobody loses a page, nobody shares one, and memory that runs short is given back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UsageError
from hasten.machine.memory import LOOK_S, MemoryRoom
from hasten.runtime.pages import CachedSequence, PageMemory, PagePool

PAGES, TOKENS = 12, 4


def check(pool: PagePool, sequences: list[CachedSequence]) -> None:
    owned = [page for sequence in sequences for page in sequence.pages]
    assert sorted(owned + pool._filled + pool._bare) == list(range(PAGES))
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
    pool, sequences = PagePool(PAGES, TOKENS), [CachedSequence() for _ in range(5)]
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
    pool, one, two = PagePool(PAGES, TOKENS), CachedSequence(), CachedSequence()
    pool.grow(one, 5)
    assert one.pages == [0, 1]
    pool.truncate(one, 0)
    pool.grow(two, 3)
    assert two.pages == [0]


@pytest.mark.parametrize("length, pages", [(0, 0), (1, 1), (4, 1), (5, 2), (48, 12)])
def test_whole_pages(length: int, pages: int) -> None:
    pool, sequence = PagePool(PAGES, TOKENS), CachedSequence()
    pool.grow(sequence, length)
    assert len(sequence.pages) == pages
    pool.grow(sequence, 0)
    assert len(sequence.pages) == pages


SIZE, RESERVE = 100, 250  # bytes


class Machine:
    """Memory of a machine that pools and other programs fill."""

    def __init__(self, total: int) -> None:
        self.total, self.others, self.now = total, 0, 100.0
        self.pools: list[PagePool] = []
        self.filled: list[set[int]] = []
        self.room = MemoryRoom(self.available, RESERVE, lambda: self.now)

    def available(self) -> int:
        return self.total - self.others - SIZE * sum(len(pages) for pages in self.filled)

    def pool(self, pages: int = PAGES) -> PagePool:
        filled: set[int] = set()

        def drop(first: int, count: int) -> None:
            filled.difference_update(range(first, first + count))

        self.filled.append(filled)
        self.pools.append(PagePool(pages, TOKENS, PageMemory(self.room, SIZE, drop)))
        return self.pools[-1]

    def write(self, pool: PagePool, sequence: CachedSequence, length: int) -> None:
        """What an executor does."""
        pool.grow(sequence, length)
        fresh = sequence.pages[sequence.length // TOKENS :]
        pool.wrote(fresh)
        self.filled[self.pools.index(pool)].update(fresh)
        sequence.length = length

    def second(self, pool: PagePool) -> int:
        """A second later; what `look` says is missing."""
        self.now += LOOK_S
        return pool.look()


def test_no_more_pages_are_filled_than_memory_has_room_for() -> None:
    machine = Machine(1000)
    pool, sequence = machine.pool(), CachedSequence()
    assert (pool.usable, pool.free) == (7, PAGES)
    machine.write(pool, sequence, 7 * TOKENS)
    assert pool.usable == 0 and machine.available() == 300
    assert not pool.ensure(1)
    pool.truncate(sequence, 0)
    assert pool.usable == 7, "pages that take memory already cost nothing more"
    machine.others = 300
    assert pool.usable == 7
    machine.write(pool, sequence, 7 * TOKENS)


def test_the_only_sequence_may_fill_most_of_the_reserve() -> None:
    """Others might end and give pages back; it can wait for nobody."""
    machine = Machine(450)
    pool, sequence = machine.pool(), CachedSequence()
    assert (pool.usable, pool.ensure(3), pool.ensure(3, alone=True), pool.ensure(4, alone=True)) == (
        2, False, True, False,
    )  # fmt: skip
    machine.write(pool, sequence, 3 * TOKENS)
    assert machine.available() == 150
    with pytest.raises(UsageError, match="0 free pages"):
        pool.grow(sequence, 4 * TOKENS)
    assert machine.second(pool) == 100, "all of it is in use"
    machine.others = 1000
    pool.truncate(sequence, 0)
    assert pool.usable == 3, "what takes memory already may be used"
    machine.second(pool)
    assert not pool.ensure(1, alone=True), "nothing is left: an error, and no process that is killed"


def test_pages_that_are_promised_are_not_promised_twice() -> None:
    """A prompt gets all its pages before the first is written; no other model may count on that memory."""
    machine = Machine(1000)
    one, other, prompt = machine.pool(), machine.pool(), CachedSequence()
    one.grow(prompt, 6 * TOKENS)
    machine.now += LOOK_S
    assert not other.ensure(4)
    assert other.usable == 1, "100 bytes are left above the reserve"
    one.truncate(prompt, 0)
    assert other.usable == 7
    assert other.ensure(7)


def test_free_pages_are_given_back_then_cached_ones() -> None:
    machine = Machine(1500)
    pool, used, free, cached = machine.pool(), CachedSequence(), CachedSequence(), CachedSequence()
    for sequence, pages in ((used, 2), (free, 3), (cached, 4)):
        machine.write(pool, sequence, pages * TOKENS)
    pool.reclaim = lambda pages: pool.truncate(cached, max(0, len(cached.pages) - pages) * TOKENS)
    pool.truncate(free, 0)
    assert machine.second(pool) == 0 and machine.available() == 600
    machine.others = 550  # 50 of the reserve's 250 are left
    assert machine.second(pool) == 0
    assert machine.available() == 250 and len(cached.pages) == 4
    machine.others = 850
    assert machine.second(pool) == 0
    assert machine.available() == 250 and len(cached.pages) == 2
    assert machine.filled[0] == {*used.pages, *cached.pages}
    machine.others = 5000
    assert machine.second(pool) > 0, "what is in use stays"
    assert machine.filled[0] == set(used.pages) and len(used.pages) == 2
    machine.others = 0
    machine.second(pool)
    assert pool.usable == PAGES - 2, "memory came back"


def test_a_little_below_the_reserve_nothing_is_thrown_away() -> None:
    machine = Machine(1000)
    pool, sequence = machine.pool(), CachedSequence()
    machine.write(pool, sequence, 7 * TOKENS)
    pool.truncate(sequence, 0)
    machine.others = 100
    assert machine.second(pool) == 0
    assert machine.available() == 200 and len(machine.filled[0]) == 7


def test_a_page_goes_with_the_neighbours_that_hold_nothing() -> None:
    """Pages share pages of the system where they meet."""
    machine = Machine(10_000)
    dropped: list[tuple[int, int]] = []
    behind = PageMemory(machine.room, SIZE, lambda first, count: dropped.append((first, count)))
    pool, kept, first, second = (
        PagePool(PAGES, TOKENS, behind),
        CachedSequence(),
        CachedSequence(),
        CachedSequence(),
    )
    for sequence, pages in ((first, 3), (kept, 1), (second, 2)):
        pool.grow(sequence, pages * TOKENS)
        pool.wrote(sequence.pages)
    pool.truncate(first, 0)
    pool.truncate(second, 0)
    machine.others = 20_000
    machine.second(pool)
    assert dropped == [(0, 3), (4, 3)], "pages 0 to 2, and 4 and 5 with 6, which nobody has written"


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4), st.sampled_from(["grow", "end", "others", "second"]), st.integers(0, 12)
        ),
        max_size=60,
    )
)
def test_memory_is_never_full(steps: list[tuple[int, str, int]]) -> None:
    """Two models; others take what is free above the reserve, and give it back."""
    machine = Machine(2400)
    pools = [machine.pool(), machine.pool()]
    sequences = [CachedSequence() for _ in range(5)]
    for which, step, count in steps:
        sequence, pool = sequences[which], pools[which % 2]
        if step == "grow" and pool.ensure(count):
            machine.write(pool, sequence, sequence.length + count * TOKENS)
        elif step == "end":
            pool.truncate(sequence, 0)
        elif step == "others":
            free = machine.available() - RESERVE  # others may take what is free, and leave a reserve
            machine.others = max(0, min(100 * count, machine.others + free))
            machine.now += LOOK_S
            for one in pools:
                one.look()
        elif step == "second":
            machine.second(pool)
        held = [len(pages) for pages in machine.filled]
        assert machine.available() >= 0
        assert all(one.held_bytes() == SIZE * n for one, n in zip(pools, held, strict=True))
        assert all(one.promised_bytes() == 0 for one in pools)
    for which, sequence in enumerate(sequences):
        pools[which % 2].truncate(sequence, 0)
    assert all(pool.free == PAGES for pool in pools)


def test_a_step_that_takes_long_does_not_keep_memory() -> None:
    """While the model computes, another thread gives free and cached pages back; otherwise it must not."""
    machine = Machine(1500)
    pool, sequence = machine.pool(), CachedSequence()
    machine.write(pool, sequence, 8 * TOKENS)
    pool.truncate(sequence, 3 * TOKENS)
    machine.others, machine.now = 700, machine.now + LOOK_S
    machine.room.look()
    pool.give_back_meanwhile()
    assert len(machine.filled[0]) == 8, "somebody manages pages"
    with pool.computing():
        pool.give_back_meanwhile()
    assert len(machine.filled[0]) == 5 and machine.available() >= RESERVE
    with pytest.raises(ValueError), pool.computing():
        raise ValueError("the step failed")
    pool.give_back_meanwhile()
    assert len(machine.filled[0]) == 5
