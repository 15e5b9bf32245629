"""A real server on a real socket in a thread, and clients made of the standard library."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stand_in_engine import StandInEngine, StandInModel

from hasten.serve.options import ServeOptions
from hasten.serve.server import ServeSetup, made

JSON = {"content-type": "application/json"}


@dataclass
class Reply:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked for its form."""
        document = self.json
        assert list(document) == ["error"], document
        assert list(document["error"]) == ["message", "type", "param", "code"]
        return document["error"]

    @property
    def events(self) -> list[Any]:
        """Data of the events, the closing [DONE] left out."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


@dataclass
class Running:
    """A server that runs."""

    url: str
    server: Any
    engines: dict[str, StandInEngine] = field(default_factory=dict)
    models: dict[str, StandInModel] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    @property
    def engine(self) -> Any:
        """The first model's."""
        return next(iter(self.engines.values()))

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def ask(
        self, path: str, body: Any = None, *, method: str = "", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; `body` is JSON, or bytes as they are."""
        connection = http.client.HTTPConnection(*self.address, timeout=90)
        try:
            data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            sent = {**(JSON if body is not None else {}), **(headers or {})}
            connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(self.address, timeout=90)


@contextmanager
def serving(
    options: ServeOptions | None = None,
    engines: Mapping[str, StandInEngine] | None = None,
    loader: Callable[[str], Any] | None = None,
) -> Iterator[Running]:
    """Run a server while the context lasts. Model names are their references too."""
    chosen = options or ServeOptions(port=0, log=False)
    known = dict(engines or {"echo": StandInEngine()})
    models: dict[str, StandInModel] = {}

    def load(ref: str) -> tuple[Any, Any]:
        models[ref] = StandInModel(ref)
        return models[ref], known[ref]

    said: list[str] = []
    setup = ServeSetup({name: name for name in known}, chosen)
    server, listener = made(setup, said.append, loader or load)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: bool(said))
        yield Running(said[0], server, known, models)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], **fields}
