"""The engine for servers: a thread of its own steps it, any number of asyncio tasks listen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from hasten.core import ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.request import EngineStats, Output, Request
from hasten.errors import DeviceLost, HastenError, QueueFull
from hasten.machine.memory import LOOK_S, memory_room

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.engine.loaded import LoadedModel

_log = logging.getLogger(__name__)
_MOST_UNREAD = 32  # grammars that wait to be compiled, some seconds each
_SETTLE_AFTER_S = 0.2  # idle time before `tidy`: a client that asks again at once does not wait for it


class EngineClosed(HastenError):
    """The engine was closed, or its thread failed, before the request was done."""


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed", hint="start it again")


def _told(wrong: BaseException) -> Exception:
    """An error that an asyncio task may raise. A native library's panic is no `Exception`: a task that raised
    it would end the event loop."""
    return wrong if isinstance(wrong, Exception) else HastenError(f"a fault of the engine: {wrong!r}")


class _Listener:
    """One request's outputs on their way to its asyncio task."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.news: list[Output | BaseException] = []

    def put(self, news: list[Output | BaseException]) -> bool:
        """Hand news to the task, from any thread. False: the task's event loop is closed."""
        try:
            self.loop.call_soon_threadsafe(self._arrive, news)
        except Exception:  # noqa: BLE001  a closed or broken loop: the news cannot be delivered
            return False
        return True

    def _arrive(self, news: list[Output | BaseException]) -> None:
        self.news += news
        self.ready.set()

    def take(self) -> tuple[list[Output], BaseException | None]:
        """The outputs that came, and the error that ended the request, if one did."""
        news, self.news = self.news, []
        self.ready.clear()
        failure = next((one for one in news if isinstance(one, BaseException)), None)
        return [one for one in news if isinstance(one, Output)], failure


class AsyncEngine:
    """An Engine in a thread of its own. All methods may be called from any thread or loop.

    Args:
        model: no other code may run it while the engine is open.
        options: caches, speculation, queue.
    """

    def __init__(self, model: LoadedModel, options: ServingOptions | None = None) -> None:
        self.model = model
        self._engine = Engine(model, options)
        self._listeners: dict[str, _Listener] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._state = "open"  # then "draining", then "closed"
        self._thread_ended = False
        self.is_lost = False  # it failed with its device, which this process cannot use any more
        self._stats = self._engine.stats()
        memory_room().watch()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="hasten-grammar")
        self._unread = threading.Semaphore(_MOST_UNREAD)
        self._thread = threading.Thread(target=self._run, name="hasten-engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine that the thread steps. Other threads may only read its options and its model."""
        return self._engine

    def stats(self) -> EngineStats:
        """As of the end of the last step."""
        return self._stats

    @property
    def failed(self) -> bool:
        """Whether the engine's thread has ended: every request is refused from now on."""
        return self._thread_ended or not self._thread.is_alive()

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """Run a request; its outputs as they come. Closing the iterator cancels it within one step.

        Raises:
            UsageError, QueueFull, DeadlineError, EngineClosed: as `batches`.
        """
        async with contextlib.aclosing(self.batches(request)) as batches:
            async for outputs in batches:
                for output in outputs:
                    yield output

    async def batches(self, request: Request) -> AsyncGenerator[list[Output], None]:
        """As `stream`, but in lists: all outputs that came since the last list.

        Raises:
            UsageError, QueueFull, DeadlineError: with the first output, as `Engine.add`.
            EngineClosed: the engine was closed, or failed.
        """
        if self._state != "open":
            raise EngineClosed("the engine is shutting down", hint="ask another server, or again later")
        request = replace(request, id=request.id or uuid4().hex)
        if request.grammar is not None:
            await self._read(request.grammar)
        listener, left = _Listener(), request.n
        self._order(lambda: self._add(request, listener))
        try:
            while left:
                await listener.ready.wait()
                outputs, failure = listener.take()
                left -= sum(output.finish_reason is not None for output in outputs)
                if outputs:
                    yield outputs
                if failure is not None:
                    left = 0
                    raise failure
        finally:
            if left and not self._thread_ended:
                with contextlib.suppress(EngineClosed):
                    self._order(lambda: self._cancel(request.id, listener))

    async def _read(self, grammar: Grammar) -> None:
        """Compile a grammar in the reader's thread. It may take seconds; other requests go on meanwhile."""
        compiler = self._engine.compiler()
        if compiler.knows(grammar):
            compiler.compile(grammar)  # raises where it was refused
            return
        if not self._unread.acquire(blocking=False):
            raise QueueFull(
                f"{_MOST_UNREAD} grammars wait to be read", hint="ask again later", retry_after_s=1.0
            )

        def compile_it() -> None:
            if self._state != "open":
                raise _closed()
            compiler.compile(grammar)

        try:
            await asyncio.get_running_loop().run_in_executor(self._reader, compile_it)
        except RuntimeError as error:
            if self._state == "open":
                raise  # a fault of this grammar alone
            raise _closed() from error  # the reader takes nothing new
        finally:
            self._unread.release()

    async def close(self, drain: bool = True) -> None:
        """Take nothing new; end what runs (drain: when it is done) and the thread. The model stays open."""
        self._finish(drain)
        self._reader.shutdown(wait=False)  # grammars that wait are refused, not cancelled: their tasks go on
        await asyncio.to_thread(self._thread.join)

    def _finish(self, drain: bool) -> None:
        with self._wake:
            if self._state != "closed":
                self._state = "draining" if drain else "closed"
            self._wake.notify()

    # In the engine's thread ---------------------------------------------------------------------------------

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            if self._thread_ended:
                raise _closed()
            self._orders.append(order)
            self._wake.notify()

    def _add(self, request: Request, listener: _Listener) -> None:
        if self._state == "closed":
            listener.put([_closed()])
            return
        try:
            self._engine.add(request)
            self._listeners[request.id] = listener
        except BaseException as refused:  # noqa: BLE001  whatever it was, it is this request's alone
            listener.put([_told(refused)])

    def _cancel(self, request_id: str, listener: _Listener) -> None:
        if self._listeners.get(request_id) is listener:  # else it ended, or another request has its id
            del self._listeners[request_id]
            self._engine.cancel(request_id)
            self._stats = self._engine.stats()  # no step may follow that would count it
            self._tell(self._engine.news())  # its last output must not reach the next request of that id

    def _run(self) -> None:
        failure = _closed()
        try:
            while self._next():
                outputs = self._engine.step()
                self._stats = self._engine.stats()  # first: outputs that a task gets are counted then
                self._tell(outputs)
        except BaseException as wrong:  # noqa: BLE001  every waiting task must get an error, whatever failed
            self.is_lost = isinstance(wrong, DeviceLost)
            said = wrong.message if isinstance(wrong, HastenError) else type(wrong).__name__
            failure = EngineClosed(
                f"the engine failed ({said}) and has stopped; its log says more",
                hint="ask again: a server loads the model anew",
            )
            failure.__cause__ = wrong
        finally:
            self._end(failure)

    def _end(self, failure: EngineClosed) -> None:
        """End the thread: waiting tasks get `failure`, new requests are refused, the pages are given back."""
        with self._wake:
            self._state, self._thread_ended = "closed", True
        for listener in self._listeners.values():
            listener.put([failure])
        self._listeners.clear()
        if failure.__cause__ is not None:
            _log.error("the engine stopped", exc_info=failure.__cause__)
        for order in self._orders:  # requests that came meanwhile are refused too
            with contextlib.suppress(Exception):
                order()
        try:
            self._engine.close()
        except BaseException:  # noqa: BLE001
            _log.exception("the engine could not give everything back")

    def _next(self) -> bool:
        """Run the orders of other threads, and wait until a step has work; False: the thread shall end."""
        idle_since = time.monotonic()
        while True:
            with self._wake:
                orders = list(self._orders)
                self._orders.clear()
                if not orders and not self._engine.busy:
                    if self._state != "open":
                        return False
                    patience = _SETTLE_AFTER_S - (time.monotonic() - idle_since)
                    if patience > 0 and self._engine.untidy:
                        self._wake.wait(patience)
                    elif not self._engine.untidy:  # wake up to give memory back where other programs need it
                        self._wake.wait(LOOK_S if self._engine.holds_memory else None)
            for order in orders:
                order()
            if orders:
                self._stats = self._engine.stats()
            if self._state == "closed":
                return False
            if self._engine.busy:
                return True
            self._engine.spare_memory()
            if not orders and time.monotonic() - idle_since >= _SETTLE_AFTER_S:
                self._engine.tidy()

    def _tell(self, outputs: list[Output]) -> None:
        news: dict[str, list[Output | BaseException]] = {}
        for output in outputs:
            news.setdefault(output.request_id, []).append(output)
        for name, some in news.items():
            listener = self._listeners.get(name)
            if listener is not None and not listener.put(some):
                self._cancel(name, listener)
            if name not in self._engine:
                self._listeners.pop(name, None)
