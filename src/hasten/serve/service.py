"""What all endpoints share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from hasten.machine.cores import usable_cores
from hasten.serve.memory import ResponseMemory
from hasten.serve.recorder import Recorder
from hasten.serve.stored import ResponseStore

if TYPE_CHECKING:
    from hasten.serve.log import Log
    from hasten.serve.metrics import Metrics
    from hasten.serve.options import ServeOptions
    from hasten.serve.pool import ModelPool

T = TypeVar("T")


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

    async def work(self, task: Callable[[], T]) -> T:
        """Run something in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, task)

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.pool.ready and not self.draining

    def close(self) -> None:
        """Let the threads go and end the recording."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self.recorder is not None:
            self.recorder.close()
