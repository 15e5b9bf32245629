"""Entries that may not go when their turn comes: what a queue does with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

Entry = TypeVar("Entry")


def put_back(
    queue: OrderedDict[bytes, Entry], passed: Sequence[tuple[bytes, Entry]], waited: set[bytes], found: bool
) -> None:
    """Put entries that were taken off a queue's head, in this order, where they belong.

    Entries that came in together depend on each other from the first to the last (pages of one prompt), so
    when a victim was found behind them the last one is next in line: what stood on it may be what just went.
    One that has waited like that and still may not go is in use and goes to the end: so each entry is passed
    over twice a round at most, and not once for every victim. Nothing found: all is as it was.

    Args:
        waited: the entries of the queue that were put back at its head before; brought up to date.
    """
    for key, entry in passed if found else reversed(passed):
        queue[key] = entry
        if found and key in waited:
            waited.discard(key)
            continue
        queue.move_to_end(key, last=False)
        if found:
            waited.add(key)
