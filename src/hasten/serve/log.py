"""The server's log: one JSON object a line on stderr, written by a thread of its own.

A full pipe behind stderr must not stop the event loop, so lines wait in a bounded queue; what does not fit is
dropped and the next line says how many were.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from typing import Any, TextIO

WAITING = 10_000


class Log:
    """Writes events.

    Args:
        stream: where to; stderr by default.
        requests: whether requests are written too, or only what happens to the server itself.
    """

    def __init__(self, stream: TextIO | None = None, *, requests: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._requests = requests
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="hasten-log", daemon=True)
        self._thread.start()

    def request(self, **fields: Any) -> None:
        """A request that has ended."""
        if self._requests:
            self.event("request", **fields)

    def event(self, event: str, level: str = "info", **fields: Any) -> None:
        """Anything else. Fields that are None are left out."""
        entry = {"time": time.time(), "level": level, "event": event, **fields}
        try:
            self._lines.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits; gives up after a second where nobody reads."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(1)

    def _write(self) -> None:
        while (entry := self._lines.get()) is not None:
            if self._dropped:
                entry["dropped_lines"], self._dropped = self._dropped, 0
            entry["time"] = _stamp(entry["time"])
            line = json.dumps({k: v for k, v in entry.items() if v is not None}, default=str)
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody reads any more: the server goes on
                continue


class Forward(logging.Handler):
    """Hands on what the library logs: a cache entry that was dropped, an engine that stopped."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, from any thread."""
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._log.event(
            "log",
            record.levelname.lower(),
            logger=record.name,
            message=record.getMessage(),
            traceback=trace,
            **{name: value for name, value in vars(record).items() if name in ("path", "reason")},
        )


def _stamp(moment: float) -> str:
    """ISO 8601 in UTC, milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    return f"{whole}.{int(moment % 1 * 1000):03d}Z"
