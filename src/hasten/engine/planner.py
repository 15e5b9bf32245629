"""Chooses what a step computes, and sees to its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from hasten.engine.answer import Answer
from hasten.engine.batch import Work
from hasten.engine.keep import PrefixKeeper
from hasten.engine.scheduler import Scheduler
from hasten.engine.speculate import Speculator
from hasten.engine.stats import Counters

if TYPE_CHECKING:
    from hasten.runtime.executor import Executor

log = logging.getLogger(__name__)

_FORCED = 15  # drafts that a grammar forces on one answer: a step's rows stay few


class Planner:
    """A step's work: a token of every answer that decodes, drafts behind it, then prompts up to a budget.

    Args:
        alone: a context for what concerns one answer only; an error inside ends that answer only.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        keeper: PrefixKeeper,
        speculator: Speculator | None,
        counters: Counters,
        alone: Callable[[Answer], AbstractContextManager[None]],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._keeper = keeper
        self._speculator = speculator
        self._counters = counters
        self._alone = alone

    def plan(self) -> list[Work]:
        """Choose the step's work and get its pages; preempts by recompute where there are too few."""
        scheduler = self._scheduler
        if self._keeper.is_stale:
            self.begin_anew()
        for answer in list(scheduler.running):
            with self._alone(answer):
                self._outgrow(answer)
        works = []
        for answer in sorted(scheduler.running, key=scheduler.order):
            ready = answer in scheduler.running and not answer.in_prompt and answer.pending == 1
            with self._alone(answer):
                if ready and self._reserve(answer, 1):
                    works.append(Work.of(answer, 1))
        works = self._running(works)
        scheduler.admit(self._begin, self._preempt, self._keeper.is_reading)
        works = self._running(works)
        self._add_drafts(works)
        works = self._running(works)
        return works + self._chunks(works)

    def begin_anew(self) -> None:
        """A layer was replaced: what is cached is stale. Answers go on from the tokens they have."""
        for answer in list(self._scheduler.running):
            self._preempt(answer)
            self._scheduler.stand_back(answer)
        self._keeper.start_anew()

    def _running(self, works: list[Work]) -> list[Work]:
        """Those whose answers were neither preempted nor ended."""
        return [work for work in works if work.answer in self._scheduler.running]

    def _chunks(self, works: list[Work]) -> list[Work]:
        """What is left to compute of prompts, and of answers that were preempted, up to the step's budget."""
        budget, chunks = self._executor.chunk, []
        decoding = {id(work.answer) for work in works}
        making: set[bytes] = set()
        for answer in sorted(self._scheduler.running, key=self._scheduler.order):
            if budget == 0 or id(answer) in decoding:
                continue
            with self._alone(answer):
                self._keeper.catch_up(answer)
            if answer not in self._scheduler.running:
                continue
            if making.intersection(self._keeper.next_keys(answer, 1)):
                continue  # another one computes the same: it is there in the next step
            known = answer.prompt_tokens - answer.cached.length if answer.in_prompt else answer.pending
            chunks.append(Work.of(answer, min(known, budget)))  # its pages were given when it was admitted
            making.update(self._keeper.next_keys(answer, chunks[-1].count))
            budget -= chunks[-1].count
        return chunks

    def _outgrow(self, answer: Answer) -> None:
        """LongRoPE: past its threshold all of a text is computed anew, as prompt, with other factors."""
        if not self._keeper.outgrows(answer, len(answer.tokens)):
            return
        self._keeper.release(answer)
        answer.prompt_tokens = len(answer.tokens)
        if not self._keeper.begin(answer, alone=len(self._scheduler.running) == 1):
            self._preempt(answer)
            self._scheduler.stand_back(answer)

    def _begin(self, answer: Answer) -> bool:
        others = len(self._scheduler.running)
        begun = True  # an answer that fails here has left the queue: nobody has to make room for it
        with self._alone(answer):
            begun = self._keeper.begin(answer, spare=others, alone=others == 0)
        if not begun:
            return False
        if answer.clock.started is None:
            answer.clock.started = time.perf_counter()
        return True

    def _reserve(self, answer: Answer, tokens: int) -> bool:
        """Pages for so many more tokens; others, and in the end itself, are preempted for them."""
        while not self._keeper.reserve(answer, tokens, alone=len(self._scheduler.running) == 1):
            if self.preempt_last() is answer:
                return False
        return True

    def preempt_last(self) -> Answer:
        """Take the pages of the running answer that goes first; it waits for others."""
        last = self._scheduler.last()
        self._preempt(last)
        self._scheduler.stand_back(last)
        return last

    def _preempt(self, answer: Answer) -> None:
        self._keeper.release(answer)
        answer.preemptions += 1
        self._counters.preemptions += 1
        self._keeper.read_ahead(answer)

    def _add_drafts(self, works: list[Work]) -> None:
        if self._speculator is None or not works:
            return
        for work in works:
            if work.answer.draft is None:
                shared = not work.answer.request.salt  # others' speed must not tell what a salted text says
                work.answer.draft = self._speculator.open(work.answer.tokens, shared=shared)
        rooms = [self._draft_room(work.answer) for work in works]
        try:
            proposals = self._speculator.propose([work.answer.draft for work in works], rooms)
        except Exception:  # answers are the same without drafts
            log.exception("speculation failed and is off from now on")
            self._speculator = None
            return
        for work, drafts, room in zip(works, proposals, rooms, strict=True):
            with self._alone(work.answer):
                self._take_drafts(work, drafts, room)

    def _take_drafts(self, work: Work, drafts: list[int], room: int) -> None:
        grammar = work.answer.grammar
        forced = grammar.forced()[: min(room, _FORCED)] if grammar is not None else []
        drafts = max(drafts, forced, key=len)
        if drafts and self._keeper.reserve(work.answer, 1 + len(drafts)):
            work.drafts = drafts

    def _draft_room(self, answer: Answer) -> int:
        room = max(0, min(answer.left, self._executor.context - len(answer.tokens)) - 1)
        return 0 if self._keeper.outgrows(answer, len(answer.tokens) + room) else room
