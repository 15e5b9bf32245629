"""`--record`: what the server is asked, as a trace that `hasten cache replay` reads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.engine.trace import TraceModel, TraceWriter

if TYPE_CHECKING:
    from hasten.engine.request import Request, Usage
    from hasten.serve.feed import News
    from hasten.serve.log import Log
    from hasten.serve.pool import Served


class Recorder:
    """Writes requests that ended, in a thread of its own.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: Path, log: Log) -> None:
        self._log = log
        self._writer = TraceWriter(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hasten-record")

    def follow(self, served: Served, requests: Sequence[Request]) -> Recording:
        """Listen to the outputs of one call."""
        return Recording(self, served, requests)

    def add(self, served: Served, request: Request, outputs: Sequence[Sequence[int]], usage: Usage) -> None:
        """One request with all its answers; returns at once."""
        self._thread.submit(self._write, served, request, outputs, usage)

    def _write(
        self, served: Served, request: Request, outputs: Sequence[Sequence[int]], usage: Usage
    ) -> None:
        try:
            self._writer.add(TraceModel.of(served.name, served.model), request, outputs, usage)
        except Exception as error:  # noqa: BLE001  a trace is worth no answer
            self._log.event("record_failed", "error", error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Write what waits."""
        self._thread.shutdown()
        self._writer.close()


class Recording:
    """The outputs of one call so far."""

    def __init__(self, recorder: Recorder, served: Served, requests: Sequence[Request]) -> None:
        self._recorder = recorder
        self._served = served
        self._requests = requests
        self._tokens: list[list[list[int]]] = [[[] for _ in range(one.n)] for one in requests]
        self._open = [one.n for one in requests]

    def take(self, news: Sequence[News]) -> None:
        """More outputs; a request whose answers have all ended is written."""
        for which, output in news:
            self._tokens[which][output.index].extend(output.token_ids)
            if output.finish_reason is None:
                continue
            self._open[which] -= 1
            if self._open[which] == 0 and output.usage is not None:
                self._recorder.add(self._served, self._requests[which], self._tokens[which], output.usage)
