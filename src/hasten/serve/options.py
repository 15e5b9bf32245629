"""How the server behaves, as one frozen dataclass; the command line's flags come from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hasten.errors import UsageError
from hasten.recipe import option


@dataclass(frozen=True)
class ServeOptions:
    """Addresses, keys and limits of `hasten serve`. A limit keeps one client from taking the rest's.

    Raises:
        UsageError: a value outside its range.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every network this machine has")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    api_keys: tuple[str, ...] = option((), "key that lets a client in, repeatable; none: everybody is let in")
    max_priority: tuple[int, ...] = option(
        (),
        "highest priority of a request, repeatable: one for each --api-key in order, the last for all others",
    )
    cors_origins: tuple[str, ...] = option(
        (), "web origin whose pages may call the API, or * for all, repeatable; default: none"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "name by which the server may be asked (*.example.com: any below it; *: all), "
        "repeatable; default: localhost and addresses on --host 127.0.0.1 without a key, else all",
    )
    max_loaded: int | None = option(
        None, "models in memory at once, the longest unused leaves; default: all that are named"
    )
    max_connections: int | None = option(
        None,
        "open connections; one more takes the place of the longest idle one, or is refused; "
        "default: 4096, fewer where fewer files may be open",
    )
    max_body_mb: float = option(16.0, "longest request body, MB")
    max_header_kb: float = option(32.0, "most a request's headers may take, KB")
    header_timeout_s: float = option(10.0, "seconds a connection may take to send its headers")
    body_timeout_s: float = option(30.0, "seconds a request may take to send its body")
    send_timeout_s: float = option(30.0, "seconds a client may leave an answer unread before it is cancelled")
    keep_alive_s: float = option(30.0, "seconds an idle connection is kept")
    drain_s: float = option(30.0, "seconds that running requests get to finish when the server stops")
    max_prompt_tokens: int | None = option(None, "longest prompt, tokens; default: the context")
    max_output_tokens: int | None = option(None, "longest answer, tokens; default: what the context leaves")
    pooling: Literal["mean", "last"] = option("mean", "how embeddings are pooled: mean, or the last token's")
    response_cache_ttl: float | None = option(
        None, "seconds a repeated deterministic request is answered from memory; default: never"
    )
    response_cache_mb: float = option(64.0, "most that memory may hold, MB")
    record: Path | None = option(None, "file to append a trace of requests to, for hasten cache replay")
    any_model: bool = option(False, "answer requests for a model that is not here with the first one")
    strict: bool = option(
        False, "refuse fields that are not known or not served, and caps above what fits, instead of going on"
    )
    log: bool = option(True, "write one JSON line a request to stderr")

    def __post_init__(self) -> None:
        self._need(0 <= self.port <= 65535, "port", "from 0 to 65535")
        self._need(all(self.api_keys), "api_keys", "without empty keys")
        self._need(self.max_loaded is None or self.max_loaded > 0, "max_loaded", "1 or more")
        self._need(self.max_connections is None or self.max_connections > 0, "max_connections", "1 or more")
        self._need(self.pooling in ("mean", "last"), "pooling", "mean or last")
        for name in ("max_prompt_tokens", "max_output_tokens", "response_cache_ttl"):
            value = getattr(self, name)
            self._need(value is None or value > 0, name, "above 0")
        for item in dataclasses.fields(self):
            if item.name.endswith(("_s", "_mb", "_kb")):
                self._need(getattr(self, item.name) > 0, item.name, "above 0")

    def priority_of(self, asked: int, client: str) -> int:
        """The priority a client gets."""
        if not self.max_priority:
            return asked
        number = int(client.removeprefix("key-")) if client.startswith("key-") else 0
        return min(asked, self.max_priority[min(number, len(self.max_priority) - 1)])

    def _need(self, good: bool, name: str, range_: str) -> None:
        if not good:
            flag = "--" + name.removesuffix("s" if name == "api_keys" else "").replace("_", "-")
            shown = "" if name == "api_keys" else f", got {getattr(self, name)}"
            raise UsageError(f"{flag} must be {range_}{shown}", hint="see: hasten serve --help")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1_000_000)


def names_of(given: Iterable[str]) -> dict[str, str]:
    """Served names of models: `NAME=MODEL` says one, else an artifact's or file's stem, or the hub id itself.

    Raises:
        UsageError: two models of one name, or none at all.
    """
    refs: dict[str, str] = {}
    for text in given:
        name, separator, ref = text.partition("=")
        if not separator or name.startswith((".", "/", "~")) or "://" in name or Path(text).exists():
            name, ref = "", text
        name = name or _own_name(ref)
        if not ref:
            raise UsageError(f"{text!r} names no model", hint="use NAME=MODEL, for example chat=demo")
        if name in refs:
            raise UsageError(
                f"two models would be served as {name!r}", hint=f"name one: --model other={refs[name]}"
            )
        refs[name] = ref
    if not refs:
        raise UsageError("no model is named", hint="hasten serve demo, or hasten serve NAME.hasten")
    return refs


def _own_name(ref: str) -> str:
    path = Path(ref)
    if path.suffix in (".hasten", ".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else ref
