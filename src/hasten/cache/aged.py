"""Entries in the order of their worth, where worth fades: what LFU and the cost-aware policy share."""

from __future__ import annotations

import heapq
from collections.abc import Callable

_SLACK = 64  # outdated heap items kept beyond one an entry before they are swept


class AgedHeap:
    """Priority = age + uses * weight; the age is the priority of the last entry that went.

    What is not used keeps the priority it had while the age rises to it: an entry that was once popular goes
    in the end (dynamic ageing, Arlitt et al. 2000). Among equals the one untouched for longest goes first.
    O(log n) a call; heap items are outdated by a new stamp and swept when they outnumber the entries.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bytes]] = []  # priority, stamp, key
        self._entries: dict[bytes, tuple[int, int, float]] = {}  # stamp, uses, weight
        self._age = 0.0
        self._stamp = 0

    def use(self, key: bytes, weight: float) -> None:
        """An entry came in or was used once more, and is worth `weight` a use from now on."""
        _, uses, _ = self._entries.get(key, (0, 0, 0.0))
        self._place(key, uses + 1, weight)

    def touch(self, key: bytes) -> None:
        """An entry was used; unknown keys are let pass."""
        if key in self._entries:
            self.use(key, self._entries[key][2])

    def remove(self, key: bytes) -> None:
        """Take an entry out; unknown keys are let pass."""
        self._entries.pop(key, None)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The entry of least worth that may go, taken out; the age rises to it."""
        passed: list[tuple[float, int, bytes]] = []
        found = None
        while found is None and self._heap:
            item = heapq.heappop(self._heap)
            priority, stamp, key = item
            if self._entries.get(key, (None,))[0] != stamp:
                continue
            if evictable(key):
                found = key
                del self._entries[key]
                self._age = priority
            else:
                passed.append(item)
        for item in passed:
            if found is None:
                heapq.heappush(self._heap, item)
            else:  # in use: worth as much as if it had come in now, uses as they were
                _, uses, weight = self._entries[item[2]]
                self._place(item[2], uses, weight)
        return found

    def __len__(self) -> int:
        return len(self._entries)

    def _place(self, key: bytes, uses: int, weight: float) -> None:
        self._stamp += 1
        self._entries[key] = (self._stamp, uses, weight)
        heapq.heappush(self._heap, (self._age + uses * weight, self._stamp, key))
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [i for i in self._heap if self._entries.get(i[2], (None,))[0] == i[1]]
            heapq.heapify(self._heap)
