"""What one tier holds: sizes, who depends on whom, and what goes when room is needed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from hasten.cache.policy import new_policy
from hasten.core import CachePolicy


@dataclass
class Item:
    """One entry."""

    size: int  # bytes
    parent: bytes
    used: float  # when, seconds since 1970


class Shelf:
    """Entries under a size limit. An entry goes only when no other on the shelf has it as its parent.

    The disk tier keeps its books here, and the replay of a trace does too.
    """

    def __init__(self, limit_bytes: int, policy: CachePolicy) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._items: OrderedDict[bytes, Item] = OrderedDict()  # the longest unused first
        self._children: Counter[bytes] = Counter()
        self._policy = new_policy(policy, limit_bytes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def oldest_first(self) -> list[bytes]:
        """All entries, the longest unused first."""
        return list(self._items)

    def used(self, key: bytes) -> float:
        """When an entry was last used."""
        return self._items[key].used

    @property
    def oldest(self) -> float | None:
        """When the longest unused entry was used; None: there is none."""
        return next(iter(self._items.values())).used if self._items else None

    def insert(self, key: bytes, size: int, cost: float, parent: bytes, used: float) -> None:
        """An entry came in, or again; `cost` seconds to compute it, `parent` empty where it is unknown."""
        self.remove(key)
        self._items[key] = Item(size, parent, used)
        self._children[parent] += 1
        self.bytes += size
        self._policy.insert(key, cost=cost, bytes=size)

    def touch(self, key: bytes, used: float) -> None:
        """An entry was used; unknown keys are let pass."""
        if key in self._items:
            self._items[key].used = used
            self._items.move_to_end(key)
            self._policy.touch(key)

    def remove(self, key: bytes) -> None:
        """An entry is gone; unknown keys are let pass."""
        if key in self._items:
            self._policy.remove(key)
            self._forget(key)

    def pop(self) -> bytes | None:
        """Take the entry out that goes first. None: the shelf is empty."""
        key = self._policy.victim(lambda key: self._children[key] == 0) or self._policy.victim(lambda _: True)
        if key is not None:
            self._forget(key)
        return key

    def _forget(self, key: bytes) -> None:
        item = self._items.pop(key)
        self.bytes -= item.size
        self._children[item.parent] -= 1
        if self._children[item.parent] <= 0:
            del self._children[item.parent]
