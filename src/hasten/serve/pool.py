"""The models of one server: which there are, which are in memory, and who uses them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hasten.cache.requests import PromptCache
from hasten.engine.async_engine import EngineClosed
from hasten.errors import HastenError
from hasten.serve.call import Problem
from hasten.serve.shape import TokenTexts

if TYPE_CHECKING:
    from hasten.engine.async_engine import AsyncEngine
    from hasten.engine.model import LanguageModel
    from hasten.engine.request import EngineStats
    from hasten.serve.metrics import Log


_LOOK_S = 1.0  # between looks whether an engine failed
_MOST_WAIT_S = 60.0  # between two loads of a model whose engine fails again and again
_FORGOTTEN_S = 300.0  # an engine that ran for so long is loaded again at once when it fails

Loader = Callable[[str], "tuple[LanguageModel, AsyncEngine]"]


@dataclass(eq=False)
class Served:
    """A model in memory."""

    name: str
    model: LanguageModel
    engine: AsyncEngine
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    leaving: bool = False  # no new users: its place is wanted
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @cached_property
    def fingerprint(self) -> str:
        """What answers depend on besides the request; a pass over the weights where it is not known yet."""
        from hasten.engine.loaded import fingerprint

        return fingerprint(self.model)

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of single tokens."""
        return TokenTexts(self.model.tokenizer)

    @cached_property
    def prompts(self) -> PromptCache:
        """Token ids of what was said before: turns of a conversation, system prompts."""
        return PromptCache(self.model.tokenizer)

    @property
    def context(self) -> int:
        """Longest prompt plus output, tokens."""
        return self.model.context

    @property
    def takes_requests(self) -> bool:
        """Whether it stays, and its engine lives."""
        return not self.leaving and not self.engine.failed


@dataclass(eq=False)
class _Falls:
    """How often a model's engine failed lately. After the first failure the model is loaded again at once,
    after the next ones later and later: a model that cannot run must not load for ever."""

    count: int = 0
    last: float = 0.0  # when the last load ended

    def begin(self) -> None:
        """The model is loaded again now."""
        self.count = 1 + (self.count if time.monotonic() - self.last < _FORGOTTEN_S else 0)

    def end(self) -> None:
        """A load ended: what it took does not count as time that the engine ran."""
        self.last = time.monotonic()

    @property
    def wait_s(self) -> float:
        """Seconds until the model may be loaded again."""
        if self.count == 0:
            return 0.0
        return self.last + min(_MOST_WAIT_S, 2.0 ** (self.count - 1)) - time.monotonic()


@dataclass(eq=False)
class _Load:
    """A model on its way, and how many wait for it.

    They are its users from the moment it is there: it cannot be made to leave before they have had it, so two
    models that share one place both get on.
    """

    task: asyncio.Task[Served] | None = None
    waiting: int = 0
    served: Served | None = None


class ModelPool:
    """Models by name, loaded when first asked for; the longest unused leaves when there are too many.

    A model is only dropped when nobody uses it: the one that has to go takes no new requests, finishes what
    it has, and requests that still want it wait for a place in their turn.

    Args:
        refs: name -> what `hasten.load` takes. Only these names exist: no request can name a path.
        loader: loads one, in a thread.
        most: models in memory at once.
        any_name: a name that is none of them means the first.
    """

    def __init__(
        self,
        refs: dict[str, str],
        loader: Loader,
        most: int,
        log: Log | None = None,
        any_name: bool = False,
    ) -> None:
        self.refs = refs
        self._any_name = any_name
        self.created = int(time.time())
        self._loader = loader
        self._most = most
        self._log = log
        self._loaded: dict[str, Served] = {}
        self._loading: dict[str, _Load] = {}
        self._placing = asyncio.Lock()
        self._coming: Future[tuple[LanguageModel, AsyncEngine]] | None = None
        self._falls: dict[str, _Falls] = {}
        self._down: set[str] = set()  # models whose engine failed and that are not in memory again
        self._watcher: asyncio.Task[None] | None = None
        self.started = False  # a model was loaded, whatever became of it
        self._was_lost = False  # a model left with its device, and none was loaded since

    @property
    def default(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.refs))

    @property
    def ready(self) -> bool:
        """Whether a request would find a model in memory."""
        return any(served.takes_requests for served in self._loaded.values())

    @property
    def is_lost(self) -> bool:
        """Whether a device was lost and no model runs elsewhere: only another process can use it again."""
        return not self.ready and (self._was_lost or any(one.engine.is_lost for one in self._loaded.values()))

    def loaded(self) -> list[tuple[str, EngineStats]]:
        """(name, its engine's numbers) of the models in memory."""
        return [(name, served.engine.stats()) for name, served in list(self._loaded.items())]

    def is_loaded(self, name: str) -> bool:
        """Whether a model is in memory."""
        return name in self._loaded

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a model in memory: its context and its recipe."""
        served = self._loaded.get(name)
        if served is None:
            return {}
        return {"max_model_len": served.context, "recipe": served.model.recipe.name}

    def expect(self, coming: Future[tuple[LanguageModel, AsyncEngine]]) -> asyncio.Task[Served]:
        """Take the default model, whose loading began before there was a loop; requests for it wait."""
        self._coming = coming
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self._start_loading(self.default)

    async def _watch(self) -> None:
        """Load models anew whose engine failed, whether somebody asks for them or not."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for name in [*self._down, *(name for name, one in self._loaded.items() if one.engine.failed)]:
                if self._placing.locked():
                    continue  # a load is under way, and may need the place: look again later
                if name not in self._loaded and len(self._loaded) >= self._most:
                    self._down.discard(name)  # others took its place: it comes back when it is asked for
                elif name not in self._loading and self._falls.setdefault(name, _Falls()).wait_s <= 0:
                    self._revive(name)

    def _revive(self, name: str) -> asyncio.Task[Served]:
        self._down.add(name)
        falls = self._falls.setdefault(name, _Falls())
        falls.begin()
        self._say("reloading", "error", model=name, failures=falls.count)
        return self._start_loading(name)

    def stop_watching(self) -> None:
        """What fails from now on stays as it is: the server ends."""
        if self._watcher is not None:
            self._watcher.cancel()

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """The model of that name, loaded if need be, kept while the context lasts.

        Raises:
            Problem: 404, there is no model of that name; 503, it cannot be loaded.
        """
        known = name if name in self.refs or not self._any_name else None
        served = await self._acquire(known or self.default)
        try:
            yield served
        except EngineClosed:
            if not served.leaving:  # its engine failed
                served.leaving = True
                self._down.add(served.name)
            raise
        finally:
            _release(served)

    async def _acquire(self, name: str) -> Served:
        if name not in self.refs:
            raise Problem(
                404,
                f"the model {name[:200]!r} does not exist; /v1/models lists those that do",
                param="model",
                code="model_not_found",
            )
        served = self._loaded.get(name)
        if served is not None and served.takes_requests:
            served.users += 1
            served.idle.clear()
            return served
        task = self._loading[name].task if name in self._loading else self._begin(name)
        load = self._loading[name]
        assert task is not None
        load.waiting += 1
        try:
            return await asyncio.shield(task)  # a client that leaves does not stop what others wait for
        except asyncio.CancelledError:
            load.waiting -= 1
            if load.served is not None:
                _release(load.served)
            raise

    def _begin(self, name: str) -> asyncio.Task[Served]:
        """Load a model that is asked for.

        Raises:
            Problem: 503, its engine fails again and again, and is given some time.
        """
        if name not in self._down and (name not in self._loaded or not self._loaded[name].engine.failed):
            return self._start_loading(name)
        falls = self._falls.setdefault(name, _Falls())
        if (wait := falls.wait_s) > 0:
            said = f"the engine of {name!r} failed {falls.count} times; it starts again in {wait:.0f} s"
            raise Problem(503, said, code="engine_stopped", headers={"retry-after": str(math.ceil(wait))})
        return self._revive(name)

    def _start_loading(self, name: str) -> asyncio.Task[Served]:
        load = self._loading[name] = _Load()
        load.task = asyncio.get_running_loop().create_task(self._load(name, load))
        load.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits
        return load.task

    async def _load(self, name: str, load: _Load) -> Served:
        try:
            async with self._placing:
                load.served = self._loaded[name] = await self._placed(name)
                load.served.users = load.waiting
                self.started, self._was_lost = True, False
                self._down.discard(name)
                return load.served
        except Exception as error:
            self._say("load_failed", "error", model=name, error=str(error))
            raise
        finally:
            self._falls.setdefault(name, _Falls()).end()
            self._loading.pop(name, None)

    async def _placed(self, name: str) -> Served:
        """The model in memory; others left for it."""
        before = self._loaded.get(name)
        if before is not None:
            await self._evict(before)
        while len(self._loaded) >= self._most:
            await self._evict(min(self._loaded.values(), key=lambda one: (one.users > 0, one.used)))
        began, coming, self._coming = time.monotonic(), self._coming, None
        try:
            if coming is not None:
                model, engine = await asyncio.wrap_future(coming)
            else:
                model, engine = await asyncio.get_running_loop().run_in_executor(
                    None, self._loader, self.refs[name]
                )
        except HastenError as error:
            said = f"the model {name!r} cannot be loaded: {error.message}"
            raise Problem(503, said, code="load_failed") from error
        about: dict[str, Any] = dict(model.placement)
        if coming is None:
            about["duration_ms"] = round(1000 * (time.monotonic() - began))
        self._say("model_loaded", model=name, **about)
        return Served(name, model, engine)

    async def _evict(self, victim: Served) -> None:
        victim.leaving = True
        while victim.users:
            await victim.idle.wait()
        del self._loaded[victim.name]
        self._was_lost |= victim.engine.is_lost
        await victim.engine.close(drain=False)
        victim.model.close()
        self._say("model_unloaded", model=victim.name)

    async def close(self) -> None:
        """Stop all engines; what still runs is cancelled."""
        self.stop_watching()
        for load in list(self._loading.values()):
            if load.task is not None:
                load.task.cancel()
        while self._loaded:
            _, served = self._loaded.popitem()
            await served.engine.close(drain=False)
            served.model.close()

    def _say(self, event: str, level: str = "info", **fields: Any) -> None:
        if self._log is not None:
            self._log.event(event, level, **fields)


def _release(served: Served) -> None:
    """One user less."""
    served.users -= 1
    served.used = time.monotonic()
    if served.users == 0:
        served.idle.set()
