"""Least frequently used goes first, with dynamic ageing."""

from __future__ import annotations

from hasten.cache.aged import AgedHeap


class Lfu(AgedHeap):
    """LFU with dynamic ageing (LFU-DA).

    Source: M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content management
    techniques for Web proxy caches", 2000: priority = uses + the priority of the last entry that went.
    """

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self.use(key, 1.0)
