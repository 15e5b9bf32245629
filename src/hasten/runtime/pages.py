"""How many pages the KV cache has, which of them belong to whom, and which take memory.

A page may have several owners; the last to let go frees it. A page takes memory once something is written to
it, and goes on taking it when it is free: it is reused first. `PageMemory` limits how many pages are written
by what is free on the machine, and gives free pages back to the system when memory runs short.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock, get_ident

from hasten._native import PAGE_TOKENS as PAGE_TOKENS
from hasten.core import EngineOptions, ModelSpec
from hasten.errors import UsageError
from hasten.machine.memory import LOOK_S, MemoryRoom, address_space_left, memory_amount

_USUAL_CONTEXT = 8192
"""Tokens that one sequence is reckoned to take where nobody said how long they are."""
_LEAST_CONTEXT = 512
"""A default context is not cut below this many tokens where memory is short: the model is refused instead."""

_log = logging.getLogger("hasten.runtime")


@dataclass
class CachedSequence:
    """One sequence's place in the KV cache: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    kv_class: str | None = None  # `Executor.kv_class` of its text, computed as prompt; None: not known yet
    weights: int | None = None  # `Executor.weights_version` they were computed with; None: not known yet


@dataclass(frozen=True)
class PageMemory:
    """What stands behind a pool's pages."""

    room: MemoryRoom  # the process's account of what is free
    page_bytes: int
    drop: Callable[[int, int], object]  # (first page, pages): gives memory of consecutive pages back


class PagePool:
    """Free pages, the last freed first: its memory is in use already and still in the processor's cache.

    A page that has several owners is read-only: a sequence writes behind its last token, so whoever shares
    pages shares full ones only, or copies.

    Args:
        pages: how many there are at most.
        page_tokens: tokens a page holds.
        memory: what limits them further; None: they cost nothing (tests, replays).
    """

    def __init__(self, pages: int, page_tokens: int, memory: PageMemory | None = None) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.reclaim: Callable[[int], None] | None = None  # asked for pages when none are free
        self._memory = memory
        self._filled: list[int] = []  # free, and take memory
        self._bare = list(range(pages - 1, -1, -1))  # free, and take none
        self._takes_memory = bytearray(pages)
        self._owners = [0] * pages
        self._unwritten = 0  # owned, and take no memory yet
        self._looked = 0.0
        self._turn = Lock()  # held by who manages pages; free while the model computes
        self._turn.acquire()
        self._computes: int | None = None  # the thread that is inside a step
        if memory is not None:
            memory.room.look()
            memory.room.join(self)

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._filled) + len(self._bare)

    @property
    def usable(self) -> int:
        """Free pages that memory allows to use: those that take some already, those that may be filled."""
        return self._usable(0)

    def _usable(self, beyond: int) -> int:
        """The same where so many bytes of the reserve may be filled too."""
        memory, bare = self._memory, len(self._bare)
        if memory is not None:
            bare = min(bare, max((memory.room.left + beyond) // memory.page_bytes, 0))
        return len(self._filled) + bare

    def held_bytes(self) -> int:
        """Bytes that its pages take."""
        return 0 if self._memory is None else sum(self._takes_memory) * self._memory.page_bytes

    def promised_bytes(self) -> int:
        """Bytes that owned pages will take."""
        return 0 if self._memory is None else self._unwritten * self._memory.page_bytes

    def owners(self, page: int) -> int:
        """How many hold a page."""
        return self._owners[page]

    def ensure(self, pages: int, *, alone: bool = False) -> bool:
        """Whether so many pages are free, or could be made free by giving up what is cached.

        Args:
            alone: they are for the only sequence that runs. It could wait for nobody, so most of the reserve
                is its to fill.
        """
        if pages > self.usable and self._memory is not None:
            self._memory.room.look(LOOK_S / 10)
        if pages > self.usable and self.reclaim is not None:
            self.reclaim(pages - self.usable)
        beyond = self._memory.room.last if alone and self._memory is not None else 0
        return pages <= self._usable(beyond)

    def take(self) -> int:
        """A free page, owned once; only where `ensure` found one."""
        if self._filled:
            page = self._filled.pop()
        else:
            page = self._bare.pop()
            self._count_unwritten(1)
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more owner of a page in use."""
        assert self._owners[page] > 0, "only a page in use can be shared"
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """One owner less."""
        assert self._owners[page] > 0, "a free page was released"
        self._owners[page] -= 1
        if self._owners[page]:
            return
        if self._takes_memory[page]:
            self._filled.append(page)
            return
        self._bare.append(page)
        self._count_unwritten(-1)

    def _count_unwritten(self, pages: int) -> None:
        self._unwritten += pages
        if self._memory is not None:
            self._memory.room.take(pages * self._memory.page_bytes)

    def wrote(self, pages: Iterable[int]) -> None:
        """Something is written to these owned pages: they take memory from now on."""
        for page in pages:
            if not self._takes_memory[page]:
                self._takes_memory[page] = 1
                self._unwritten -= 1

    def look(self) -> int:
        """Now and then, give memory back if the machine is short of it: free pages first, then cached ones.

        Returns:
            Bytes that the reserve lacks still: what is left is in use by sequences.
        """
        if self._memory is None:
            return 0
        room = self._memory.room
        now = room.clock()
        if now - self._looked < room.look_s:
            return 0
        self._looked = now
        room.look(LOOK_S / 8)  # another pool of this process may have looked just now
        return self.give_back()

    def give_back(self) -> int:
        """Give back as much memory as is short now; see `look`."""
        if self._memory is None or (short := self._memory.room.short) == 0:
            return 0
        wanted = -(-short // self._memory.page_bytes)
        if wanted > len(self._filled) and self.reclaim is not None:
            self.reclaim(wanted - len(self._filled))
        given = self._filled[:wanted]  # the longest unused
        del self._filled[:wanted]
        for page in given:
            self._takes_memory[page] = 0
        self._bare += given
        for first, last in _runs(sorted(given)):
            self._drop(first, last)
        self._memory.room.gave(len(given) * self._memory.page_bytes)
        return self._memory.room.low

    def refuse_others(self) -> None:
        """Before pages are taken for a step.

        Raises:
            UsageError: another thread is inside a step.
        """
        if self._computes not in (None, get_ident()):
            raise UsageError(
                "another thread is using this model: it is not for several threads at once",
                hint="load one model for each thread, or share one through "
                "hasten.engine.async_engine.AsyncEngine or `hasten serve`",
            )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a step of the model: nobody manages pages, so `give_back_meanwhile` may.

        Raises:
            UsageError: another thread is inside a step.
        """
        self.refuse_others()
        self._computes = get_ident()
        if self._turn.locked():  # not where Ctrl-C fell into the last lines below
            self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            self._computes = None

    def give_back_meanwhile(self) -> None:
        """From any thread, during a step: `give_back`. A step may take longer than the reserve lasts."""
        if self._turn.acquire(blocking=False):
            try:
                self.give_back()
            finally:
                self._turn.release()

    def _drop(self, first: int, last: int) -> None:
        """Give pages `first` to `last` back, with neighbours that hold nothing: a page need not begin where a
        page of the system does, and what two of them share goes only with both."""
        assert self._memory is not None
        first -= first > 0 and not self._takes_memory[first - 1]
        last += last + 1 < self.pages and not self._takes_memory[last + 1]
        self._memory.drop(first, last - first + 1)

    def grow(self, sequence: CachedSequence, length: int) -> None:
        """Give a sequence pages for `length` tokens.

        Raises:
            UsageError: there are not enough free pages.
        """
        if sequence.length % self.page_tokens:
            last = sequence.pages[sequence.length // self.page_tokens]
            assert self._owners[last] == 1, "a shared page would be written"
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if missing > len(self._filled) and not self.ensure(missing, alone=True):
            raise UsageError(
                f"the KV cache has {self.usable} free pages of {self.page_tokens} tokens, "
                f"{missing} are needed",
                hint="run fewer sequences at once, or give the KV cache more memory: --kv-gb",
            )
        for _ in range(missing):
            sequence.pages.append(self.take())

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget everything past `length` tokens."""
        keep = -(-length // self.page_tokens)
        while len(sequence.pages) > keep:
            self.release(sequence.pages.pop())
        sequence.length = min(sequence.length, length)
        if sequence.length == 0:
            sequence.kv_class = sequence.weights = None


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of the runs of consecutive numbers in a sorted list."""
    ends = [one for one, next_ in pairwise(pages) if next_ != one + 1]
    starts = [next_ for one, next_ in pairwise(pages) if next_ != one + 1]
    return list(zip([*pages[:1], *starts], [*ends, *pages[-1:]], strict=True))


@dataclass(frozen=True)
class KvPlan:
    """How much memory keys and values may take, decided when a model is loaded."""

    context: int  # tokens
    pages: int
    page_bytes: int  # of all layers
    because: str  # what set the number of pages

    @property
    def bytes(self) -> int:
        """Most that the pages may take."""
        return self.pages * self.page_bytes

    @property
    def summary(self) -> str:
        """In one line."""
        tokens = self.pages * PAGE_TOKENS
        return f"{tokens} tokens in at most {self.bytes / 1e9:.2f} GB ({self.because})"


@dataclass(frozen=True)
class Room:
    """Memory that pages may take."""

    bytes: int  # below 0 where not even a step fits
    where: str  # behind "are free": " here", " on the GPU", " of --gpu-memory 20"
    used: int | None = None  # bytes that a limit the user set has to hold beside the pages
    hint: str = "end other programs, or use a smaller model"

    @property
    def said(self) -> str:
        """How much, for messages."""
        return f"{max(0, self.bytes) / 1e9:.2f} GB are free{self.where}"


@dataclass(frozen=True)
class DeviceMemory:
    """A device's own memory, bytes, and what the user said of it."""

    free: int
    whole: int
    held: int  # by this process
    limit: str | float | None = None  # --gpu-memory

    @property
    def left(self) -> int:
        """Bytes that this process may still take."""
        if self.limit is None:
            return self.free
        return min(self.free, memory_amount(self.limit, self.whole, "--gpu-memory") - self.held)

    @property
    def said(self) -> str:
        """How much that is, for messages."""
        return self.room(0).said + f", {self.whole / 1e9:.2f} GB in all"

    def room(self, reserve: int) -> Room:
        """What pages may take where so many bytes must stay free beside them."""
        if self.limit is None or self.left == self.free:
            return Room(self.free - reserve, " on the GPU", hint="close what else runs on the GPU")
        return Room(self.left - reserve, f" of --gpu-memory {self.limit}", self.held + reserve)


def kv_plan(config: ModelSpec, page_bytes: int, options: EngineOptions, room: MemoryRoom) -> KvPlan:
    """Size the pages from what is free now: the weights are in memory already.

    Free is what the system and the control groups leave beside `MemoryRoom.reserve`, what a step computes
    with, and address space. What other models of this process hold in their prefix caches counts as free:
    they give it back when it is needed.

    Args:
        config: the model.
        page_bytes: of a page, all layers.
        options: context, batch limits and `kv_gb`.
        room: the process's account of what is free.

    Raises:
        UsageError: what the options ask for does not fit; the hint says what does.
    """
    context = context_of(options.context, config)
    needed = context if options.context is not None else min(context, _USUAL_CONTEXT)
    free = _free_bytes(room, config, options, -(-needed // PAGE_TOKENS) * page_bytes)
    return plan_pages(config, page_bytes, options, Room(free, " here"))


def plan_pages(
    config: ModelSpec, page_bytes: int, options: EngineOptions, room: Room | None, *, at_once: bool = False
) -> KvPlan:
    """So many pages as `max_sequences` full contexts take, less where memory is short, no less than one's.

    Args:
        room: memory that they may take; None: as much as they need.
        at_once: all of it is taken now, and not page by page: a default context counts as what sequences
            usually take, but for one.

    Raises:
        UsageError: what the options ask for does not fit; the hint says what does.
    """
    if options.max_sequences < 1:
        raise UsageError(
            f"{options.max_sequences} sequences at once",
            hint="use EngineOptions(max_sequences=1) or more",
        )
    tokens, size = PAGE_TOKENS, page_bytes
    context = context_of(options.context, config)
    least = min(_LEAST_CONTEXT, config.context)
    if options.kv_gb is not None:
        held = int(options.kv_gb * 1e9) // size * tokens
        if options.context is None and least <= held < context:
            _log.warning("the context is %d tokens and not %d: --kv-gb holds no more", held, context)
            context = held
        return _wanted_plan(options.kv_gb, KvPlan(context, -(-context // tokens), size, "--kv-gb"), room)
    longest = -(-context // tokens)
    each = min(context, _USUAL_CONTEXT) if at_once and options.context is None else context
    most = max(longest, -(-each // tokens) * options.max_sequences)
    if room is None or room.bytes // size >= most:
        return KvPlan(context, most, size, f"{options.max_sequences} sequences of {each} tokens")
    fitting = max(0, room.bytes // size * tokens)
    if fitting < context:
        if options.context is not None or fitting < least:
            raise UsageError(
                f"keys and values of {context} tokens take {longest * size / 1e9:.2f} GB, {room.said}",
                hint=_what_fits(room, fitting, least, longest * size),
            )
        _log.warning(
            "the context is %d tokens and not %d: keys and values take %.1f KB a token, %s",
            fitting, context, size / tokens / 1e3, room.said,
        )  # fmt: skip
        context = fitting
    return KvPlan(context, room.bytes // size, size, room.said.removesuffix(" here"))


def _what_fits(room: Room, fitting: int, least: int, one: int) -> str:
    """The hint where a context does not fit; `one`: bytes of its keys and values."""
    flags = [f"--context {fitting}"] if fitting >= least else []
    if room.used is not None:
        gib = math.ceil((room.used + one) / (1 << 30) * 100) / 100
        flags.append(f"--gpu-memory {gib:g}GiB")
    return f"use {' or '.join(flags)}" if flags else room.hint


def _free_bytes(room: MemoryRoom, config: ModelSpec, options: EngineOptions, one: int) -> int:
    """Bytes that pages may take; below 0 where not even a step fits. `one`: bytes needed at least."""
    widest = max(block.feed_forward.width for block in config.blocks)
    chunk, widths = options.prefill_chunk, config.width + widest
    step = 4 * (4 * chunk * widths + options.max_sequences * config.vocab)  # float32 rows and logits
    free = room.ask(one + step + room.reserve) + room.held() - room.reserve
    mappable = address_space_left()
    return (free if mappable is None else min(free, mappable - room.reserve)) - step


def _wanted_plan(kv_gb: float, one: KvPlan, room: Room | None) -> KvPlan:
    """The pages that a user asks for; `one` is a single context's plan."""
    pages, least = int(kv_gb * 1e9) // one.page_bytes, math.ceil(one.bytes / 1e7) / 100
    if pages < one.pages:
        raise UsageError(
            f"{kv_gb} GB for keys and values hold {pages * PAGE_TOKENS} tokens, "
            f"less than one context of {one.context}",
            hint=f"use --kv-gb {least} or more, or a smaller --context",
        )
    if room is not None and pages * one.page_bytes > room.bytes:
        fits = math.floor(room.bytes / 1e7) / 100
        raise UsageError(
            f"{kv_gb} GB are asked for keys and values, {room.said}",
            hint=f"use --kv-gb {fits}" if fits >= least else "use a smaller --context, and no --kv-gb",
        )
    return KvPlan(one.context, pages, one.page_bytes, one.because)


def context_of(wanted: int | None, config: ModelSpec) -> int:
    """Longest sequence of an executor, tokens; by default the longest that the model was made for."""
    if wanted is None:
        return config.context
    if wanted < 1:
        raise UsageError(f"a context of {wanted} tokens", hint="use --context 1 or more")
    if wanted > config.context:
        raise UsageError(
            f"a context of {wanted} tokens asked for, the model was made for {config.context}",
            hint=f"use --context {config.context} or less",
        )
    return wanted
