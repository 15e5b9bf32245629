"""How the server behaves, as one frozen dataclass; the command line's flags come from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hasten.errors import UsageError


@dataclass(frozen=True)
class ServeOptions:
    """Addresses, keys and limits of `hasten serve`. A limit keeps one client from taking the rest's.

    Raises:
        UsageError: a value outside its range.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "address to listen on; 0.0.0.0 is every network this machine has"},
    )
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 picks a free one"})
    api_keys: tuple[str, ...] = field(
        default=(), metadata={"help": "key that lets a client in, repeatable; none: everybody is let in"}
    )
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata={"help": "web origin whose pages may call the API, or * for all, repeatable; default: none"},
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "name by which the server may be asked (*.example.com: any below it; *: all), "
            "repeatable; default: localhost and addresses on --host 127.0.0.1 without a key, else all"
        },
    )
    max_loaded: int | None = field(
        default=None,
        metadata={"help": "models in memory at once, the longest unused leaves; default: all that are named"},
    )
    max_connections: int = field(
        default=4096, metadata={"help": "open connections; one more is refused at once"}
    )
    max_body_mb: float = field(default=16.0, metadata={"help": "longest request body, MB"})
    max_header_kb: float = field(default=32.0, metadata={"help": "most a request's headers may take, KB"})
    header_timeout_s: float = field(
        default=10.0, metadata={"help": "seconds a connection may take to send its headers"}
    )
    body_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds a request may take to send its body"}
    )
    send_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds a client may leave an answer unread before it is cancelled"}
    )
    keep_alive_s: float = field(default=30.0, metadata={"help": "seconds an idle connection is kept"})
    drain_s: float = field(
        default=30.0, metadata={"help": "seconds that running requests get to finish when the server stops"}
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "longest prompt, tokens; default: the context"}
    )
    max_output_tokens: int | None = field(
        default=None, metadata={"help": "longest answer, tokens; default: what the context leaves"}
    )
    pooling: Literal["mean", "last"] = field(
        default="mean", metadata={"help": "how embeddings are pooled: mean, or the last token's"}
    )
    response_cache_ttl: float | None = field(
        default=None,
        metadata={"help": "seconds a repeated deterministic request is answered from memory; default: never"},
    )
    response_cache_mb: float = field(default=64.0, metadata={"help": "most that memory may hold, MB"})
    record: Path | None = field(
        default=None, metadata={"help": "file to append a trace of requests to, for hasten cache replay"}
    )
    log: bool = field(default=True, metadata={"help": "write one JSON line a request to stderr"})

    def __post_init__(self) -> None:
        self._need(0 <= self.port <= 65535, "port", "from 0 to 65535")
        self._need(all(self.api_keys), "api_keys", "without empty keys")
        self._need(self.max_loaded is None or self.max_loaded > 0, "max_loaded", "1 or more")
        self._need(self.max_connections > 0, "max_connections", "1 or more")
        self._need(self.pooling in ("mean", "last"), "pooling", "mean or last")
        for name in ("max_prompt_tokens", "max_output_tokens", "response_cache_ttl"):
            value = getattr(self, name)
            self._need(value is None or value > 0, name, "above 0")
        for item in dataclasses.fields(self):
            if item.name.endswith(("_s", "_mb", "_kb")):
                self._need(getattr(self, item.name) > 0, item.name, "above 0")

    def _need(self, good: bool, name: str, range_: str) -> None:
        if not good:
            flag = (
                "--" + name.rstrip("s").replace("_", "-")
                if name == "api_keys"
                else "--" + name.replace("_", "-")
            )
            shown = "" if name == "api_keys" else f", got {getattr(self, name)}"
            raise UsageError(f"{flag} must be {range_}{shown}", hint="see: hasten serve --help")

    @property
    def max_body_bytes(self) -> int:
        """Longest request body."""
        return int(self.max_body_mb * 1_000_000)
