"""Greedy decoding that runs ahead: the device feeds itself its own tokens, a step before the host asks.

A `Chain` is a set of sequences that get a token each step after step. While the host delivers the tokens of
one step, the device computes the next: the host's time costs nothing as long as it is shorter than a step.
What was computed ahead for a sequence that ended is thrown away; it was written to places behind the
sequence's end, which whoever owns them next writes before reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from hasten.runtime.gpu.plain import PagedCache, PlainStep, Span, upload
from hasten.runtime.gpu.shape import PAGE

if TYPE_CHECKING:
    from hasten.runtime.executor import Part
    from hasten.runtime.gpu.batch_step import BatchStep
    from hasten.runtime.gpu.persistent import PersistentDecoder
    from hasten.runtime.pages import CachedSequence

SIZES = (1, 2, 4, 8, *range(16, 65, 8), *range(96, 257, 32), *range(320, 513, 64))
"""Rows that graphs of the batched step are made for; others run in the next larger one, some rows idle."""


@dataclass(frozen=True)
class Row:
    """Where a sequence stands: its newest token, not computed yet, and pages up to that token and behind."""

    token: int
    position: int
    pages: Sequence[int]


Move = tuple[int, int, int, int]
"""(row, place in its table, spare page, page): the first token there is in the spare page, which the place
behind gets."""


class Pending:
    """Values on their way to the host, such as the tokens that a step chooses, one a row; -1: no number."""

    def __init__(self, values: torch.Tensor, event: torch.cuda.Event | None = None) -> None:
        self._values, self._event = values, event
        self._read: list[int] | None = None

    def wait(self) -> torch.Tensor:
        """The values, on the host; other threads run until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values

    def read(self) -> list[int]:
        """The same of tokens, kept: the buffer is used again."""
        if self._read is None:
            self._read = self.wait().tolist()
        return self._read


def to_host(tensor: torch.Tensor) -> Pending:
    """A tensor on its way to the host."""
    if not tensor.is_cuda:
        return Pending(tensor)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return Pending(host, event)


class Rows(Protocol):
    """A way to decode: rows that are fed with their own tokens."""

    limit: int  # rows

    def start(self, rows: Sequence[Row]) -> None:
        """Begin with these sequences."""

    def move(self, pages: Sequence[Move]) -> None:
        """Give rows the pages that they own now."""

    def drop(self, rows: Sequence[int]) -> None:
        """These compute nothing more."""

    def launch(self, length: int) -> Pending:
        """A token for every row, none of which has more than `length` tokens then."""


class BatchRows:
    """Up to 512 rows, a graph a size: the batched step."""

    def __init__(self, step: BatchStep, cache: PagedCache) -> None:
        self.step, self.cache, self.count, self.limit = step, cache, 0, step.options.rows
        compile_moves(cache, step.table)

    def start(self, rows: Sequence[Row]) -> None:
        step, m = self.step, self.step.tokens.shape[0]
        self.count = next(size for size in SIZES if size >= len(rows))
        state = np.zeros((m, 2 + step.table.shape[1]), np.int32)
        state[:, 1] = -1
        for row, at in zip(rows, state, strict=False):
            at[:2] = row.token, row.position
            at[2 : 2 + len(row.pages)] = row.pages[: len(at) - 2]
        found = upload(state, step.table.device)
        step.tokens.copy_(found[:, 0])
        step.positions.copy_(found[:, 1])
        step.table.copy_(found[:, 2:])

    def move(self, pages: Sequence[Move]) -> None:
        move_first_tokens(self.cache, self.step.table, pages)

    def drop(self, rows: Sequence[int]) -> None:
        ended = upload(np.array(rows, np.int64), self.step.table.device)
        self.step.positions.index_fill_(0, ended, -1)  # `positions[ended] = -1` waits for the step that runs

    def launch(self, length: int) -> Pending:
        self.step.step(self.count, length)
        return to_host(self.step.tokens)


class OneRow:
    """One row: the persistent kernel, which writes its tokens into the host's memory itself."""

    limit = 1

    def __init__(self, decoder: PersistentDecoder, cache: PagedCache) -> None:
        self.decoder, self.cache = decoder, cache
        compile_moves(cache, decoder.pages[None])

    def start(self, rows: Sequence[Row]) -> None:
        (row,) = rows
        table = self.decoder.pages
        pages = upload(np.array(row.pages[: len(table)], np.int32), table.device)
        table[: len(pages)] = pages
        self.decoder.start(row.token, row.position)

    def move(self, pages: Sequence[Move]) -> None:
        move_first_tokens(self.cache, self.decoder.pages[None], pages)

    def drop(self, rows: Sequence[int]) -> None:
        """See `Rows`."""

    def launch(self, length: int) -> Pending:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.decoder.step()
        event.record()
        return Pending(self.decoder.tokens[length : length + 1], event)


class PlainRows:
    """Any number of rows in plain torch: where there are no kernels, and in tests."""

    limit = 1 << 30

    def __init__(self, step: PlainStep) -> None:
        self.step = step
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._pages: list[list[int]] = []

    def start(self, rows: Sequence[Row]) -> None:
        self._tokens = [row.token for row in rows]
        self._positions = [row.position for row in rows]
        self._pages = [list(row.pages) for row in rows]

    def move(self, pages: Sequence[Move]) -> None:
        for row, place, spare, page in pages:
            self.step.cache.copy([spare], [page])
            self._pages[row][place:] = [page, spare]

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._positions[row] = -1

    def launch(self, length: int) -> Pending:
        live = [row for row, position in enumerate(self._positions) if position >= 0]
        spans = [Span(self._positions[row], 1, self._pages[row]) for row in live]
        ids = np.array([self._tokens[row] for row in live], np.int32)
        chosen = self.step.best(self.step.final(self.step.run(ids, spans))).tolist()
        for row, token in zip(live, chosen, strict=True):
            self._tokens[row], self._positions[row] = token, self._positions[row] + 1
        return Pending(torch.tensor(self._tokens))


@dataclass
class _Link:
    """A sequence of a chain, and what the device knows of it."""

    sequence: CachedSequence
    position: int  # of the token that the newest step takes in
    pages: list[int]  # of its table


class Chain:
    """Sequences that decode together. `pending` is the newest step: asked for, or ahead of what was.

    Args:
        spare: the first of the pages that nobody owns, one a row: where a step ahead begins a page that the
            engine has not given yet.
        most: tokens of the longest sequence.
    """

    def __init__(self, rows: Rows, parts: Sequence[Part], spare: int, most: int) -> None:
        self.rows, self._spare, self._most = rows, spare, most
        self._links = {
            row: _Link(part.sequence, part.sequence.length, part.sequence.pages[: _whole(part.sequence)])
            for row, part in enumerate(parts)
        }
        rows.start(
            [
                Row(part.tokens[0], link.position, [*link.pages, spare + row])
                for part, (row, link) in zip(parts, self._links.items(), strict=True)
            ]
        )
        self.pending = rows.launch(max(p.sequence.length for p in parts) + 1)
        self._fed: Pending | None = None  # the step whose tokens the newest one takes in

    def find(self, parts: Mapping[int, Part]) -> dict[int, int]:
        """Which of these parts (of one token each) the step ahead has computed: their numbers -> rows."""
        if self._fed is None:
            return {}
        rows = {id(link.sequence): row for row, link in self._links.items()}
        found, tokens = {}, self._fed.read()
        for at, part in parts.items():
            row = rows.get(id(part.sequence))
            if row is not None and self._is_as_computed(self._links[row], part, tokens[row]):
                found[at] = row
        return found

    def _is_as_computed(self, link: _Link, part: Part, token: int) -> bool:
        sequence, whole = part.sequence, link.position // PAGE
        if sequence.length != link.position or part.tokens[0] != token:
            return False
        kept = whole + (link.position % PAGE > 0)  # pages with tokens from before; a new one may differ
        return link.pages[:kept] == sequence.pages[:kept]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone; what the step ahead wrote to spare pages moves to the sequences'."""
        wanted = set(rows)
        ended = [row for row in self._links if row not in wanted]
        for row in ended:
            del self._links[row]
        moved = []
        for row, link in self._links.items():
            place = link.position // PAGE
            if link.pages[place] != link.sequence.pages[place]:
                moved.append((row, place, link.pages[place], link.sequence.pages[place]))
                link.pages[place] = link.sequence.pages[place]
        if moved:
            self.rows.move(moved)
        if ended:
            self.rows.drop(ended)

    def run_ahead(self) -> bool:
        """Launch the next step. False: a sequence would outgrow the context."""
        if any(link.position + 2 > self._most for link in self._links.values()):
            return False
        for row, link in self._links.items():
            link.position += 1
            if link.position % PAGE == 0:
                link.pages.append(self._spare + row)
        self._fed = self.pending
        self.pending = self.rows.launch(max(link.position for link in self._links.values()) + 1)
        return True

    def __len__(self) -> int:
        return len(self._links)


def _whole(sequence: CachedSequence) -> int:
    """Pages up to the token that comes next."""
    return sequence.length // PAGE + 1


def move_first_tokens(cache: PagedCache, table: torch.Tensor, pages: Sequence[Move]) -> None:
    """What `Rows.move` does on a GPU: one kernel."""
    from hasten.runtime.gpu.plain_kernels import move_first

    moves = upload(np.array(pages, np.int32), table.device)
    layers, _, heads, _, size = cache.keys.shape
    move_first[(len(pages), layers)](
        moves, table, *cache.arrays, cache.keys.stride(0), SLAB=cache.slab, TABLE=table.shape[1], KV=heads,
        D=size, HEADS=1 << (heads - 1).bit_length(), DIMS=1 << (size - 1).bit_length(), num_warps=4,
    )  # fmt: skip


def compile_moves(cache: PagedCache, table: torch.Tensor) -> None:
    """The kernel of `move_first_tokens` is there: the first page that fills would wait 0.3 s for it.

    A move from a page to itself, written to the end of a table that nobody has begun to use.
    """
    if cache.keys.is_cuda:
        move_first_tokens(cache, table, [(0, table.shape[1] - 1, 0, 0)])
