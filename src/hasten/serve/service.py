"""What all endpoints share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from hasten.machine.cores import usable_cores
from hasten.serve.memory import ResponseMemory
from hasten.serve.problem import NO_FAULT, LibraryPanic
from hasten.serve.recorder import Recorder
from hasten.serve.stored import ResponseStore

if TYPE_CHECKING:
    from hasten.serve.log import Log
    from hasten.serve.metrics import Metrics
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import ModelPool

T = TypeVar("T")

_LONG = 500_000  # bytes of a body whose preparing may take longer than others should wait


class Service:
    """The options, the models, the numbers and the threads of one server."""

    def __init__(self, options: ServeOptions, pool: ModelPool, metrics: Metrics, log: Log) -> None:
        self.options = options
        self.pool = pool
        self.metrics = metrics
        self.log = log
        self.stored = ResponseStore()
        self.memory = ResponseMemory.of(options)
        self.recorder = Recorder(options.record, log) if options.record is not None else None
        self.draining = False
        self.began = time.monotonic()
        # templates and tokenizers run here: a long prompt or a slow template stops nobody's stream
        self._workers = ThreadPoolExecutor(max(2, usable_cores()), thread_name_prefix="hasten-prepare")
        # a text of megabytes takes seconds: one at a time, and never all threads that others need
        self._long = ThreadPoolExecutor(1, thread_name_prefix="hasten-prepare-long")

    async def work(self, task: Callable[[], T], body_bytes: int = 0) -> T:
        """Run something in a thread; what it is for came in a body of so many bytes.

        Raises:
            LibraryPanic: a library panicked; else what the task raises.
        """
        threads = self._workers if body_bytes < _LONG else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: _unpanicked(task))

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.pool.ready and not self.draining

    def close(self) -> None:
        """Let the threads go and end the recording."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)
        if self.recorder is not None:
            self.recorder.close()


def _unpanicked(task: Callable[[], T]) -> T:
    try:
        return task()
    except (Exception, *NO_FAULT):
        raise
    except BaseException as panic:
        raise LibraryPanic(str(panic)) from panic
