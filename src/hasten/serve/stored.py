"""Answers of `/v1/responses` that are kept for a while: to be asked for again, and to be continued."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.serve.problem import Problem

MAX_KEPT = 1000
MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation up to and with it, its instructions left out."""

    owner: str  # the key or address it was made for; nobody else gets it
    document: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    size: int  # bytes, roughly


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
        """Keep one; what is too large for the store by itself is not kept."""
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
                f"there is no stored response {name[:100]!r}; the last {self._most} are kept, in memory",
                param=param,
                code="response_not_found",
            )
        return found

    def remove(self, name: str, owner: str) -> None:
        """Forget one.

        Raises:
            Problem: as `get`.
        """
        self._bytes -= self.get(name, owner).size
        del self._kept[name]
