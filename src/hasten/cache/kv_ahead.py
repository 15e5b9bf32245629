"""Reads pages from disk ahead: while a request waits, in a thread of its own, never inside a step."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hasten.cache.kv_entry import Bytes

log = logging.getLogger(__name__)

_MOST_BYTES = 128 << 20  # pages that arrived and were not taken yet
_NEW = 0.2  # weight of the newest measurement
_DOUBT = 0.9


class PageTier(Protocol):
    """The tier that is read: `hasten.cache.kv_disk.KvDisk`."""

    page_bytes: int

    def has(self, key: bytes) -> bool: ...

    def knows(self, key: bytes) -> bool: ...

    def read(self, key: bytes, out: Bytes) -> bool: ...

    def write(self, key: bytes, data: Bytes, cost: float, parent: bytes) -> None: ...


@dataclass(eq=False)
class Reading:
    """Pages of one text, read in order until one is missing. `until`: the latest moment worth waiting for."""

    until: float  # time.monotonic(), seconds
    keys: deque[bytes] = field(default_factory=deque)  # not read yet
    asked: set[bytes] = field(default_factory=set)
    done: bool = True  # nothing of it is on its way


class KvAhead:
    """Pages on their way from a tier that may be slow, or hang; whoever asks goes on meanwhile.

    Its methods never touch the disk. They are for one thread, beside the reading thread.

    Args:
        disk: read by one thread.
        most_bytes: what arrived and waits to be taken; at least one page. Reading pauses beyond that.
    """

    def __init__(self, disk: PageTier, most_bytes: int = _MOST_BYTES) -> None:
        self._disk = disk
        self._most = max(1, most_bytes // disk.page_bytes)
        self._changed = threading.Condition()
        self._waiting: deque[Reading] = deque()
        self._wanted: Counter[bytes] = Counter()  # key -> readings that asked for it
        self._arrived: dict[bytes, Bytes] = {}
        self._page_s = 0.0  # running mean of one page's reading
        self._reads_since: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hasten-kv-ahead", daemon=True)
        self._thread.start()

    def ask(self, keys: Iterable[bytes], until: float) -> Reading:
        """Have pages read, behind all that others asked for."""
        reading = Reading(until)
        self.ask_more(reading, keys)
        return reading

    def ask_more(self, reading: Reading, keys: Iterable[bytes]) -> None:
        """Have more pages of a text read; keys that it asked for before are left out."""
        with self._changed:
            new = [key for key in keys if key not in reading.asked]
            reading.keys.extend(new)
            reading.asked.update(new)
            self._wanted.update(new)
            if new:
                reading.done = False
                if reading not in self._waiting:
                    self._waiting.append(reading)
            self._changed.notify_all()

    def drop(self, reading: Reading) -> None:
        """Read no further; what arrived for nobody else is forgotten."""
        with self._changed:
            reading.done = True
            reading.keys.clear()
            for key in reading.asked:
                self._wanted[key] -= 1
                if self._wanted[key] <= 0:
                    del self._wanted[key]
                    self._arrived.pop(key, None)
            reading.asked.clear()
            self._changed.notify_all()

    def seconds(self, pages: int) -> float:
        """How long reading so many pages takes, as far as is known: 0 before the first one."""
        since = self._reads_since
        running = 0.0 if since is None else time.monotonic() - since
        return pages * max(self._page_s, running)

    def doubt(self) -> None:
        """Believe a little less in slowness: what is not read is never measured."""
        self._page_s *= _DOUBT

    def wait(self, seconds: float) -> None:
        """Until something changes, or that long."""
        with self._changed:
            self._changed.wait(seconds)

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop; a read that hangs is left behind."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._arrived.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)

    # As the prefix cache sees a tier ------------------------------------------------------------------------

    def has(self, key: bytes) -> bool:
        """Whether a page has arrived."""
        return key in self._arrived

    def knows(self, key: bytes) -> bool:
        """Whether a page need not be written."""
        return key in self._arrived or self._disk.knows(key)

    def read(self, key: bytes, out: Bytes) -> bool:
        """Take a page that has arrived into `out`, uint8 [page_bytes]; False: it has not."""
        with self._changed:
            data = self._arrived.pop(key, None)
            self._changed.notify_all()
        if data is None:
            return False
        np.copyto(out, data)
        return True

    def write(self, key: bytes, data: Bytes, cost: float, parent: bytes) -> None:
        """As `KvDisk.write`."""
        self._disk.write(key, data, cost, parent)

    # In the reading thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_work())
                if self._closed:
                    return
                reading = self._waiting[0]
                if not reading.keys:
                    self._waiting.popleft()
                    reading.done = True
                    self._changed.notify_all()
                    continue
                key = reading.keys.popleft()
                if key in self._arrived:
                    continue
            try:
                self._fetch(reading, key)
            except Exception:  # nobody may wait for a thread that ended
                log.exception("reading ahead failed")
                reading.keys.clear()
                self._reads_since = None

    def _has_work(self) -> bool:
        return bool(self._waiting) and (len(self._arrived) < self._most or not self._waiting[0].keys)

    def _fetch(self, reading: Reading, key: bytes) -> None:
        data = np.empty(self._disk.page_bytes, np.uint8)
        started = self._reads_since = time.monotonic()
        found = self._disk.has(key) and self._disk.read(key, data)
        self._reads_since = None
        seconds = time.monotonic() - started
        with self._changed:
            if found:
                self._page_s = seconds if not self._page_s else (1 - _NEW) * self._page_s + _NEW * seconds
                if self._wanted[key] > 0:
                    self._arrived[key] = data
            else:
                reading.keys.clear()  # what stands behind a missing page is of no use
            self._changed.notify_all()
