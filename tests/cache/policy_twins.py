"""The policies written plainly: lists walked from the front, everything summed anew each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Evictable = Callable[[bytes], bool]


def put_back(queue: list, passed: list, waited: set[bytes], found: bool) -> None:
    """Entries ([key, ...] each) taken off the head of a queue go back: once to its head, then to its end."""
    if not found:
        queue[:0] = passed
        return
    queue[:0] = [e for e in passed if e[0] not in waited][::-1]
    queue += [e for e in passed if e[0] in waited]
    for entry in passed:
        waited ^= {entry[0]}


@dataclass
class LruTwin:
    order: list[list[bytes]] = field(default_factory=list)
    waited: set[bytes] = field(default_factory=set)

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        self.remove(key)
        self.order.append([key])

    def touch(self, key: bytes) -> None:
        if [key] in self.order:
            self.insert(key, cost=0, bytes=0)

    def remove(self, key: bytes) -> None:
        self.order = [e for e in self.order if e != [key]]
        self.waited -= {key}

    def victim(self, evictable: Evictable) -> bytes | None:
        for at, (key,) in enumerate(self.order):
            if evictable(key):
                passed, self.order = self.order[:at], self.order[at + 1 :]
                self.waited -= {key}
                put_back(self.order, passed, self.waited, True)
                return key
        return None

    def __len__(self) -> int:
        return len(self.order)


@dataclass
class AgedTwin:
    """LFU with dynamic ageing where `by_cost` is False, GreedyDual-Size-Frequency where it is True."""

    by_cost: bool
    age: float = 0.0
    clock: int = 0
    entries: dict[bytes, tuple] = field(default_factory=dict)  # priority, when, uses, weight
    waited: set[bytes] = field(default_factory=set)

    def place(self, key: bytes, uses: int, weight: float) -> None:
        self.clock += 1
        self.entries[key] = (self.age + uses * weight, self.clock, uses, weight)
        self.waited -= {key}

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        uses = self.entries[key][2] if key in self.entries else 0
        self.place(key, uses + 1, cost / bytes if self.by_cost else 1.0)

    def touch(self, key: bytes) -> None:
        if key in self.entries:
            _, _, uses, weight = self.entries[key]
            self.place(key, uses + 1, weight)

    def remove(self, key: bytes) -> None:
        self.entries.pop(key, None)
        self.waited -= {key}

    def victim(self, evictable: Evictable) -> bytes | None:
        order = sorted(self.entries, key=lambda k: self.entries[k][:2])
        for at, key in enumerate(order):
            if evictable(key):
                self.age = self.entries.pop(key)[0]
                self.waited -= {key}
                for other in order[:at]:
                    rest = self.entries[other][2:]
                    if other in self.waited:
                        self.place(other, *rest)
                    else:
                        self.clock += 1
                        self.entries[other] = (self.age, -self.clock, *rest)
                        self.waited |= {other}
                return key
        return None

    def __len__(self) -> int:
        return len(self.entries)


@dataclass
class S3FifoTwin:
    """Algorithm 1 of the paper; an entry is [key, bytes, uses], queues go from the oldest to the newest."""

    capacity: int
    patience: int
    small: list[list] = field(default_factory=list)
    main: list[list] = field(default_factory=list)
    ghosts: list[list] = field(default_factory=list)
    waited: set[bytes] = field(default_factory=set)

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        if any(e[0] == key for e in self.small + self.main):
            self.touch(key)
        elif any(g[0] == key for g in self.ghosts):
            self.ghosts = [g for g in self.ghosts if g[0] != key]
            self.main.append([key, bytes, 0])
        else:
            self.small.append([key, bytes, 0])

    def touch(self, key: bytes) -> None:
        for entry in self.small + self.main:
            if entry[0] == key:
                entry[2] = min(entry[2] + 1, 3)

    def remove(self, key: bytes) -> None:
        self.small = [e for e in self.small if e[0] != key]
        self.main = [e for e in self.main if e[0] != key]
        self.waited -= {key}

    def victim(self, evictable: Evictable) -> bytes | None:
        target = int(0.1 * self.capacity)
        key = self.from_small(evictable, target, self.patience) if total(self.small) >= target else None
        key = key or self.from_main(evictable) or self.from_small(evictable, 0, len(self.small))
        key = key or self.from_main(evictable)
        self.waited -= {key}
        return key

    def from_small(self, evictable: Evictable, least: int, patience: int) -> bytes | None:
        passed: list[list] = []
        while self.small and total(self.small + passed) >= least and len(passed) < patience:
            entry = self.small.pop(0)
            if entry[2] >= 2:
                self.main.append([entry[0], entry[1], 0])
                self.waited -= {entry[0]}
            elif evictable(entry[0]):
                self.ghosts.append(entry)
                while total(self.ghosts) > self.capacity - int(0.1 * self.capacity):
                    self.ghosts.pop(0)
                put_back(self.small, passed, self.waited, True)
                return entry[0]
            else:
                passed.append(entry)
        if len(passed) == patience:
            self.small += passed
        else:
            put_back(self.small, passed, self.waited, False)
        return None

    def from_main(self, evictable: Evictable) -> bytes | None:
        passed: list[list] = []
        while self.main:
            entry = self.main.pop(0)
            if entry[2]:
                self.main.append([entry[0], entry[1], entry[2] - 1])
            elif evictable(entry[0]):
                put_back(self.main, passed, self.waited, True)
                return entry[0]
            else:
                passed.append(entry)
        put_back(self.main, passed, self.waited, False)
        return None

    def __len__(self) -> int:
        return len(self.small) + len(self.main)


def total(entries: list[list]) -> int:
    return sum(entry[1] for entry in entries)
