"""What saves the least recomputing for the bytes it takes goes first."""

from __future__ import annotations

from collections.abc import Callable

from hasten.cache.aged import AgedHeap


class CostAware:
    """GreedyDual-Size-Frequency: priority = age + uses * seconds to compute it again / bytes.

    Source: L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HP Laboratories HPL-98-69R1, 1998. Pages late in a prompt cost more than early ones, because attention
    reads all that lies before.
    """

    def __init__(self) -> None:
        self._heap = AgedHeap()

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self._heap.use(key, max(0.0, cost) / max(1, bytes))

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
