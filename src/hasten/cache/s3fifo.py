"""S3-FIFO: a small queue on trial, a main queue, and a memory of what failed the trial."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from hasten.cache.passing import put_back

_SMALL = 0.1  # of the capacity: the paper's choice, good on nearly all of its 6,594 traces
_MOST_USES = 3  # two bits an entry
_PROMOTED = 2  # uses on trial that bring an entry into the main queue
_PATIENCE = 64  # entries on trial passed over for one victim before the main queue gives one


@dataclass
class _Entry:
    bytes: int
    uses: int = 0  # since it came into its queue, the coming in not counted


class S3Fifo:
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
        self._small: OrderedDict[bytes, _Entry] = OrderedDict()  # the oldest first
        self._main: OrderedDict[bytes, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()  # key -> the bytes it took
        self._waited: set[bytes] = set()
        self._used_small = 0  # bytes in the small queue
        self._used_ghosts = 0
        self._most_ghosts = capacity - self._small_bytes

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """See `Policy`."""
        if key in self._small or key in self._main:
            self.touch(key)
        elif key in self._ghosts:
            self._used_ghosts -= self._ghosts.pop(key)
            self._main[key] = _Entry(bytes)
        else:
            self._small[key] = _Entry(bytes)
            self._used_small += bytes

    def touch(self, key: bytes) -> None:
        """See `Policy`."""
        entry = self._small.get(key) or self._main.get(key)
        if entry is not None:
            entry.uses = min(entry.uses + 1, _MOST_USES)

    def remove(self, key: bytes) -> None:
        """See `Policy`. What is removed is no ghost: it did not fail."""
        entry = self._small.pop(key, None)
        if entry is not None:
            self._used_small -= entry.bytes
        self._main.pop(key, None)
        self._waited.discard(key)

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """See `Policy`."""
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

    def _from_small(self, evictable: Callable[[bytes], bool], least: int, patience: int) -> bytes | None:
        """The first that fails its trial, of `patience`, while the queue is `least` bytes or more."""
        passed: list[tuple[bytes, _Entry]] = []
        found = None
        used = self._used_small
        while found is None and self._small and used >= least and len(passed) < patience:
            key, entry = self._small.popitem(last=False)
            if entry.uses >= _PROMOTED:
                self._main[key] = _Entry(entry.bytes)
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

    def _from_main(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The first that was not used since it came round; each that was has one use less then."""
        passed: list[tuple[bytes, _Entry]] = []
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
