"""The tier below memory: pages of keys and values on disk, over restarts and for several processes.

`KvDisk` writes behind and reads; `KvAhead` reads ahead of a request while it waits, never inside a step.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hasten.cache.kv_folder import MOST_KEY_BYTES, BadEntry, Bytes, KvFolder
from hasten.core import CachePolicy

_QUEUE_BYTES = 128 << 20  # copies that may wait to be written
_QUEUE_PAGES = 4  # at least, however large a page
_RESCAN_S = 60.0  # the folder is scanned for other processes' pages so often, while pages are written
_RESCAN_PART = 32  # and when this process has written limit / 32
_IDLE_S = 1.0  # and when it had nothing to write for so long
_REST_S = 30.0  # after the system refused a write, none is tried for so long
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN}
_NICE = 10  # of the writing thread: answering comes first
_AHEAD_BYTES = 128 << 20  # pages that arrived and were not taken yet
_NEW = 0.2  # weight of the newest measurement
_DOUBT = 0.9

log = logging.getLogger(__name__)


@dataclass
class KvDiskStats:
    """What the tier holds and has done, in pages where nothing else is said."""

    entries: int = 0  # of this model
    bytes: int = 0  # of this model
    foreign_bytes: int = 0  # other models' in the same folder
    hits: int = 0
    misses: int = 0
    dropped: int = 0  # damaged or unreadable
    writes: int = 0
    write_drops: int = 0  # not written: the queue was full, or the disk refuses


class KvDisk:
    """Pages under keys that name all that a page depends on; see `KvFolder` for the files.

    `has` and `read` wait for the disk, `knows` and `write` never do. A thread of its own, at low priority,
    writes, makes room and scans the folder. An error of the folder is logged once, and the engine goes on
    without the tier: nothing here raises.

    Args:
        folder: made if it is missing.
        limit_bytes: most the files may take, those of other models included.
        fingerprint: names model, recipe, tokenizer and all else that a page depends on.
        page_bytes: of every page.
        policy: which page goes first when the limit is reached.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        fingerprint: str,
        page_bytes: int,
        policy: CachePolicy = "lru",
    ) -> None:
        self.page_bytes = page_bytes
        self._folder = KvFolder(Path(folder).absolute(), limit_bytes, fingerprint, policy)
        self._most_queued = max(_QUEUE_PAGES, _QUEUE_BYTES // page_bytes)
        self._changed = threading.Condition()
        self._queue: dict[bytes, tuple[Bytes, float, bytes]] = {}  # key -> data, cost, parent; in order
        self._used: deque[bytes] = deque(maxlen=1 << 16)
        self._gone: set[bytes] = set()  # pages that were not there any more, not yet booked as such
        self._busy = True  # until the first scan is done
        self._closed = False
        self._rest_until = 0.0
        self._warned: set[str] = set()
        self._scanned = 0.0
        self._unscanned_bytes = 0  # written since
        self._counts = KvDiskStats()
        self._thread = threading.Thread(target=self._run, name="hasten-kv-disk", daemon=True)
        self._thread.start()

    def has(self, key: bytes) -> bool:
        """Whether a page is there or about to be; `read` may still find it damaged. Costs a look at the disk
        for pages that this process does not know."""
        try:
            return key in self._queue or (key not in self._gone and self._folder.holds(key))
        except OSError as error:
            self._warn(error)
            return False

    def knows(self, key: bytes) -> bool:
        """Whether this process has seen or written a page that is there; never looks at the disk."""
        return key in self._queue or (key not in self._gone and key in self._folder.shelf)

    def read(self, key: bytes, out: Bytes) -> bool:
        """Read a page straight into `out`, uint8 [page_bytes].

        Returns:
            False where the page is missing, damaged, or another's: `out` holds anything then. A damaged
            page is removed and logged.
        """
        waiting = self._queue.get(key)
        try:
            if waiting is not None:
                np.copyto(out, waiting[0])
            else:
                self._folder.read(key, out)
        except (BadEntry, OSError) as error:
            self._counts.misses += 1
            self._lost(key, error)
            return False
        self._counts.hits += 1
        self._used.append(key)
        return True

    def _lost(self, key: bytes, error: BadEntry | OSError) -> None:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:  # says nothing about the page
            self._warn(error)
            return
        self._gone.add(key)
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            self._counts.dropped += 1
            self._folder.drop(key, str(error))

    def write(self, key: bytes, data: Bytes, cost: float, parent: bytes = b"") -> None:
        """Keep a page: it is copied, queued and written later, or dropped and counted if too many wait.

        Args:
            data: uint8 [page_bytes].
            cost: seconds it took to compute.
            parent: key of the page before it in the text; a page goes only after those behind it are gone.
        """
        assert data.nbytes == self.page_bytes, "a page has another size"
        assert 0 < len(key) <= MOST_KEY_BYTES and len(parent) <= MOST_KEY_BYTES, "a key is too long"
        with self._changed:
            if key in self._queue:
                return
            resting = time.monotonic() < self._rest_until
            if self._closed or resting or len(self._queue) >= self._most_queued:
                self._counts.write_drops += 1
                return
            self._queue[key] = (np.array(data), cost, parent if parent != key else b"")
            self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until what is queued is written; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued, for `timeout_s` at most, and stop. A second call does nothing."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def stats(self) -> KvDiskStats:
        """Figures of this moment."""
        shelf, folder = self._folder.shelf, self._folder
        return replace(
            self._counts, entries=len(shelf), bytes=shelf.bytes, foreign_bytes=folder.foreign_bytes
        )

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # one thread's own priority: Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            self._scan()
            self._serve()
        finally:  # `flush` must not wait for a thread that ended
            with self._changed:
                self._closed, self._busy = True, False
                self._queue.clear()
                self._changed.notify_all()

    def _serve(self) -> None:
        while self._wait():
            with self._changed:  # a page that comes in between iter and next would end this thread
                key, (data, cost, parent) = next(iter(self._queue.items()))
            if time.monotonic() - self._scanned > _RESCAN_S:
                self._scan()
            self._settle()
            written = self._store(key, data, cost, parent)
            self._unscanned_bytes += data.nbytes if written else 0
            if self._unscanned_bytes > self._folder.limit_bytes // _RESCAN_PART:
                self._scan()
            with self._changed:
                del self._queue[key]
                self._counts.writes += written
                self._counts.write_drops += not written
        self._settle()
        if self._unscanned_bytes:
            self._scan()

    def _wait(self) -> bool:
        """Sleep until there is something to write; False when it is over.

        What other processes wrote meanwhile is counted, and room made, before a long sleep.
        """
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        if self._unscanned_bytes and not self._has_work(_IDLE_S):
            self._scan()
        self._has_work(None)
        with self._changed:
            self._busy = not self._closed
            return not self._closed

    def _has_work(self, timeout_s: float | None) -> bool:
        """Wait for something to write, or the end; False: nothing came in that time."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._queue or self._closed, timeout_s))

    def _scan(self) -> None:
        try:
            self._folder.scan()
        except OSError as error:
            self._warn(error)
        self._scanned, self._unscanned_bytes = time.monotonic(), 0

    def _settle(self) -> None:
        """Book what was read, and what was found missing, since the last time."""
        for key in tuple(self._gone):
            self._folder.shelf.remove(key)
            self._gone.discard(key)
        while self._used:
            self._folder.touch(self._used.popleft())

    def _store(self, key: bytes, data: Bytes, cost: float, parent: bytes) -> bool:
        if time.monotonic() < self._rest_until:
            return False
        try:
            return self._folder.store(key, data, cost, parent)
        except OSError as error:
            self._warn(error)
            self._rest_until = time.monotonic() + _REST_S
            return False

    def _warn(self, error: OSError) -> None:
        """Once for each kind of refusal."""
        reason = os.strerror(error.errno) if error.errno else str(error)
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning(
                "the KV cache on disk is not available; going on without it",
                extra={"folder": str(self._folder.root), "reason": reason},
            )


@dataclass(eq=False)
class Reading:
    """Pages of one text that are read in order until one is missing."""

    until: float  # nobody waits for them after this moment of time.monotonic()
    keys: deque[bytes] = field(default_factory=deque)  # not read yet
    asked: set[bytes] = field(default_factory=set)
    done: bool = True  # no page is on its way


class KvAhead:
    """Reads pages ahead in a thread of its own, since a disk may be slow or hang.

    No method waits for the disk. All are for one thread, beside the reading thread.

    Args:
        disk: read by one thread.
        most_bytes: what arrived and waits to be taken; at least one page. Reading pauses beyond that.
    """

    def __init__(self, disk: KvDisk, most_bytes: int = _AHEAD_BYTES) -> None:
        self.disk = disk
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
        """Read no further; pages that arrived and that no other reading wants are dropped."""
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
        """Seconds that reading so many pages is expected to take: 0 before the first one."""
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
        """Stop reading, without waiting for a read that hangs, and close the disk."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._arrived.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self.disk.close()

    # As the prefix cache sees a tier ------------------------------------------------------------------------

    def has(self, key: bytes) -> bool:
        """Whether a page has arrived."""
        return key in self._arrived

    def knows(self, key: bytes) -> bool:
        """Whether a page need not be written."""
        return key in self._arrived or self.disk.knows(key)

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
        self.disk.write(key, data, cost, parent)

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
            except Exception:  # the thread must go on: answers wait for it
                log.exception("reading ahead failed")
                reading.keys.clear()
                self._reads_since = None

    def _has_work(self) -> bool:
        return bool(self._waiting) and (len(self._arrived) < self._most or not self._waiting[0].keys)

    def _fetch(self, reading: Reading, key: bytes) -> None:
        data = np.empty(self.disk.page_bytes, np.uint8)
        started = self._reads_since = time.monotonic()
        found = self.disk.has(key) and self.disk.read(key, data)
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
