"""Least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from hasten.cache.passing import put_back


class Lru:
    """LRU; costs and sizes do not matter to it. Constant time a call, but for entries passed over."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()  # the oldest first
        self._waited: set[bytes] = set()

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self._order[key] = None
        self.touch(key)

    def touch(self, key: bytes) -> None:
        """See `Policy`."""
        if key in self._order:
            self._order.move_to_end(key)
            self._waited.discard(key)

    def remove(self, key: bytes) -> None:
        """See `Policy`."""
        self._order.pop(key, None)
        self._waited.discard(key)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """See `Policy`."""
        passed: list[tuple[bytes, None]] = []
        found = None
        while found is None and self._order:
            key, _ = self._order.popitem(last=False)
            if evictable(key):
                found = key
            else:
                passed.append((key, None))
        put_back(self._order, passed, self._waited, found is not None)
        if found is not None:
            self._waited.discard(found)
        return found

    def __len__(self) -> int:
        return len(self._order)
