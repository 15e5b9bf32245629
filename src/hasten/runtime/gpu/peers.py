"""Ranks on GPUs of one host: sums over memory that every GPU maps (torch's symmetric memory), by own kernels.

- Few rows, inside a decode step (`push_pairs`, `await_pairs`): what a product writes goes at once to every
  rank, two bf16 values and the step's tag in one 64-bit word, the largest store that is surely atomic. The
  reader polls the data itself: one hop over NVLink, no flag, no barrier, no second pass.
- Many rows (`add_up`): each rank adds up its part of the values and writes the sums to all, between two
  kernels in which the ranks meet.

NVLink multicast is not used. Every wait ends when the host says so (`stop`), or after a minute: then what is
computed is void, and the host says so too.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from hasten.errors import MachineError
from hasten.runtime.gpu.ranks import Counts, Meeting

MOST_ROWS = 64  # whose sums travel as words
_BLOCK = 4096  # values of a program of `add_up`
_MOST_TRIES = tl.constexpr(50_000_000)  # of any wait: about a minute
_LOOK = tl.constexpr(1024)  # tries between looks at `stop`
_ALIGN = 512  # bytes


@triton.jit
def is_over(stop, tries):
    """Whether to wait no longer: the host said so, or it took too long, which the host is told."""
    over = tries < 0
    if tries % _LOOK == 0:
        over = tl.load(stop, volatile=True) != 0
        if tries >= _MOST_TRIES:
            tl.store(stop, 1)
            over = tries >= _MOST_TRIES
    return over


@triton.jit
def tagged(value, tag):
    """int32 or wider values as words with a tag."""
    return (tag.to(tl.int64) << 32) | (value.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def bf16_bits(x):
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def push_pairs(peers, acc, tile, live, tag, E: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
               RANKS: tl.constexpr):  # fmt: skip
    """A tile [ROWS, M] of this rank's partial sums to all ranks.

    peers: int64 [RANKS], addresses of int64 [MOST_ROWS, E / 2] for this rank's words on each.
    """
    h, m = tile * (ROWS // 2) + tl.arange(0, ROWS // 2), tl.arange(0, M)
    low, high = tl.split(tl.permute(tl.reshape(acc, [ROWS // 2, 2, M]), [0, 2, 1]))
    word = tagged((bf16_bits(high) << 16) | bf16_bits(low), tag)
    at, inside = m[None, :] * (E // 2) + h[:, None], (h < E // 2)[:, None] & (m < live)[None, :]
    for r in tl.static_range(RANKS):
        tl.store(tl.load(peers + r).to(tl.pointer_type(tl.int64)) + at, word, mask=inside)


@triton.jit
def await_pairs(words, stop, tag, row, E: tl.constexpr, HALVES: tl.constexpr, STRIDE: tl.constexpr,
                RANKS: tl.constexpr, RANKS_BLOCK: tl.constexpr):  # fmt: skip
    """The sum of all ranks' partial sums of a row, float32 [2 HALVES], 0 past E."""
    r, h = tl.arange(0, RANKS_BLOCK)[:, None], tl.arange(0, HALVES)[None, :]
    inside = (r < RANKS) & (h < E // 2)
    place, none = words + r * STRIDE + row * (E // 2) + h, tag.to(tl.int64) << 32
    word = tl.load(place, mask=inside, other=none, volatile=True)
    missing = tl.sum(tl.sum(((word >> 32).to(tl.int32) != tag).to(tl.int32), 1), 0)
    tries = 0
    while missing > 0:
        word = tl.load(place, mask=inside, other=none, volatile=True)
        missing = tl.sum(tl.sum(((word >> 32).to(tl.int32) != tag).to(tl.int32), 1), 0)
        tries += 1
        if is_over(stop, tries):
            missing = missing * 0
    low = ((word & 0xFFFF) << 16).to(tl.int32).to(tl.float32, bitcast=True)
    high = (((word >> 16) & 0xFFFF) << 16).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.interleave(tl.sum(low, 0), tl.sum(high, 0))


@triton.jit
def best_of_ranks(peers, words, stop, tag, row, top, token, V: tl.constexpr, ROWS: tl.constexpr,
                  RANKS: tl.constexpr, RANKS_BLOCK: tl.constexpr):  # fmt: skip
    """The best of all ranks' best logits of a row: its token, the lowest of equals; -1 where one has none.

    peers: int64 [RANKS], addresses of int64 [ROWS, 2] for this rank's words on each.
    """
    for r in tl.static_range(RANKS):
        to = tl.load(peers + r).to(tl.pointer_type(tl.int64)) + row * 2
        tl.store(to, tagged(top.to(tl.int32, bitcast=True), tag))
        tl.store(to + 1, tagged(token, tag))
    r = tl.arange(0, RANKS_BLOCK)
    place, none = words + (r * ROWS + row) * 2, tag.to(tl.int64) << 32
    value = tl.load(place, mask=r < RANKS, other=none, volatile=True)
    which = tl.load(place + 1, mask=r < RANKS, other=none, volatile=True)
    missing = tl.sum(
        (((value >> 32).to(tl.int32) != tag) | ((which >> 32).to(tl.int32) != tag)).to(tl.int32), 0
    )
    tries = 0
    while missing > 0:
        value = tl.load(place, mask=r < RANKS, other=none, volatile=True)
        which = tl.load(place + 1, mask=r < RANKS, other=none, volatile=True)
        late = ((value >> 32).to(tl.int32) != tag) | ((which >> 32).to(tl.int32) != tag)
        missing = tl.sum(late.to(tl.int32), 0)
        tries += 1
        if is_over(stop, tries):
            missing = missing * 0
    logit = tl.where(r < RANKS, value.to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
    found = tl.min(tl.where(logit == tl.max(logit, 0), which.to(tl.int32), V - 1), 0)
    is_none = tl.min(tl.where(r < RANKS, which.to(tl.int32), 0), 0) < 0
    return tl.where(is_none, -1, tl.minimum(tl.maximum(found, 0), V - 1))


@triton.jit
def meet(peers, flags, turn, stop, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Wait until every rank is here; what each wrote before is there for all after. Grid: one program.

    A kernel of its own: where each of 128 programs met its like before and after its work, a sum took 3.3 ms.
    peers: int64 [RANKS], addresses of each rank's flags int32 [RANKS].
    """
    now = tl.load(turn) + 1
    tl.store(turn, now)
    for r in tl.static_range(RANKS):
        to = tl.load(peers + r).to(tl.pointer_type(tl.int32)) + RANK
        tl.atomic_xchg(to, now, sem="release", scope="sys")
    for r in tl.static_range(RANKS):
        seen = tl.load(flags + r, volatile=True)
        tries = 0
        while seen - now < 0:
            seen = tl.load(flags + r, volatile=True)
            tries += 1
            if is_over(stop, tries):
                seen = now
    tl.atomic_add(turn + 1, 1, sem="acq_rel", scope="sys")  # a fence: later reads are later


@triton.jit
def add_up(partials, totals, n, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of bf16 [n] over all ranks, in rank order, each block by one rank, which writes it to all.

    partials, totals: int64 [RANKS], addresses on each rank. Grid: as many programs as there are blocks.
    """
    at = (tl.program_id(0).to(tl.int64) * RANKS + RANK) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(RANKS):
        part = tl.load(partials + r).to(tl.pointer_type(tl.bfloat16)) + at
        total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    for r in tl.static_range(RANKS):
        to = tl.load(totals + r).to(tl.pointer_type(tl.bfloat16)) + at
        tl.store(to, total.to(tl.bfloat16), mask=inside)


@triton.jit
def spread(part, totals, n, C: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """This rank's columns int32 [n / C, C] into every rank's [n / C, RANKS C]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(part + at, mask=at < n, other=0)
    place = at // C * (C * RANKS) + RANK * C + at % C
    for r in tl.static_range(RANKS):
        tl.store(tl.load(totals + r).to(tl.pointer_type(tl.int32)) + place, value, mask=at < n)


class Room:
    """A part of the memory that all ranks map: this rank's own, and the addresses of everybody's."""

    def __init__(self, own: torch.Tensor, addresses: list[int]) -> None:
        self.own = own  # uint8
        self.addresses = addresses

    def at(self, offset: int) -> torch.Tensor:
        """Addresses int64 [ranks] of the byte `offset` of it on each rank, on the device."""
        found = [address + offset for address in self.addresses]
        return torch.tensor(found, dtype=torch.int64, device=self.own.device)


class Words:
    """Where the words of a decode step's sums travel, and those of its tokens.

    Sums take two sets in turn, so that nobody overwrites what another still reads.
    """

    def __init__(self, ranks: PeerRanks) -> None:
        pairs = MOST_ROWS * ranks.width // 2
        self.stride = pairs  # words of a rank
        size, me = pairs * 8, ranks.rank
        each = ranks.ranks * size
        self.own = [room.own.view(torch.int64) for room in (ranks.words[0], ranks.words[1], ranks.tokens)]
        self.peers = [room.at(me * size) for room in ranks.words]
        self.token_peers = ranks.tokens.at(me * MOST_ROWS * 16)
        self.turn = torch.zeros(1, dtype=torch.int32, device=ranks.words[0].own.device)
        assert ranks.words[0].own.numel() == each


class PeerRanks:
    """Ranks on GPUs of one host that map each other's memory.

    Args:
        meeting: where they find each other.
        rows: most rows that `add` takes at once; more are taken in turns.
        width: of a row.

    Raises:
        MachineError: the GPUs cannot map each other's memory.
    """

    def __init__(self, meeting: Meeting, rows: int, width: int) -> None:
        self.rank, self.ranks, self.width, self._rows = meeting.rank, meeting.ranks, width, rows
        self._check, store = meeting.check, meeting.store()
        self._counts = Counts(meeting, store)
        self._counts.least(0)
        self.stop = torch.zeros(1, dtype=torch.int32).pin_memory()
        """Not 0: nobody waits any more, and what is computed is void. The host writes it under way."""
        sums, words = rows * width * 2, self.ranks * MOST_ROWS * width // 2 * 8
        sizes = [sums, sums, self.ranks * 4, words, words, self.ranks * MOST_ROWS * 16]
        # what the persistent kernel sends: o, down, the best tokens of at most 256 blocks
        sizes.append(self.ranks * 8 * (2 * width + 2 * 256 + 64))
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGN) * _ALIGN)
        self._memory, addresses = _mapped(starts[-1], meeting, store)
        rooms = [
            Room(self._memory[start : start + size], [address + start for address in addresses])
            for start, size in zip(starts, sizes, strict=False)
        ]
        self._partial, self._total, self._flags, *self.words, self.tokens, self.one = rooms
        self._places = [room.at(0) for room in (self._partial, self._total, self._flags)]
        self._turn = torch.zeros(2, dtype=torch.int32, device=self._memory.device)
        torch.cuda.synchronize()
        self._counts.least(0)  # nobody writes before all have cleared theirs

    def end_waits(self) -> None:
        self.stop[0] = 1

    def check(self) -> None:
        self._check()
        if int(self.stop[0]):
            raise MachineError("a GPU of the tensor-parallel group did not answer for a minute")

    def least(self, value: int) -> int:
        return self._counts.least(value)

    def room(self, rows: int, width: int) -> torch.Tensor | None:
        if rows > self._rows or width != self.width:
            return None
        return self._partial.own.view(torch.bfloat16)[: rows * width].view(rows, width)

    def add(self, partial: torch.Tensor) -> torch.Tensor:
        if len(partial) > self._rows:
            return torch.cat([self.add(part).clone() for part in partial.split(self._rows)])
        n = partial.numel()
        mine = self._partial.own.view(torch.bfloat16)[:n].view_as(partial)
        if partial.data_ptr() != mine.data_ptr():
            mine.copy_(partial)
        self._meet()
        add_up[(triton.cdiv(n, _BLOCK * self.ranks),)](
            *self._places[:2], n, RANK=self.rank, RANKS=self.ranks, BLOCK=_BLOCK, num_warps=8
        )
        self._meet()
        return self._total.own.view(torch.bfloat16)[:n].view_as(partial)

    def _meet(self) -> None:
        meet[(1,)](
            self._places[2], self._flags.own.view(torch.int32), self._turn, self.stop, RANK=self.rank,
            RANKS=self.ranks, num_warps=1,
        )  # fmt: skip

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        rows, columns = part.shape
        most = self._total.own.numel() // (4 * self.ranks * columns)
        if rows > most:
            return torch.cat([self.gather(some) for some in part.split(most)])
        self._meet()
        spread[(triton.cdiv(part.numel(), _BLOCK),)](
            part.contiguous().view(torch.int32), self._places[1], part.numel(), C=columns, RANK=self.rank,
            RANKS=self.ranks, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        self._meet()
        total = self._total.own.view(part.dtype)[: self.ranks * part.numel()]
        return total.view(rows, self.ranks * columns).clone()


def _mapped(size: int, meeting: Meeting, store: Any) -> tuple[torch.Tensor, list[int]]:
    """`size` bytes of zeros on this GPU that all ranks map, and their addresses here, rank by rank."""
    from torch import distributed
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed import _symmetric_memory as symmetric

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    if distributed.is_initialized():
        raise MachineError(
            "this process has run a model on several GPUs before, or is in a group of torch.distributed",
            hint="start a new process: torch lets the GPUs of one process share memory once",
        )
    distributed.init_process_group(
        "gloo", store=PrefixStore("gloo", store), rank=meeting.rank, world_size=meeting.ranks
    )
    group = distributed.group.WORLD
    assert group is not None
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        memory = symmetric.empty(size, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(memory, group.group_name)
    except RuntimeError as error:
        raise MachineError(
            f"the GPUs cannot map each other's memory: {str(error).splitlines()[0]}",
            hint="use GPUs that NVLink or peer access connects, or leave --tensor-parallel out",
        ) from error
    return memory, [int(address) for address in handle.buffer_ptrs]
