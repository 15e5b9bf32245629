"""What the ranks of a tensor-parallel group say to each other while they compute.

Every sum is taken in the order of the ranks, by whoever takes it: all ranks get the same bits, whatever else
is in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch

from hasten.errors import MachineError
from hasten.runtime.shards import Shard

_LOOK_S = 0.005  # between looks whether the others have come
_WHO_S = 1.0  # longest wait for the watcher to name the rank that ended
_MOST = timedelta(seconds=120)  # of any wait of gloo's; a rank that dies ends it at once


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one group find each other.

    `check` raises what ended the group; whoever waits here asks it.
    """

    rank: int
    ranks: int
    port: int  # of rank 0's store, on this host
    check: Callable[[], None]

    def store(self) -> Any:
        """The group's store; rank 0 opened it already."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        return TCPStore("127.0.0.1", self.port, is_master=False, timeout=_MOST)


class Ranks(Protocol):
    """One rank's side of the group. All ranks call the same methods in the same order."""

    rank: int
    ranks: int

    def add(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' [N, E], in rank order; valid until the next call. `partial` may change."""
        ...

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        """Where a partial sum bf16 [rows, width] may be written so that `add` need not copy it."""
        ...

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' [R, C] of 4-byte values beside one another, in rank order: [R, ranks * C]."""
        ...

    def least(self, value: int) -> int:
        """The smallest of all ranks' values; nobody goes on before all have come."""
        ...

    def check(self) -> None:
        """Raise what ended the group.

        Raises:
            MachineError: it did not stand until now: what was computed is void.
        """
        ...

    def end_waits(self) -> None:
        """Let nothing on this rank's device wait for the others any longer; any thread may call it."""
        ...


class Counts:
    """`Ranks.least` over a store."""

    def __init__(self, meeting: Meeting, store: Any) -> None:
        self._meeting, self._store, self._turn = meeting, store, 0

    def least(self, value: int) -> int:
        """See `Ranks`."""
        self._turn += 1
        me, name = self._meeting.rank, f"least/{self._turn}"
        self._store.set(f"{name}/{me}", str(value))
        return min(self._read(f"{name}/{rank}") for rank in range(self._meeting.ranks))

    def _read(self, key: str) -> int:
        began = time.monotonic()
        while time.monotonic() - began < _MOST.total_seconds():
            self._meeting.check()
            if self._store.check([key]):
                return int(self._store.get(key))
            time.sleep(_LOOK_S)
        raise MachineError(f"a rank of the tensor-parallel group did not come within {_MOST.seconds} s")


class GlooRanks:
    """Ranks on processors: gloo carries whole tensors, each rank adds them up."""

    def __init__(self, meeting: Meeting) -> None:
        from torch.distributed import ProcessGroupGloo

        self.rank, self.ranks = meeting.rank, meeting.ranks
        self._meeting, store = meeting, meeting.store()
        self._counts = Counts(meeting, store)
        self._counts.least(0)  # gloo waits long for those who do not come
        self._group: Any = ProcessGroupGloo(store, self.rank, self.ranks, _MOST)

    def add(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        found = self._all(partial)
        total = found[0]
        for one in found[1:]:
            total += one
        return total

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        """See `Ranks`."""
        return None

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Ranks`."""
        return torch.cat(self._all(part), -1)

    def least(self, value: int) -> int:
        """See `Ranks`."""
        return self._counts.least(value)

    def check(self) -> None:
        """See `Ranks`."""
        self._meeting.check()

    def end_waits(self) -> None:
        """See `Ranks`; gloo's waits end with the other process."""

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        mine = mine.contiguous()
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        self.check()
        try:
            self._group.allgather([found], [mine]).wait()
        except RuntimeError as error:
            self._say_who(error)
        return found

    def _say_who(self, error: RuntimeError) -> NoReturn:
        """Raise what ended the group; gloo may notice a broken connection before the watcher says whose."""
        until = time.monotonic() + _WHO_S
        while time.monotonic() < until:
            self.check()
            time.sleep(_LOOK_S)
        raise MachineError(f"a rank of the tensor-parallel group cannot be reached: {error}") from error


@dataclass(frozen=True)
class Team:
    """A rank's share of the model, and its side of the group."""

    shard: Shard
    ranks: Ranks

    @property
    def shares_head(self) -> bool:
        """Whether each rank has logits of a part of the vocabulary."""
        return len(self.shard.vocabulary) < self.shard.spec.vocab


def best(ranks: Ranks, logits: torch.Tensor, first: int) -> torch.Tensor:
    """Greedy tokens int64 [R] of logits whose columns all ranks share: the lowest id of equals, -1 for none.

    Args:
        logits: this rank's, float32 [R, C].
        first: the token of the first column.
    """
    top, at = logits.max(-1)
    both = torch.stack((top.view(torch.int32), (at + first).int()), -1)
    found = ranks.gather(both).view(len(logits), ranks.ranks, 2)
    values, ids = found[..., 0].contiguous().view(torch.float32), found[..., 1]
    is_top = values == values.max(-1, keepdim=True).values
    none = torch.iinfo(torch.int32).max
    lowest = torch.where(is_top, ids, none).min(-1).values
    return torch.where(lowest == none, -1, lowest).long()  # NaN equals nothing
