"""Least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Lru:
    """LRU; costs and sizes do not matter to it. Constant time a call, but for entries passed over."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()  # the oldest first

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: bytes) -> None:
        """See `Policy`."""
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: bytes) -> None:
        """See `Policy`."""
        self._order.pop(key, None)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """See `Policy`."""
        for _ in range(len(self._order)):
            key = next(iter(self._order))
            if evictable(key):
                del self._order[key]
                return key
            self._order.move_to_end(key)
        return None

    def __len__(self) -> int:
        return len(self._order)
