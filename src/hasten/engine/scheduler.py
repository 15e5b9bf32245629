"""Who waits, who runs, who goes next and who has to make room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from hasten.engine.answer import Answer
from hasten.engine.fair_share import FairShare

Order = tuple[float, float, float, int]


class Scheduler:
    """Answers in order: higher priority first, then the earliest deadline, the client who had least, arrival.

    Args:
        slots: answers that may run together.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: list[Answer] = []
        self.running: list[Answer] = []
        self.share = FairShare()
        self._arrivals = count()
        self._arrival: dict[int, int] = {}  # id of an answer -> its number

    def answers(self) -> Iterator[Answer]:
        """All of them, running first."""
        yield from self.running
        yield from self.waiting

    def arrive(self, answer: Answer) -> None:
        """A new answer waits."""
        self.share.join(answer.request.client, {one.request.client for one in self.answers()})
        self._arrival[id(answer)] = next(self._arrivals)
        self.waiting.append(answer)

    def order(self, answer: Answer) -> Order:
        """Sorts answers, the first to run first."""
        request = answer.request
        deadline = float("inf") if request.deadline_ms is None else answer.deadline
        return (-request.priority, deadline, self.share.of(request.client), self._arrival[id(answer)])

    def admit(
        self,
        begin: Callable[[Answer], bool],
        preempt: Callable[[Answer], None],
        is_reading: Callable[[Answer], bool],
    ) -> None:
        """Move answers from waiting to running while there is room.

        Args:
            begin: gets an answer its pages; False if there are not enough, and then nobody overtakes it. An
                answer that fails in it has left the queue.
            preempt: takes an answer's pages; called for those of a lower priority while slots or pages lack.
            is_reading: whether an answer waits for pages from disk; others may go first meanwhile.
        """
        while self.waiting:
            full = len(self.running) >= self.slots
            if full and max(map(_priority, self.waiting)) <= min(map(_priority, self.running)):
                return  # the usual case, before hundreds that wait are put in order
            able = list(self.waiting)
            while able and is_reading(first := min(able, key=self.order)):
                able.remove(first)
            if not able:
                return
            while len(self.running) >= self.slots or not begin(first):
                last = max(self.running, key=self.order, default=first)
                if last.request.priority >= first.request.priority:
                    return
                preempt(last)
                self.stand_back(last)
            if first in self.waiting:
                self.waiting.remove(first)
                self.running.append(first)

    def join(self, answer: Answer) -> None:
        """An answer runs at once: it shares another's prompt and there is a free slot."""
        self._arrival[id(answer)] = next(self._arrivals)
        self.running.append(answer)

    def stand_back(self, answer: Answer) -> None:
        """A running answer waits again; it keeps its place in the order."""
        self.running.remove(answer)
        self.waiting.append(answer)

    def last(self) -> Answer:
        """The running answer that goes first when room is needed."""
        return max(self.running, key=self.order)

    def leave(self, answer: Answer) -> None:
        """An answer ended."""
        for place in (self.running, self.waiting):
            if answer in place:
                place.remove(answer)
        self._arrival.pop(id(answer), None)


def _priority(answer: Answer) -> int:
    return answer.request.priority
