"""Entries in the order of their worth, where worth fades: what LFU and the cost-aware policy share."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

_SLACK = 64  # outdated heap items kept beyond one an entry before they are swept


@dataclass
class _Entry:
    weight: float
    uses: int = 0
    stamp: int = 0  # of its valid heap item
    waited: bool = False  # may not go; put before its equals when last passed over


class AgedHeap:
    """Priority = age + uses * weight; the age is the priority of the last entry that went.

    What is not used keeps the priority it had while the age rises to it: an entry that was once popular goes
    in the end (dynamic ageing, Arlitt et al. 2000). Among equals the one untouched for longest goes first.
    O(log n) a call; heap items are outdated by a new stamp and swept when they outnumber the entries.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bytes]] = []  # priority, stamp, key
        self._entries: dict[bytes, _Entry] = {}
        self._age = 0.0
        self._last = 0  # stamps go up from here, and down for what goes before its equals
        self._first = 0

    def use(self, key: bytes, weight: float) -> None:
        """An entry came in or was used once more, and is worth `weight` a use from now on."""
        entry = self._entries.setdefault(key, _Entry(weight))
        entry.weight = weight
        entry.uses += 1
        self._place(key, entry)

    def touch(self, key: bytes) -> None:
        """An entry was used; unknown keys are let pass."""
        if key in self._entries:
            self.use(key, self._entries[key].weight)

    def remove(self, key: bytes) -> None:
        """Take an entry out; unknown keys are let pass."""
        self._entries.pop(key, None)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The entry of least worth that may go, taken out; the age rises to it.

        Entries passed over are as in `passing.put_back`: first worth what the victim was, the last of them
        next in line; the second time worth what they would be if they came in now.
        """
        passed: list[tuple[float, int, bytes]] = []
        found = None
        while found is None and self._heap:
            item = heapq.heappop(self._heap)
            entry = self._entries.get(item[2])
            if entry is None or entry.stamp != item[1]:
                continue
            if evictable(item[2]):
                found = item[2]
                del self._entries[found]
                self._age = item[0]
            else:
                passed.append(item)
        for item in passed:
            entry = self._entries[item[2]]
            if found is None:
                heapq.heappush(self._heap, item)
            elif entry.waited:
                self._place(item[2], entry)
            else:
                self._put_first(item[2], entry)
        return found

    def __len__(self) -> int:
        return len(self._entries)

    def _place(self, key: bytes, entry: _Entry) -> None:
        self._last += 1
        entry.stamp, entry.waited = self._last, False
        self._push(self._age + entry.uses * entry.weight, key, entry)

    def _put_first(self, key: bytes, entry: _Entry) -> None:
        self._first -= 1
        entry.stamp, entry.waited = self._first, True
        self._push(self._age, key, entry)

    def _push(self, priority: float, key: bytes, entry: _Entry) -> None:
        heapq.heappush(self._heap, (priority, entry.stamp, key))
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [i for i in self._heap if (e := self._entries.get(i[2])) and e.stamp == i[1]]
            heapq.heapify(self._heap)
