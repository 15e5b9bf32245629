"""The ranks of a tensor-parallel group: what each has of the model, and what they say to each other.

Query heads and the feed-forward layer are cut into equal parts: their matrices by rows where they read the
residual stream (q, k, v, gate, up), by columns where they write to it (o, down), whose results the ranks add
up. The head is cut by rows, a part of the vocabulary a rank, or copied where the number does not divide it.
Embeddings and norms are copied. (Shoeybi et al., Megatron-LM, 2019.)

Every sum is taken in the order of the ranks, by whoever takes it: all ranks get the same bits, whatever else
is in the batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, NoReturn, Protocol

import torch

from hasten.core import Block, ModelSpec, dense
from hasten.errors import MachineError, UsageError

_BY_ROWS = ("q", "k", "v", "gate", "up")
_BY_COLUMNS = ("o", "down")


@dataclass(frozen=True)
class Piece:
    """What a rank has of a parameter: some rows, one range behind another, and a range of its columns."""

    rows: tuple[slice, ...] = (slice(None),)
    cols: slice = field(default_factory=lambda: slice(None))

    def of(self, values: Any, join: Any) -> Any:
        """The piece of an array or a tensor [rows] or [rows, cols]; `join` concatenates several."""
        taken = [values[rows] for rows in self.rows]
        found = taken[0] if len(taken) == 1 else join(taken)
        return found if self.cols == slice(None) else found[:, self.cols]


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` computes of a dense decoder.

    Raises:
        ModelError: the model is no dense decoder.
        UsageError: its query heads or feed-forward columns cannot be shared out evenly.
    """

    spec: ModelSpec  # of the whole model
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        dense(self.spec, "tensor parallel")
        mixer, ways = self.spec.blocks[0].mixer, self.spec.blocks[0].feed_forward
        said = [
            f"{count} {what}"
            for count, what in ((mixer.heads, "query heads"), (ways.width, "feed-forward columns"))
            if count % self.ranks
        ]
        if said:
            whole = math.gcd(mixer.heads, ways.width)
            good = [str(n) for n in range(2, min(whole, 16) + 1) if whole % n == 0]
            raise UsageError(
                f"{' and '.join(said)} cannot be shared out evenly among {self.ranks} ranks",
                hint=f"use --tensor-parallel with one of: {', '.join(good)}" if good else "leave it out",
            )

    @property
    def heads(self) -> range:
        """This rank's query heads."""
        each = self.spec.blocks[0].mixer.heads // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """This rank's KV heads, each for as many query heads as the others.

        Where the number of ranks does not divide the model's KV heads, some stand on several ranks; and if a
        rank's query heads then begin or end inside a group, its groups are the largest equal ones.
        """
        mixer = self.spec.blocks[0].mixer
        group = mixer.heads // mixer.kv_heads
        own = math.gcd(len(self.heads), group)
        return tuple(first // group for first in self.heads[::own])

    @property
    def feed(self) -> range:
        """This rank's rows of gate and up, which are its columns of down."""
        each = self.spec.blocks[0].feed_forward.width // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def vocabulary(self) -> range:
        """The tokens whose logits this rank computes: all where the number of ranks does not divide them."""
        if self.spec.vocab % self.ranks:
            return range(self.spec.vocab)
        each = self.spec.vocab // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @cached_property
    def local(self) -> ModelSpec:
        """What this rank computes, as a model: fewer heads, a narrower feed-forward layer.

        Its head is a matrix of its own, with the rows of `vocabulary`; its embedding is whole. Biases that
        are added to a sum of all ranks are rank 0's.
        """

        def change(block: Block) -> Block:
            mixer = dataclasses.replace(block.mixer, heads=len(self.heads), kv_heads=len(self.kv_heads))
            feed = dataclasses.replace(block.feed_forward, width=len(self.feed))
            kept = [name for name in block.biases if self.rank == 0 or name not in _BY_COLUMNS]
            return dataclasses.replace(block, mixer=mixer, feed_forward=feed).with_biases(kept)

        head = dataclasses.replace(self.spec.head, tied=False)
        return dataclasses.replace(self.spec.with_blocks(change), head=head)

    def piece(self, name: str) -> Piece | None:
        """What this rank has of a parameter of `local`, in the model's own; None: nothing.

        Args:
            name: canonical; "head" is the model's head also where that is its embedding: `source` says so.
        """
        part, _, more = name.rpartition(".")
        is_bias = more == "bias"
        member = (part if is_bias else name).rpartition(".")[2]
        if name == "head":
            return Piece((_range(self.vocabulary),))
        if member in _BY_COLUMNS:
            if is_bias:
                return Piece() if self.rank == 0 else None
            size = self.spec.blocks[0].mixer.head_dim
            return Piece(cols=_range(self.feed) if member == "down" else _range(self.heads, size))
        if member in _BY_ROWS:
            return Piece(self._rows(member))
        is_full = self.spec.blocks[0].mixer.qk_norm == "full"
        if is_full and member in ("q_norm", "k_norm"):
            return Piece(self._rows(member[0]))
        return Piece()

    def _rows(self, member: str) -> tuple[slice, ...]:
        size = self.spec.blocks[0].mixer.head_dim
        if member in ("gate", "up"):
            return (_range(self.feed),)
        if member == "q":
            return (_range(self.heads, size),)
        return _runs(self.kv_heads, size)

    def source(self, name: str) -> str:
        """The model's own name of a parameter of `local`."""
        return self.spec.head_name if name == "head" else name


def shards(spec: ModelSpec, ranks: int) -> list[Shard]:
    """What each rank computes.

    Raises:
        ModelError, UsageError: as `Shard`.
    """
    if ranks < 1:
        raise UsageError(f"{ranks} ranks", hint="use --tensor-parallel 1 or more")
    return [Shard(spec, rank, ranks) for rank in range(ranks)]


def _range(part: range, size: int = 1) -> slice:
    return slice(part.start * size, part.stop * size)


def _runs(heads: Sequence[int], size: int) -> tuple[slice, ...]:
    """Rows of heads, neighbours together."""
    found: list[slice] = []
    for head in heads:
        rows = slice(head * size, (head + 1) * size)
        if found and found[-1].stop == rows.start:
            found[-1] = slice(found[-1].start, rows.stop)
        else:
            found.append(rows)
    return tuple(found)


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

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        """Where a partial sum bf16 [rows, width] may be written so that `add` need not copy it."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' [R, C] of 4-byte values beside one another, in rank order: [R, ranks * C]."""

    def least(self, value: int) -> int:
        """The smallest of all ranks' values; nobody goes on before all have come."""

    def check(self) -> None:
        """Raise what ended the group.

        Raises:
            MachineError: it did not stand until now: what was computed is void.
        """

    def end_waits(self) -> None:
        """Let nothing on this rank's device wait for the others any longer; any thread may call it."""


class Counts:
    """`Ranks.least` over a store."""

    def __init__(self, meeting: Meeting, store: Any) -> None:
        self._meeting, self._store, self._turn = meeting, store, 0

    def least(self, value: int) -> int:
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
        found = self._all(partial)
        total = found[0]
        for one in found[1:]:
            total += one
        return total

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        return None

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(part), -1)

    def least(self, value: int) -> int:
        return self._counts.least(value)

    def check(self) -> None:
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
