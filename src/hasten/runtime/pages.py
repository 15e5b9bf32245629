"""Which pages of the KV cache belong to whom."""

from __future__ import annotations

from dataclasses import dataclass, field

from hasten.errors import UsageError


@dataclass
class Sequence:
    """One sequence's place in the KV cache: its pages in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    is_long: bool = False  # LongRoPE: its keys are rotated by the long factors


class PagePool:
    """Free pages, the last freed first: its memory is in use already and still in the processor's cache."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def grow(self, sequence: Sequence, length: int) -> None:
        """Give a sequence pages for `length` tokens.

        Raises:
            UsageError: there are not enough free pages.
        """
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if missing > len(self._free):
            raise UsageError(
                f"the KV cache has {len(self._free)} free pages of {self.page_tokens} tokens, "
                f"{missing} are needed",
                hint="run fewer sequences at once, or load the model with a larger context",
            )
        for _ in range(missing):
            sequence.pages.append(self._free.pop())

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget everything past `length` tokens."""
        keep = -(-length // self.page_tokens)
        while len(sequence.pages) > keep:
            self._free.append(sequence.pages.pop())
        sequence.length = min(sequence.length, length)
        sequence.is_long = sequence.is_long and sequence.length > 0
