"""The policies written plainly: lists walked from the front, everything summed anew each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Evictable = Callable[[bytes], bool]


@dataclass
class LruTwin:
    order: list[bytes] = field(default_factory=list)

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        self.remove(key)
        self.order.append(key)

    def touch(self, key: bytes) -> None:
        if key in self.order:
            self.insert(key, cost=0, bytes=0)

    def remove(self, key: bytes) -> None:
        self.order = [k for k in self.order if k != key]

    def victim(self, evictable: Evictable) -> bytes | None:
        for at, key in enumerate(self.order):
            if evictable(key):
                self.order = self.order[at + 1 :] + self.order[:at]
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
    entries: dict[bytes, tuple[float, int, int, float]] = field(
        default_factory=dict
    )  # priority, when, uses, w

    def place(self, key: bytes, uses: int, weight: float) -> None:
        self.clock += 1
        self.entries[key] = (self.age + uses * weight, self.clock, uses, weight)

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        uses = self.entries[key][2] if key in self.entries else 0
        self.place(key, uses + 1, cost / bytes if self.by_cost else 1.0)

    def touch(self, key: bytes) -> None:
        if key in self.entries:
            _, _, uses, weight = self.entries[key]
            self.place(key, uses + 1, weight)

    def remove(self, key: bytes) -> None:
        self.entries.pop(key, None)

    def victim(self, evictable: Evictable) -> bytes | None:
        order = sorted(self.entries, key=lambda k: self.entries[k][:2])
        for at, key in enumerate(order):
            if evictable(key):
                self.age = self.entries.pop(key)[0]
                for other in order[:at]:
                    self.place(other, *self.entries[other][2:])
                return key
        return None

    def __len__(self) -> int:
        return len(self.entries)


@dataclass
class S3FifoTwin:
    """Algorithm 1 of the paper; an entry is [key, bytes, uses], queues go from the oldest to the newest."""

    capacity: int
    small: list[list] = field(default_factory=list)
    main: list[list] = field(default_factory=list)
    ghosts: list[list] = field(default_factory=list)

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

    def victim(self, evictable: Evictable) -> bytes | None:
        target = int(0.1 * self.capacity)
        if sum(e[1] for e in self.small) >= target and (key := self.from_small(evictable, target)):
            return key
        return self.from_main(evictable) or self.from_small(evictable, 0) or self.from_main(evictable)

    def from_small(self, evictable: Evictable, least: int) -> bytes | None:
        for _ in list(self.small):
            if sum(e[1] for e in self.small) < least:
                return None
            entry = self.small.pop(0)
            if entry[2] >= 2:
                self.main.append([entry[0], entry[1], 0])
            elif evictable(entry[0]):
                self.ghosts.append(entry)
                while sum(g[1] for g in self.ghosts) > self.capacity - int(0.1 * self.capacity):
                    self.ghosts.pop(0)
                return entry[0]
            else:
                self.small.append(entry)
        return None

    def from_main(self, evictable: Evictable) -> bytes | None:
        for _ in range(4 * len(self.main)):
            entry = self.main.pop(0)
            if entry[2] == 0 and evictable(entry[0]):
                return entry[0]
            self.main.append([entry[0], entry[1], max(0, entry[2] - 1)])
        return None

    def __len__(self) -> int:
        return len(self.small) + len(self.main)
