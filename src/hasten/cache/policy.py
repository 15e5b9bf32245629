"""Which entry of a full cache goes first: one interface, four answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, get_args

from hasten.cache.cost_aware import CostAware
from hasten.cache.lfu import Lfu
from hasten.cache.lru import Lru
from hasten.cache.s3fifo import S3Fifo
from hasten.core import CachePolicy
from hasten.errors import UsageError


class Policy(Protocol):
    """Keeps the order in which entries go; holds keys, never what they stand for. Not for several threads."""

    def insert(self, key: bytes, *, cost: float, bytes: int) -> None:
        """An entry came in: `cost` seconds to compute it again, `bytes` it takes. A known key is touched."""

    def touch(self, key: bytes) -> None:
        """An entry was used. Unknown keys are let pass."""

    def remove(self, key: bytes) -> None:
        """An entry is gone for another reason than its age. Unknown keys are let pass."""

    def victim(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The entry that goes now; it is out of the order then. None where nothing may go.

        Entries that may not go (in use, or others depend on them) are passed over. The last of them is next
        in line, as what depended on it may just have gone; one passed over again counts as used now. So a
        prompt's pages go from its end to its beginning, and what is in use is not walked over for every
        victim. Finding that nothing may go takes a look at every entry.
        """

    def __len__(self) -> int:
        """Entries in the order."""


def new_policy(name: CachePolicy, capacity: int) -> Policy:
    """A policy by name for a cache of `capacity` bytes.

    Raises:
        UsageError: no policy is called that.
    """
    if name == "lru":
        return Lru()
    if name == "lfu":
        return Lfu()
    if name == "s3fifo":
        return S3Fifo(capacity)
    if name == "cost":
        return CostAware()
    known = ", ".join(get_args(CachePolicy))
    raise UsageError(f"unknown cache policy {name!r}", hint=f"use one of {known}")
