"""Which pages of the KV cache belong to whom. A page may have several owners; the last to let go frees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hasten.errors import UsageError


@dataclass
class Sequence:
    """One sequence's place in the KV cache: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    is_long: bool = False  # LongRoPE: its keys are rotated by the long factors
    weights: int | None = None  # `CpuExecutor.weights_version` they were computed with; None: not known yet


class PagePool:
    """Free pages, the last freed first: its memory is in use already and still in the processor's cache.

    A page that has several owners is read-only: a sequence writes behind its last token, so whoever shares
    pages shares full ones only, or copies.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.reclaim: Callable[[int], None] | None = None  # asked for pages when none are free
        self._free = list(range(pages - 1, -1, -1))
        self._owners = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many hold a page."""
        return self._owners[page]

    def ensure(self, pages: int) -> bool:
        """Whether so many pages are free, or could be made free by giving up what is cached."""
        if pages > len(self._free) and self.reclaim is not None:
            self.reclaim(pages - len(self._free))
        return pages <= len(self._free)

    def take(self) -> int:
        """A free page, owned once."""
        page = self._free.pop()
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
        if self._owners[page] == 0:
            self._free.append(page)

    def grow(self, sequence: Sequence, length: int) -> None:
        """Give a sequence pages for `length` tokens.

        Raises:
            UsageError: there are not enough free pages.
        """
        if sequence.length % self.page_tokens:
            last = sequence.pages[sequence.length // self.page_tokens]
            assert self._owners[last] == 1, "a shared page would be written"
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if missing > len(self._free) and not self.ensure(missing):
            raise UsageError(
                f"the KV cache has {len(self._free)} free pages of {self.page_tokens} tokens, "
                f"{missing} are needed",
                hint="run fewer sequences at once, or load the model with a larger context",
            )
        for _ in range(missing):
            sequence.pages.append(self.take())

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget everything past `length` tokens."""
        keep = -(-length // self.page_tokens)
        while len(sequence.pages) > keep:
            self.release(sequence.pages.pop())
        sequence.length = min(sequence.length, length)
        sequence.is_long = sequence.is_long and sequence.length > 0
        sequence.weights = sequence.weights if sequence.length > 0 else None
