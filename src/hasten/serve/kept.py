"""What is kept of answers: of `/v1/responses`, of deterministic requests, and a trace of requests."""

from __future__ import annotations

import asyncio
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cache.requests import ResponseCache
from hasten.engine.trace import TraceModel, TraceWriter
from hasten.serve.call import Problem

if TYPE_CHECKING:
    from hasten.engine.request import Request, Usage
    from hasten.serve.body import Strict
    from hasten.serve.metrics import Log
    from hasten.serve.pool import Served
    from hasten.serve.shape import News

MAX_KEPT = 1000
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to and with it, its instructions left out."""

    owner: str  # the key or address it was made for; nobody else gets it
    document: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    size: int  # bytes, roughly
    task: asyncio.Task[None] | None = None  # makes it, where nobody waits for it

    @property
    def is_open(self) -> bool:
        """Whether it is still being made."""
        return self.document["status"] in ("queued", "in_progress")


class ResponseStore:
    """In memory, the oldest goes first. Gone with the process."""

    def __init__(self, most: int = MAX_KEPT, most_bytes: int = MAX_BYTES) -> None:
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, name: str, response: StoredResponse) -> None:
        """Keep one, in place of one of that name; what is too large for the store by itself is not kept."""
        earlier = self._kept.pop(name, None)
        self._bytes -= earlier.size if earlier is not None else 0
        if response.size > self._most_bytes:
            return
        self._kept[name] = response
        self._bytes += response.size
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].size

    def get(self, name: str, owner: str, param: str = "response_id") -> StoredResponse:
        """The response of that name.

        Raises:
            Problem: 404: never stored, gone, or somebody else's.
        """
        found = self._kept.get(name)
        if found is None or found.owner != owner:
            raise Problem(
                404,
                f"Response with id {name[:100]!r} not found: the last {self._most} are kept, in memory",
                param=param,
                code="response_not_found",
            )
        return found

    def item(self, name: str, owner: str, param: str) -> Mapping[str, Any]:
        """The item of that id in any stored response, the newest first.

        Raises:
            Problem: 404: none has it.
        """
        for response in reversed(self._kept.values()):
            if response.owner == owner:
                for item in response.document.get("output", ()):
                    if item.get("id") == name:
                        return dict(item)
        said = f"no stored response has an item {name[:100]!r}; send the item itself, or store: true"
        raise Problem(404, said, param=param, code="item_not_found")

    async def stop(self, name: str, owner: str) -> bool:
        """End the making of a response; False: it was not made in the background.

        Raises:
            Problem: 404, as `get`.
        """
        task = self.get(name, owner).task
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
        return task is not None

    def remove(self, name: str, owner: str) -> None:
        self._bytes -= self.get(name, owner).size
        del self._kept[name]


class ResponseMemory:
    """Outputs by request.

    Args:
        ttl_s: seconds they are good for.
        limit_bytes: most they may take.
    """

    def __init__(self, ttl_s: float, limit_bytes: int) -> None:
        self._cache = ResponseCache(limit_bytes, ttl_s)

    def look(
        self, served: Served, spec: Strict, requests: Sequence[Request]
    ) -> tuple[str | None, list[News] | None]:
        """The key of what is asked, None where another answer could be as right; and the outputs kept of it.

        The prompts' tokens count and not the messages alone: a template may tell the model today's date.
        Runs in a worker thread: the fingerprint may take a while.
        """
        asked = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        asked["hasten.kind"] = type(spec).__name__
        asked["hasten.prompts"] = [request.prompt for request in requests]
        key = ResponseCache.key(served.fingerprint, asked)
        kept = None if key is None else self._cache.get(key)
        return key, None if kept is None else pickle.loads(kept)  # this process wrote it

    def keep(self, key: str, news: Sequence[News]) -> None:
        """Keep all outputs of a call. In a worker thread."""
        ends = [output.finish_reason for _, output in news if output.finish_reason is not None]
        self._cache.put(key, pickle.dumps(list(news)), finish_reasons=ends)


class Recorder:
    """Writes requests that ended, in a thread of its own.

    Raises:
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: Path, log: Log) -> None:
        self._log = log
        self._writer = TraceWriter(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hasten-record")

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
