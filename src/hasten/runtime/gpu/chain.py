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

SIZES = (1, 2, 4, 8, *range(16, 65, 8), *range(96, 257, 32))
"""Rows that graphs of the batched step are made for; others run in the next larger one, some rows idle."""


@dataclass(frozen=True)
class Row:
    """Where a sequence stands: its newest token, not computed yet, and the pages up to that token."""

    token: int
    position: int
    pages: Sequence[int]


class Pending:
    """Values on their way to the host, such as the tokens that a step chooses, one a row."""

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
        ...

    def change(self, pages: Sequence[tuple[int, int, int]], ended: Sequence[int] = ()) -> None:
        """Put pages into tables: (row, place in its table, page); rows that ended compute nothing more."""
        ...

    def launch(self, length: int) -> Pending:
        """A token for every row, none of which has more than `length` tokens then."""
        ...


class BatchRows:
    """Up to 256 rows, a graph a size: the batched step."""

    def __init__(self, step: BatchStep) -> None:
        self.step, self.count, self.limit = step, 0, step.options.rows

    def start(self, rows: Sequence[Row]) -> None:
        """See `Rows`."""
        step, m = self.step, self.step.tokens.shape[0]
        self.count = next(size for size in SIZES if size >= len(rows))
        state = np.zeros((m, 2 + step.table.shape[1]), np.int32)
        state[:, 1] = -1
        for row, at in zip(rows, state, strict=False):
            at[:2] = row.token, row.position
            at[2 : 2 + len(row.pages)] = row.pages
        found = upload(state, step.table.device)
        step.tokens.copy_(found[:, 0])
        step.positions.copy_(found[:, 1])
        step.table.copy_(found[:, 2:])

    def change(self, pages: Sequence[tuple[int, int, int]], ended: Sequence[int] = ()) -> None:
        """See `Rows`."""
        step = self.step
        if pages:
            row, place, page = upload(np.array(pages, np.int64).T.copy(), step.table.device)
            step.table[row, place] = page.int()
        if ended:
            step.positions[upload(np.array(ended, np.int64), step.table.device)] = -1

    def launch(self, length: int) -> Pending:
        """See `Rows`."""
        self.step.step(self.count, length)
        return to_host(self.step.tokens)


class OneRow:
    """One row: the persistent kernel, which writes its tokens into the host's memory itself."""

    limit = 1

    def __init__(self, decoder: PersistentDecoder) -> None:
        self.decoder = decoder

    def start(self, rows: Sequence[Row]) -> None:
        """See `Rows`."""
        (row,) = rows
        self.decoder.pages[: len(row.pages)] = upload(
            np.array(row.pages, np.int32), self.decoder.pages.device
        )
        self.decoder.start(row.token, row.position)

    def change(self, pages: Sequence[tuple[int, int, int]], ended: Sequence[int] = ()) -> None:
        """See `Rows`."""
        for _, place, page in pages:
            self.decoder.pages[place] = page

    def launch(self, length: int) -> Pending:
        """See `Rows`."""
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
        """See `Rows`."""
        self._tokens = [row.token for row in rows]
        self._positions = [row.position for row in rows]
        self._pages = [list(row.pages) for row in rows]

    def change(self, pages: Sequence[tuple[int, int, int]], ended: Sequence[int] = ()) -> None:
        """See `Rows`."""
        for row, place, page in pages:
            self._pages[row][place : place + 1] = [page]
        for row in ended:
            self._positions[row] = -1

    def launch(self, length: int) -> Pending:
        """See `Rows`."""
        live = [row for row, position in enumerate(self._positions) if position >= 0]
        spans = [Span(self._positions[row], 1, self._pages[row]) for row in live]
        ids = np.array([self._tokens[row] for row in live], np.int32)
        chosen = self.step.logits(self.step.final(self.step.run(ids, spans))).argmax(-1).tolist()
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

    def __init__(self, rows: Rows, parts: Sequence[Part], cache: PagedCache, spare: int, most: int) -> None:
        self.rows, self._cache, self._spare, self._most = rows, cache, spare, most
        self._links = {
            row: _Link(part.sequence, part.sequence.length, list(part.sequence.pages))
            for row, part in enumerate(parts)
        }
        self.width = len(parts)
        rows.start([Row(p.tokens[0], p.sequence.length, p.sequence.pages) for p in parts])
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
        self._cache.copy([old for _, _, old, _ in moved], [new for *_, new in moved])
        self.rows.change([(row, place, new) for row, place, _, new in moved], ended)

    def run_ahead(self) -> bool:
        """Launch the next step. False: a sequence would outgrow the context."""
        if any(link.position + 2 > self._most for link in self._links.values()):
            return False
        begun = []
        for row, link in self._links.items():
            link.position += 1
            place, given = link.position // PAGE, link.sequence.pages
            if link.position % PAGE == 0:
                link.pages[place:] = [given[place] if place < len(given) else self._spare + row]
                begun.append((row, place, link.pages[place]))
        if begun:
            self.rows.change(begun)
        self._fed = self.pending
        self.pending = self.rows.launch(max(link.position for link in self._links.values()) + 1)
        return True

    def __len__(self) -> int:
        return len(self._links)
