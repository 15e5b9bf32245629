"""A server from its socket to its end: it announces itself, drains and is stopped by signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from hasten.serve.listening import cannot_listen
from hasten.serve.log import Forward
from hasten.stopping import first

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel
    from hasten.serve.pool import Served, ServedEngine
    from hasten.serve.service import Service

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's server. It announces itself when the first model is there, tells the service that it drains,
    and leaves with code 0.

    Args:
        config: uvicorn's.
        service: whose pool takes the first model.
        first: its loading, which has begun already.
        ready: called when requests are answered.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        first: Future[tuple[LanguageModel, ServedEngine]],
        ready: Callable[[Served], None],
    ) -> None:
        super().__init__(config)
        self.service = service
        self.first = first
        self.ready = ready
        self.forward = Forward(service.log)
        self.loaded = False
        self.failure: BaseException | None = None  # why the first model is not there
        self.stopped_by: int | None = None
        self.loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        coming = self.service.pool.expect(self.first)
        try:
            for one in sockets or ():
                one.listen(self.config.backlog)
        except OSError as error:  # two servers that start at once can both bind, one can listen
            await asyncio.wait([coming])
            await self.service.pool.close()
            host, port = one.getsockname()[:2]
            raise cannot_listen(host, port, error) from None
        logging.getLogger("hasten").addHandler(self.forward)
        await super().startup(sockets)
        self.loading = asyncio.get_running_loop().create_task(self.announce(coming))

    async def announce(self, coming: asyncio.Task[Served]) -> None:
        """Say that requests are answered, or stop."""
        try:
            served = await coming
        except Exception as error:  # noqa: BLE001  raised by `serve` when the loop has ended
            self.failure, self.should_exit = self.first.exception() or error, True
            return
        self.loaded = True
        self.ready(served)
        self.service.log.event("ready", models=list(self.service.pool.refs))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        if self.loaded:
            self.service.log.event("draining", seconds=self.config.timeout_graceful_shutdown)
        else:  # all that runs waits for the model
            self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)
        if self.loading is not None:
            self.loading.cancel()
        await self.service.pool.close()  # a second signal skips the lifespan's end; threads must end first
        logging.getLogger("hasten").removeHandler(self.forward)
        if self.loaded:
            self.service.log.event("stopped")
        self.service.log.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # who starts a server in the background of a script has SIGINT ignored, and means it
        signals = [one for one in _STOPS if signal.getsignal(one) is not signal.SIG_IGN]
        before = {one: signal.signal(one, self.handle_exit) for one in signals}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or first(sig)
        self.force_exit = self.should_exit  # the second time is meant
        self.should_exit = True
