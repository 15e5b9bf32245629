"""The prefix cache against a plain twin, with every policy, with and without a disk below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.policy import new_policy
from hasten.core import CachePolicy
from hasten.engine.prefix import Chain, Match, PrefixCache, child_key, root_key
from hasten.runtime.pages import CachedSequence, PagePool

SIZE = 4  # tokens a page
ROOT = root_key("model")


class Memory:
    """Pages of SIZE tokens: what a page holds is what was written there."""

    page_bytes = 4 * SIZE

    def __init__(self, pages: int) -> None:
        self.slots = np.full((pages, SIZE), -1, np.int32)

    def copy_page(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def read_page(self, page: int) -> np.ndarray:
        return self.slots[page].copy().view(np.uint8)

    def write_page(self, page: int, data: np.ndarray) -> None:
        self.slots[page] = data.view(np.int32)


class Disk:
    """Everything that was written, now and then not readable."""

    def __init__(self) -> None:
        self.entries: dict[bytes, np.ndarray] = {}
        self.broken: set[bytes] = set()

    def has(self, key: bytes) -> bool:
        return key in self.entries

    knows = has

    def read(self, key: bytes, out: np.ndarray) -> bool:
        if key in self.broken:
            return False
        out[:] = self.entries[key]
        return True

    def write(self, key: bytes, data: np.ndarray, cost: float, parent: bytes) -> None:
        assert cost > 0
        self.entries[key] = data.copy()


class Bench:
    """A cache, its pool and its memory; `run` is what an engine does with one prompt."""

    def __init__(self, pages: int, policy: CachePolicy = "lru", disk: Disk | None = None) -> None:
        self.pool, self.memory, self.disk = PagePool(pages, SIZE), Memory(pages), disk
        rules = new_policy(policy, pages * Memory.page_bytes)
        self.cache = PrefixCache(self.pool, self.memory, rules, lambda start, count: 1.0 + start, disk)

    def match(self, tokens: Sequence[int]) -> tuple[Match, Chain]:
        chain = Chain(ROOT, SIZE)
        chain.cover(tokens, len(tokens))
        return self.cache.match(tokens, chain), chain

    def run(self, tokens: list[int], tail: bool = False) -> Match:
        found, chain = self.match(tokens)
        sequence = CachedSequence(found.pages, found.tokens)
        self.check(sequence, tokens)
        self.pool.grow(sequence, len(tokens))
        for at in range(found.tokens, len(tokens)):
            assert self.pool.owners(sequence.pages[at // SIZE]) == 1, "a shared page would be written"
            self.memory.slots[sequence.pages[at // SIZE], at % SIZE] = tokens[at]
        sequence.length = len(tokens)
        self.check(sequence, tokens)
        full = len(tokens) // SIZE
        self.cache.publish(tokens, chain, sequence.pages, found.tokens // SIZE, full)
        if tail:
            self.cache.publish_tail(tokens, chain, sequence.pages)
        self.pool.truncate(sequence, 0)
        return found

    def check(self, sequence: CachedSequence, tokens: list[int]) -> None:
        for at in range(sequence.length):
            assert self.memory.slots[sequence.pages[at // SIZE], at % SIZE] == tokens[at]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=22)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TOKENS, st.booleans()), max_size=25),
    st.sampled_from(get_args(CachePolicy)),
    st.integers(6, 14),
    st.booleans(),
)
def test_what_is_found_is_what_was_written(
    texts: list[tuple[list[int], bool]], policy: CachePolicy, pages: int, with_disk: bool
) -> None:
    """Whatever comes and goes: a match holds the prompt's own tokens, leaves one, loses no page."""
    bench = Bench(pages, policy, Disk() if with_disk else None)
    for number, (tokens, tail) in enumerate(texts):
        if bench.disk is not None and number % 5 == 4:
            bench.disk.broken = set(list(bench.disk.entries)[::3])
        found = bench.run(tokens, tail)
        assert found.tokens < len(tokens)
        assert found.disk_tokens <= found.tokens
        assert bench.pool.free + len(bench.cache) == pages
    bench.cache.clear()
    assert bench.pool.free == pages
    assert len(bench.cache) == 0


@given(st.lists(TOKENS, max_size=12))
def test_with_room_enough_the_longest_prefix_is_found(texts: list[list[int]]) -> None:
    bench = Bench(400)
    seen: list[list[int]] = []
    for tokens in texts:
        found = bench.run(tokens)
        common = [len(common_start(tokens[:-1], other[: len(other) // SIZE * SIZE])) for other in seen]
        assert found.tokens >= max(common, default=0) // SIZE * SIZE
        assert found.tokens <= max(common, default=0)
        seen.append(tokens)


def common_start(one: Sequence[int], other: Sequence[int]) -> Sequence[int]:
    same = []
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same.append(a)
    return same


def test_a_match_may_end_inside_a_page() -> None:
    bench = Bench(20)
    bench.run([1, 2, 3, 4, 5, 6, 7, 8])
    found, _ = bench.match([1, 2, 3, 4, 5, 6, 0, 0])
    assert (found.tokens, len(found.pages)) == (6, 2)
    assert bench.pool.owners(found.pages[0]) == 2
    assert bench.pool.owners(found.pages[1]) == 1  # a copy


def test_a_page_in_use_stays() -> None:
    bench = Bench(6)
    bench.run([1] * 8)
    found, _ = bench.match([1] * 9)
    assert found.tokens == 8
    bench.cache.reclaim(6)
    assert len(bench.cache) == 2
    for page in found.pages:
        bench.pool.release(page)
    bench.cache.reclaim(6)
    assert len(bench.cache) == 0


def test_pages_go_from_the_end_of_a_prompt() -> None:
    bench = Bench(8)
    bench.run([1] * 16)
    for left in (3, 2, 1):
        bench.cache.reclaim(1)
        found, _ = bench.match([1] * 17)
        assert found.tokens == left * SIZE
        for page in found.pages:
            bench.pool.release(page)


def test_what_left_memory_comes_back_from_disk() -> None:
    disk = Disk()
    Bench(8, disk=disk).run([1, 2, 3, 4, 5, 6, 7, 8, 9])
    fresh = Bench(8, disk=disk)
    found = fresh.run([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (found.tokens, found.disk_tokens) == (8, 8)
    assert fresh.run([1, 2, 3, 4, 5, 6, 7, 8, 9]).disk_tokens == 0
    disk.broken = set(disk.entries)
    assert Bench(8, disk=disk).run([1, 2, 3, 4, 5, 6, 7, 8, 9]).tokens == 0


def test_keys_depend_on_everything_before() -> None:
    tokens = np.arange(SIZE, dtype=np.int32).tobytes()
    keys = {root_key("a"), root_key("b"), root_key("a", ""), child_key(root_key("a"), tokens)}
    keys.add(child_key(root_key("b"), tokens))
    keys.add(child_key(child_key(root_key("a"), tokens), tokens))
    assert len(keys) == 6
    assert {len(key) for key in keys} == {16}
    long, short = Chain(ROOT, SIZE), Chain(ROOT, SIZE)
    long.cover(list(range(11)), 11)
    short.cover(list(range(11)), 5)
    assert len(short.keys) == 1
    short.cover(list(range(11)), 11)
    assert short.keys == long.keys
    assert short.copy().keys == long.keys


@pytest.mark.parametrize("policy", get_args(CachePolicy))
def test_every_policy_gives_up_everything(policy: CachePolicy) -> None:
    bench = Bench(12, policy)
    for first in range(6):
        bench.run([first] * 11, tail=True)
    bench.cache.clear()
    assert bench.pool.free == 12
