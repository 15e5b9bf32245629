"""What saves the least recomputing for the bytes it takes goes first."""

from __future__ import annotations

from hasten.cache.aged import AgedHeap


class CostAware(AgedHeap):
    """GreedyDual-Size-Frequency: priority = age + uses * seconds to compute it again / bytes.

    Source: L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HP Laboratories HPL-98-69R1, 1998. Pages late in a prompt cost more than early ones, because attention
    reads all that lies before.
    """

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        self.use(key, max(0.0, cost) / max(1, bytes))
