"""The prefix cache: pages of computed prompts, found again by their tokens and all tokens before them.

A full page's key is a hash of its tokens and of the previous page's key. The first page follows a root, which
names the salt and the class of the pages: equal keys mean equal keys and values, to the bit. A page of an
answer is kept only where the executor computes answers and prompts alike, so a page read from here holds what
computing it as prompt would give. Source of the scheme: vLLM's automatic prefix caching; of partly shared
pages: SGLang's radix tree (Zheng et al. 2024), here without the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.cache.policy import Policy
from hasten.runtime.pages import CachedSequence, PagePool

Bytes = npt.NDArray[np.uint8]

SETTLE_PAGES = 2
"""Pages of an ended answer that are computed at a time, as prompt, while nothing else is to do. A request
that comes then waits for these at most."""


class PageAccess(Protocol):
    """Reads, writes and copies pages: the executor does, and a stand-in without memory when a trace is
    replayed."""

    @property
    def page_bytes(self) -> int: ...
    def copy_page(self, source: int, target: int) -> None: ...
    def read_page(self, page: int) -> Bytes: ...
    def write_page(self, page: int, data: Bytes) -> None: ...


class PageDisk(Protocol):
    """The tier below: `hasten.cache.kv_disk.KvAhead`, whose methods never wait for a disk."""

    def has(self, key: bytes) -> bool: ...
    def knows(self, key: bytes) -> bool: ...
    def read(self, key: bytes, out: Bytes) -> bool: ...
    def write(self, key: bytes, data: Bytes, cost: float, parent: bytes) -> None: ...


class Chain:
    """The keys of a text's full pages."""

    def __init__(self, root: bytes, page_tokens: int) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self._page_tokens = page_tokens

    def cover(self, tokens: Sequence[int], count: int) -> None:
        """Compute the keys of every full page of the first `count` tokens; a text only ever grows."""
        start, end = len(self.keys), count // self._page_tokens
        if start >= end:
            return
        size = 4 * self._page_tokens
        raw = np.asarray(tokens[start * self._page_tokens : end * self._page_tokens], np.int32).tobytes()
        for i in range(end - start):
            self.keys.append(child_key(self.before(start + i), raw[i * size : (i + 1) * size]))

    def copy(self) -> Chain:
        """A chain that begins with these keys and can grow apart."""
        twin = Chain(self.root, self._page_tokens)
        twin.keys = list(self.keys)
        return twin

    def before(self, page: int) -> bytes:
        """The key that page number `page` follows."""
        return self.keys[page - 1] if page else self.root


def root_key(*names: str) -> bytes:
    """The key before the first page of every text with these names: salt and class of pages."""
    return blake2b("\0".join(names).encode(), digest_size=16).digest()


def child_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of a page of int32 tokens behind `parent`."""
    return blake2b(tokens, digest_size=16, key=parent).digest()


@dataclass
class _Entry:
    page: int
    parent: bytes
    tokens: bytes  # int32, as they stand in the page
    children: int = 0


@dataclass(frozen=True)
class Match:
    """The pages of a prompt that are computed already. The caller owns them."""

    pages: list[int] = field(default_factory=list)
    tokens: int = 0
    disk_tokens: int = 0  # of them, read from disk


class PrefixCache:
    """Pages found by key, each owned by the cache beside the sequences that use it.

    Args:
        pool: the pool of the pages; its `reclaim` is set to this cache's.
        memory: reads, writes and copies pages.
        policy: which page is evicted first. Only a page that no sequence uses and that no cached page follows
            is evicted.
        cost: seconds to compute `count` tokens behind `start` others.
        disk: None, or the tier that keeps pages over restarts.
    """

    def __init__(
        self,
        pool: PagePool,
        memory: PageAccess,
        policy: Policy,
        cost: Callable[[int, int], float],
        disk: PageDisk | None = None,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._policy = policy
        self._cost = cost
        self._disk = disk
        self._entries: dict[bytes, _Entry] = {}
        self._behind: dict[tuple[bytes, bytes], bytes] = {}  # (parent, first token) -> the newest child
        pool.reclaim = self.reclaim

    def __len__(self) -> int:
        """Pages in the cache."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def known(self, tokens: Sequence[int], chain: Chain) -> int:
        """How many tokens of a prompt `match` would find in full pages in memory; none is taken."""
        keys = chain.keys[: (len(tokens) - 1) // self._pool.page_tokens]
        missing = (at for at, key in enumerate(keys) if key not in self._entries)
        return next(missing, len(keys)) * self._pool.page_tokens

    def match(self, tokens: Sequence[int], chain: Chain) -> Match:
        """Take the longest computed prefix of a prompt, the last token left out: its result is wanted.

        Args:
            tokens: the prompt; the tail of a match that ends inside a page is copied into a page of its own.
            chain: the prompt's keys.
        """
        pages: list[int] = []
        try:
            from_disk = self._full_pages(tokens, chain, pages)
            found = Match(pages, len(pages) * self._pool.page_tokens, from_disk)
            return self._with_tail(tokens, chain, found)
        except BaseException:
            for page in pages:
                self._pool.release(page)
            raise

    def _full_pages(self, tokens: Sequence[int], chain: Chain, pages: list[int]) -> int:
        """Take the full pages that are there, into `pages`; how many tokens came from disk."""
        size, from_disk = self._pool.page_tokens, 0
        for key in chain.keys[: (len(tokens) - 1) // size]:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._read(key, tokens, len(pages), chain)
                if entry is None:
                    break
                from_disk += size
            self._policy.touch(key)
            self._pool.share(entry.page)
            pages.append(entry.page)
        return from_disk

    def _with_tail(self, tokens: Sequence[int], chain: Chain, found: Match) -> Match:
        size, at = self._pool.page_tokens, len(found.pages)
        rest = np.asarray(tokens[found.tokens : min(found.tokens + size, len(tokens) - 1)], np.int32)
        if rest.size == 0:
            return found
        key = self._behind.get((chain.before(at), rest[:1].tobytes()))
        if key is None or not self._pool.ensure(1) or key not in self._entries:
            return found
        entry = self._entries[key]
        there = np.frombuffer(entry.tokens, np.int32)[: rest.size]
        differs = np.flatnonzero(there != rest[: there.size])
        same = int(differs[0]) if differs.size else there.size
        page = self._pool.take()
        try:
            self._memory.copy_page(entry.page, page)
        except BaseException:
            self._pool.release(page)
            raise
        self._policy.touch(key)
        return Match([*found.pages, page], found.tokens + same, found.disk_tokens)

    def _read(self, key: bytes, tokens: Sequence[int], at: int, chain: Chain) -> _Entry | None:
        """A page from disk, now in memory too."""
        if self._disk is None or not self._disk.has(key) or not self._pool.ensure(1):
            return None
        data = np.empty(self._memory.page_bytes, np.uint8)
        if not self._disk.read(key, data):
            return None
        page, size = self._pool.take(), self._pool.page_tokens
        try:
            self._memory.write_page(page, data)
        except BaseException:
            self._pool.release(page)
            raise
        raw = np.asarray(tokens[at * size : (at + 1) * size], np.int32).tobytes()
        return self._insert(key, _Entry(page, chain.before(at), raw), at * size)

    def publish(
        self, tokens: Sequence[int], chain: Chain, pages: Sequence[int], start: int, end: int
    ) -> None:
        """Keep a sequence's full pages number `start` to `end`; those that are there already stay."""
        size = self._pool.page_tokens
        for at in range(start, end):
            key = chain.keys[at]
            if key in self._entries:
                continue
            self._pool.share(pages[at])
            raw = np.asarray(tokens[at * size : (at + 1) * size], np.int32).tobytes()
            self._insert(key, _Entry(pages[at], chain.before(at), raw), at * size)
            if self._disk is not None and not self._disk.knows(key):
                cost, parent = self._cost(at * size, size), chain.before(at)
                self._disk.write(key, self._memory.read_page(pages[at]), cost, parent)

    def publish_tail(self, tokens: Sequence[int], chain: Chain, pages: Sequence[int]) -> None:
        """Keep the last page of a sequence that ended, where that page is not full."""
        at, rest = divmod(len(tokens), self._pool.page_tokens)
        if not rest:
            return
        raw = np.asarray(tokens[-rest:], np.int32).tobytes()
        key = child_key(chain.before(at), raw)
        if key not in self._entries:
            self._pool.share(pages[at])
            self._insert(key, _Entry(pages[at], chain.before(at), raw), at * self._pool.page_tokens)

    def settle(
        self, tokens: Sequence[int], root: bytes, compute: Callable[[CachedSequence, int], None]
    ) -> tuple[int, bool]:
        """Compute the next `SETTLE_PAGES` pages of an ended text as prompt and keep them.

        Args:
            tokens: the whole text.
            root: of its keys.
            compute: computes the tokens up to a length behind those that a sequence holds; it gets the pages
                from the pool.

        Returns:
            Tokens computed, and whether nothing is left to do for this text.
        """
        chain, size = Chain(root, self._pool.page_tokens), self._pool.page_tokens
        chain.cover(tokens, len(tokens))
        found = self.match(tokens, chain)
        sequence = CachedSequence(found.pages, found.tokens)
        end = min(len(tokens), (found.tokens // size + SETTLE_PAGES) * size)
        try:
            missing = -(-end // size) - len(sequence.pages)
            if end - found.tokens <= 1 or not self._pool.ensure(missing):
                return 0, True
            compute(sequence, end)
            self.publish(tokens, chain, sequence.pages, found.tokens // size, end // size)
            if end == len(tokens):
                self.publish_tail(tokens, chain, sequence.pages)
        finally:
            self._pool.truncate(sequence, 0)
        return end - found.tokens, end == len(tokens)

    def _insert(self, key: bytes, entry: _Entry, start: int) -> _Entry:
        self._entries[key] = entry
        self._behind[entry.parent, entry.tokens[:4]] = key
        if entry.parent in self._entries:
            self._entries[entry.parent].children += 1
        cost = self._cost(start, len(entry.tokens) // 4)
        self._policy.insert(key, cost=cost, bytes=self._memory.page_bytes)
        return entry

    def reclaim(self, pages: int) -> None:
        """Evict `pages` pages, or as many as no sequence uses."""
        for _ in range(pages):
            key = self._policy.victim(self._evictable)
            if key is None:
                return
            self._drop(key)

    def _evictable(self, key: bytes) -> bool:
        entry = self._entries[key]
        return entry.children == 0 and self._pool.owners(entry.page) == 1

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._policy.remove(key)
        if self._behind.get((entry.parent, entry.tokens[:4])) == key:
            del self._behind[entry.parent, entry.tokens[:4]]
        parent = self._entries.get(entry.parent)
        if parent is not None:  # a parent that was evicted and came back may not count this child
            parent.children = max(0, parent.children - 1)
        self._pool.release(entry.page)

    def leave_disk(self) -> None:
        """Stop using the disk."""
        self._disk = None

    def clear(self) -> None:
        """Evict every page that no sequence uses."""
        self.reclaim(len(self._entries))
