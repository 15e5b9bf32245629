"""Which entry of a full cache is evicted first: four policies with one interface, and the shelf of one tier.

A new policy is a class here and a line in `POLICIES`.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hasten.core import CachePolicy
from hasten.errors import UsageError

Entry = TypeVar("Entry")
Evictable = Callable[[bytes], bool]

_SMALL = 0.1  # S3-FIFO: of the capacity, the paper's choice, good on nearly all of its 6,594 traces
_MOST_USES = 3  # two bits an entry
_PROMOTED = 2  # uses on trial that bring an entry into the main queue
_PATIENCE = 64  # entries on trial passed over for one victim before the main queue gives one
_SLACK = 64  # outdated heap items kept beyond one an entry before they are swept


class Policy(Protocol):
    """The order in which entries are evicted. It holds keys alone. Not for several threads."""

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """Add an entry: `cost` seconds to compute it again, `bytes` it takes. A known key is touched."""

    def touch(self, key: bytes) -> None:
        """An entry was used. Unknown keys are ignored."""

    def remove(self, key: bytes) -> None:
        """Remove an entry that is not evicted but gone. Unknown keys are ignored."""

    def victim(self, evictable: Evictable) -> bytes | None:
        """Remove the entry to evict now and return it. None where no entry may be evicted.

        Entries that may not be evicted (in use, or others depend on them) are passed over: see `put_back`.
        To find that none may be evicted takes a look at every entry.
        """

    def __len__(self) -> int:
        """Entries in the order."""


def put_back(
    queue: OrderedDict[bytes, Entry], passed: Sequence[tuple[bytes, Entry]], waited: set[bytes], found: bool
) -> None:
    """Put entries that were taken off a queue's head, in this order, where they belong.

    The pages of a prompt come in together, and each depends on the one before. So when a victim was found
    behind some entries, the last of these entries is put at the head of the queue: the victim may have been
    the only page that depended on it. A prompt's pages thus go from its end to its beginning. An entry that
    was put at the head once and still may not go is in use; it is put at the end. So each entry is passed
    over at most twice a round, and not once for every victim. Nothing found: the queue is as it was.

    Args:
        queue: the first to go first.
        passed: what was taken off its head.
        waited: the entries of the queue that were put at its head before; brought up to date.
        found: whether a victim was found behind them.
    """
    for key, entry in passed if found else reversed(passed):
        queue[key] = entry
        if found and key in waited:
            waited.discard(key)
            continue
        queue.move_to_end(key, last=False)
        if found:
            waited.add(key)


class Lru(Policy):
    """LRU, which ignores costs and sizes. Constant time a call, but for entries passed over."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()  # the oldest first
        self._waited: set[bytes] = set()

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        self._order[key] = None
        self.touch(key)

    def touch(self, key: bytes) -> None:
        if key in self._order:
            self._order.move_to_end(key)
            self._waited.discard(key)

    def remove(self, key: bytes) -> None:
        self._order.pop(key, None)
        self._waited.discard(key)

    def victim(self, evictable: Evictable) -> bytes | None:
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


@dataclass
class _Queued:
    bytes: int
    uses: int = 0  # after it came into its queue


class S3Fifo(Policy):
    """S3-FIFO: most entries are used once, and those leave after a tenth of the cache, not all of it.

    Source: J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vigfusson, "FIFO queues are all you need for cache
    eviction", SOSP 2023, algorithm 1, with queues measured in bytes. New entries go on trial in the small
    queue. At its end, one used twice or more moves to the main queue, any other goes and its key joins the
    ghosts, which stand for as many bytes as the main queue may hold; a ghost that comes in again goes
    straight to the main queue. At the end of that, one that was used goes round again with one use less.
    Ours: entries that may not go are passed over, and while the small queue has nothing but such (prompts
    that are being computed), the main queue gives the victim.
    """

    def __init__(self, capacity: int, patience: int = _PATIENCE) -> None:
        self._patience = patience
        self._small_bytes = int(_SMALL * capacity)
        self._small: OrderedDict[bytes, _Queued] = OrderedDict()  # the oldest first
        self._main: OrderedDict[bytes, _Queued] = OrderedDict()
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()  # key -> the bytes it took
        self._waited: set[bytes] = set()
        self._used_small = 0  # bytes in the small queue
        self._used_ghosts = 0
        self._most_ghosts = capacity - self._small_bytes

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        if key in self._small or key in self._main:
            self.touch(key)
        elif key in self._ghosts:
            self._used_ghosts -= self._ghosts.pop(key)
            self._main[key] = _Queued(bytes)
        else:
            self._small[key] = _Queued(bytes)
            self._used_small += bytes

    def touch(self, key: bytes) -> None:
        entry = self._small.get(key) or self._main.get(key)
        if entry is not None:
            entry.uses = min(entry.uses + 1, _MOST_USES)

    def remove(self, key: bytes) -> None:
        entry = self._small.pop(key, None)  # it did not fail its trial, so its key is no ghost
        if entry is not None:
            self._used_small -= entry.bytes
        self._main.pop(key, None)
        self._waited.discard(key)

    def victim(self, evictable: Evictable) -> bytes | None:
        found = None
        if self._used_small >= self._small_bytes:
            found = self._from_small(evictable, self._small_bytes, self._patience)
        if found is None:
            found = self._from_main(evictable)
        if found is None:
            found = self._from_small(evictable, 0, len(self._small))
        if found is None:  # what was just promoted
            found = self._from_main(evictable)
        if found is not None:
            self._waited.discard(found)
        return found

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _from_small(self, evictable: Evictable, least: int, patience: int) -> bytes | None:
        """The first that fails its trial, of `patience`, while the queue is `least` bytes or more."""
        passed: list[tuple[bytes, _Queued]] = []
        found = None
        used = self._used_small
        while found is None and self._small and used >= least and len(passed) < patience:
            key, entry = self._small.popitem(last=False)
            if entry.uses >= _PROMOTED:
                self._main[key] = _Queued(entry.bytes)
                self._waited.discard(key)
                used -= entry.bytes
            elif evictable(key):
                self._remember(key, entry.bytes)
                used -= entry.bytes
                found = key
            else:
                passed.append((key, entry))
        self._used_small = used
        if found is None and len(passed) == patience:  # go on behind them the next time
            self._small.update(passed)
        else:
            put_back(self._small, passed, self._waited, found is not None)
        return found

    def _from_main(self, evictable: Evictable) -> bytes | None:
        """The first entry without a use left; each other one goes to the queue's end with one use less."""
        passed: list[tuple[bytes, _Queued]] = []
        found = None
        while found is None and self._main:
            key, entry = self._main.popitem(last=False)
            if entry.uses:
                entry.uses -= 1
                self._main[key] = entry
            elif evictable(key):
                found = key
            else:
                passed.append((key, entry))
        put_back(self._main, passed, self._waited, found is not None)
        return found

    def _remember(self, key: bytes, size: int) -> None:
        self._ghosts[key] = size
        self._used_ghosts += size
        while self._used_ghosts > self._most_ghosts:
            self._used_ghosts -= self._ghosts.popitem(last=False)[1]


@dataclass
class _Weighed:
    weight: float
    uses: int = 0
    stamp: int = 0  # of its valid heap item
    waited: bool = False  # passed over once: it stands before its equals


class AgedHeap(Policy):
    """Priority = age + uses * weight; the age is the priority of the last evicted entry.

    An entry that is not used keeps its priority while the age rises to it, so an entry that was once popular
    is evicted in the end (dynamic ageing, Arlitt et al. 2000). Among equals the one untouched for longest is
    evicted first.
    O(log n) a call; heap items are outdated by a new stamp and swept when they outnumber the entries.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bytes]] = []  # priority, stamp, key
        self._entries: dict[bytes, _Weighed] = {}
        self._age = 0.0
        self._last = 0  # stamps go up from here, and down for what goes before its equals
        self._first = 0

    def use(self, key: bytes, weight: float) -> None:
        """Add an entry, or count one more use. From now on it is worth `weight` a use."""
        entry = self._entries.setdefault(key, _Weighed(weight))
        entry.weight = weight
        entry.uses += 1
        self._place(key, entry)

    def touch(self, key: bytes) -> None:
        if key in self._entries:
            self.use(key, self._entries[key].weight)

    def remove(self, key: bytes) -> None:
        self._entries.pop(key, None)

    def victim(self, evictable: Evictable) -> bytes | None:
        """Remove the entry of least priority that may be evicted; the age rises to its priority.

        Entries passed over are treated as in `put_back`. The first time they get the victim's priority, the
        last of them first in line; the second time the priority of an entry that comes in now.
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

    def _place(self, key: bytes, entry: _Weighed) -> None:
        self._last += 1
        entry.stamp, entry.waited = self._last, False
        self._push(self._age + entry.uses * entry.weight, key, entry)

    def _put_first(self, key: bytes, entry: _Weighed) -> None:
        self._first -= 1
        entry.stamp, entry.waited = self._first, True
        self._push(self._age, key, entry)

    def _push(self, priority: float, key: bytes, entry: _Weighed) -> None:
        heapq.heappush(self._heap, (priority, entry.stamp, key))
        if len(self._heap) > 2 * len(self._entries) + _SLACK:
            self._heap = [i for i in self._heap if (e := self._entries.get(i[2])) and e.stamp == i[1]]
            heapq.heapify(self._heap)


class Lfu(AgedHeap):
    """LFU with dynamic ageing (LFU-DA).

    Source: M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content management
    techniques for Web proxy caches", 2000: priority = uses + the priority of the last entry that went.
    """

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        self.use(key, 1.0)


class CostAware(AgedHeap):
    """GreedyDual-Size-Frequency: priority = age + uses * seconds to compute it again / bytes.

    Source: L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HP Laboratories HPL-98-69R1, 1998. Pages late in a prompt cost more than early ones, because attention
    reads all that lies before.
    """

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        self.use(key, max(0.0, cost) / max(1, bytes))


POLICIES: dict[CachePolicy, Callable[[int], Policy]] = {  # name -> made for a cache of so many bytes
    "lru": lambda _: Lru(),
    "lfu": lambda _: Lfu(),
    "s3fifo": S3Fifo,
    "cost": lambda _: CostAware(),
}


def new_policy(name: CachePolicy, capacity: int) -> Policy:
    """A policy by name for a cache of `capacity` bytes.

    Raises:
        UsageError: no policy is called that.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown cache policy {name!r}", hint=f"use one of {', '.join(POLICIES)}")
    return POLICIES[name](capacity)


@dataclass
class Item:
    """One entry."""

    size: int  # bytes
    parent: bytes
    used: float  # when, seconds since 1970


class Shelf:
    """Entries under a size limit. An entry is evicted only when no other one has it as its parent.

    It is the account of the disk tier, and of a replayed trace.
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
        """Keys, the longest unused first."""
        return list(self._items)

    def used(self, key: bytes) -> float:
        """When an entry was last used."""
        return self._items[key].used

    @property
    def oldest(self) -> float | None:
        """When the longest unused entry was used; None: there is none."""
        return next(iter(self._items.values())).used if self._items else None

    def insert(self, key: bytes, size: int, cost: float, parent: bytes, used: float) -> None:
        """Add or replace an entry: `cost` seconds to compute it, `parent` empty where it is unknown."""
        self.remove(key)
        self._items[key] = Item(size, parent, used)
        self._children[parent] += 1
        self.bytes += size
        self._policy.insert(key, cost=cost, bytes=size)

    def touch(self, key: bytes, used: float) -> None:
        """An entry was used; unknown keys are ignored."""
        if key in self._items:
            self._items[key].used = used
            self._items.move_to_end(key)
            self._policy.touch(key)

    def remove(self, key: bytes) -> None:
        """Remove an entry; unknown keys are ignored."""
        if key in self._items:
            self._policy.remove(key)
            self._forget(key)

    def pop(self) -> bytes | None:
        """Remove the entry to evict and return it. None: the shelf is empty."""
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
