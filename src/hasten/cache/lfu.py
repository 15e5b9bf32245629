"""Least frequently used goes first, with dynamic ageing."""

from __future__ import annotations

from collections.abc import Callable

from hasten.cache.aged import AgedHeap


class Lfu:
    """LFU with dynamic ageing (LFU-DA).

    Source: M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content management
    techniques for Web proxy caches", 2000: priority = uses + the priority of the last entry that went.
    """

    def __init__(self) -> None:
        self._heap = AgedHeap()

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self._heap.use(key, 1.0)

    def touch(self, key: bytes) -> None:
        """See `Policy`."""
        self._heap.touch(key)

    def remove(self, key: bytes) -> None:
        """See `Policy`."""
        self._heap.remove(key)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """See `Policy`."""
        return self._heap.victim(evictable)

    def __len__(self) -> int:
        return len(self._heap)
