"""Which requests are taken on, which answer runs next, and what each step computes.

Sources: continuous batching with chunked prompts and preemption by recompute as in vLLM; fairness between
clients by virtual token counters, Sheng et al., "Fairness in serving large language models" (OSDI 2024).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

from hasten.core import ServingOptions
from hasten.engine.answer import Answer
from hasten.engine.keep import PrefixKeeper
from hasten.engine.request import EngineStats, Request
from hasten.engine.speculate import Speculator
from hasten.errors import DeadlineError, QueueFull, UsageError
from hasten.runtime.executor import NO_FAULTS, Draw, Executor, Part, Scored, token_ids
from hasten.runtime.sampling import Masks

if TYPE_CHECKING:
    from hasten.engine.loaded import LoadedModel


log = logging.getLogger(__name__)

Order = tuple[float, float, float, float, int]

_FORCED = 15  # drafts that a grammar forces on one answer: a step's rows stay few
PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0  # the paper's weights: an answer's token costs more than a prompt's
_MOST_DEBT = 2048.0  # weighted tokens that others get at most before a client that had much gets some
_MOST_COUNTERS = 8192  # of keys and of their users
_NEW = 0.2  # weight of the newest measurement
_OUTLIER = 4.0  # it counts at most as so many times what was expected: the machine may have been stopped
_DOUBT = 0.9


class FairShare:
    """Weighted tokens computed for each client; the one with the least goes first.

    A client `KEY/USER` counts for its key first: a key gets no more of the machine by naming many users, and
    its users share what it gets.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last = ""  # the client served last: a new client that is alone begins with its counter

    def join(self, client: str, active: Iterable[str]) -> None:
        """A client asks again: it gets no credit for the time it did not ask, and its debt is bounded."""
        there, key = list(active), _group(client)
        self._level(key, [_group(one) for one in there], _group(self._last))
        self._level(_user(client), [_user(one) for one in there if _group(one) == key], _user(self._last))
        while len(self._served) > _MOST_COUNTERS:
            del self._served[next(iter(self._served))]

    def _level(self, name: str, others: Sequence[str], last: str) -> None:
        """Raise a counter to the least of those that are there, or to that of who was served last."""
        floor = min(map(self.of, others), default=self.of(last))
        self._served[name] = min(max(self._served.pop(name, 0.0), floor), floor + _MOST_DEBT)

    def serve(self, client: str, prompt: int, answer: int) -> None:
        """So many tokens were computed for a client."""
        self._last = client
        cost, served = PROMPT_WEIGHT * prompt + ANSWER_WEIGHT * answer, self._served
        for one in _counters(client):
            served[one] = served.get(one, 0.0) + cost

    def of(self, name: str) -> float:
        """The counter of a key, or of one of its users (`KEY/USER`; `KEY/` is who names no user)."""
        return self._served.get(name, 0.0)

    def order(self, client: str) -> tuple[float, float]:
        """Sorts clients, the one with the least first: by their keys, then within a key."""
        group, user = _counters(client)
        return self.of(group), self.of(user)


def _group(client: str) -> str:
    """The key or address of a client that names a user too."""
    return client.partition("/")[0]


def _user(client: str) -> str:
    """Who asks below a key: all that name no user count together, beside those that do."""
    return client if "/" in client else f"{client}/"


@lru_cache(_MOST_COUNTERS)
def _counters(client: str) -> tuple[str, str]:
    """The counters of a client: its key's, and its own below that. Every token asks for them."""
    return _group(client), _user(client)


class Scheduler:
    """Answers in order: higher priority first, then the earliest deadline, the client who had least, arrival.

    Args:
        slots: answers that may run together.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: list[Answer] = []
        self.running: dict[Answer, None] = {}  # in the order they came; a set would have none
        self.departures = 0  # answers that ended, or were preempted, while they ran
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
        return (-request.priority, deadline, *self.share.order(request.client), self._arrival[id(answer)])

    def in_order(self) -> list[Answer]:
        """Running answers, the first to run first."""
        return sorted(self.running, key=self.order)

    def admit(
        self,
        begin: Callable[[Answer], bool],
        preempt: Callable[[Answer], None],
        is_reading: Callable[[Answer], bool],
    ) -> None:
        """Move answers from waiting to running while there is room.

        Args:
            begin: gets an answer its pages; False if there are not enough, and then no other answer overtakes
                it. An answer that fails in it has left the queue.
            preempt: takes a running answer's pages and makes it wait; called for those of a lower priority
                while slots or pages lack.
            is_reading: whether an answer waits for pages from disk; others may go first meanwhile.
        """

        def priority(answer: Answer) -> int:
            return answer.request.priority

        while self.waiting:
            full = len(self.running) >= self.slots
            if full and max(map(priority, self.waiting)) <= min(map(priority, self.running)):
                return  # the usual case: the waiting answers need no sorting
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
            if first in self.waiting:
                self.waiting.remove(first)
                self.running[first] = None

    def join(self, answer: Answer) -> None:
        """An answer runs at once: it shares another's prompt and there is a free slot."""
        self._arrival[id(answer)] = next(self._arrivals)
        self.running[answer] = None

    def stand_back(self, answer: Answer) -> None:
        """A running answer waits again; it keeps its place in the order."""
        del self.running[answer]
        self.departures += 1
        self.waiting.append(answer)

    def last(self) -> Answer:
        """The running answer that is preempted first."""
        return max(self.running, key=self.order)

    def leave(self, answer: Answer) -> None:
        """An answer ended."""
        self.running.pop(answer, None)
        self.departures += 1
        if answer in self.waiting:
            self.waiting.remove(answer)
        self._arrival.pop(id(answer), None)


class Forecast:
    """Running means of a prompt token's and a decode step's time."""

    def __init__(self) -> None:
        self.prefill_s: float | None = None  # a prompt token
        self._decode_s: dict[int, float] = {}  # a step, by sequences in it

    def observe(self, prompt_tokens: int, sequences: int, seconds: float) -> None:
        """A step computed so many prompt tokens beside one token of each of `sequences`."""
        if prompt_tokens == 0:
            self._decode_s[sequences] = _mix(self._decode_s.get(sequences), seconds)
            return
        rest = seconds - (self.decode_s(sequences) or 0.0 if sequences else 0.0)
        if rest > 0:
            self.prefill_s = _mix(self.prefill_s, rest / prompt_tokens)

    def decode_s(self, sequences: int) -> float | None:
        """Seconds of a decode step, measured with the nearest number of sequences; None before the first."""
        if not self._decode_s:
            return None
        if sequences in self._decode_s:
            return self._decode_s[sequences]
        nearest = min(self._decode_s, key=lambda n: (abs(n - sequences), n))
        return self._decode_s[nearest]

    def finish_s(self, prompt_tokens: int, steps: int, sequences: int) -> float | None:
        """Seconds for so many prompt tokens and then decode steps; None: nothing measured yet."""
        step = self.decode_s(sequences)
        if self.prefill_s is None or step is None:
            return None
        return prompt_tokens * self.prefill_s + steps * step

    def doubt(self) -> None:
        """Believe a little less in slowness: what is refused is never measured."""
        self.prefill_s = None if self.prefill_s is None else _DOUBT * self.prefill_s
        self._decode_s = {sequences: _DOUBT * s for sequences, s in self._decode_s.items()}


def _mix(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * min(new, _OUTLIER * old)


class Admission:
    """Refuses at once, with the reason, a request that would fail later."""

    def __init__(
        self,
        model: LoadedModel,
        options: ServingOptions,
        scheduler: Scheduler,
        forecast: Forecast,
        keeper: PrefixKeeper,
    ) -> None:
        self._model = model
        self._options = options
        self._scheduler = scheduler
        self._forecast = forecast
        self._keeper = keeper  # knows how much of a prompt need not be computed
        self._made = count(1)

    def check(self, request: Request, taken: Container[str]) -> Request:
        """The request as it will run: with an id, its answer no longer than the context leaves room for.

        Raises:
            UsageError, QueueFull, DeadlineError: see `Engine.add`.
        """
        if request.id in taken:
            raise UsageError(f"a request with the id {request.id!r} is running", hint="give each its own id")
        prompt = self.prompt_of(request)
        waiting = len(self._scheduler.waiting)
        if waiting >= self._options.max_waiting:
            raise QueueFull(
                f"{waiting} requests wait already, the most that may",
                hint="ask again later, or raise --max-waiting",
                retry_after_s=self._next_place_s(),
            )
        self._check_deadline(request)
        return replace(
            request,
            prompt=prompt,
            id=request.id or f"request-{next(self._made)}",
            max_new_tokens=min(request.max_new_tokens, self._model.context - len(prompt)),
        )

    def prompt_of(self, request: Request) -> tuple[int, ...]:
        """The prompt's token ids, checked.

        Raises:
            UsageError: what is no token id, or a prompt that leaves no room in the context for an answer.
        """
        context, config = self._model.context, self._model.config
        length, asked = len(request.prompt), request.max_new_tokens
        if length + min(asked, 1) > context:
            needed, most = length + max(asked, 1), config.context
            longer = f" or load the model with --context {needed} or more" if needed <= most else ""
            raise UsageError(
                f"the prompt has {length} tokens, the context holds {context} with the answer",
                hint=f"shorten the prompt{longer} (the model was made for {most} tokens)",
            )
        return tuple(token_ids(request.prompt, config.vocab).tolist())

    def _next_place_s(self) -> float:
        """When the first running answer is likely to end, at least a second."""
        running = self._scheduler.running
        steps = min((answer.left for answer in running), default=0)
        return max(1.0, self._forecast.finish_s(0, steps, len(running)) or 1.0)

    def _check_deadline(self, request: Request) -> None:
        if request.deadline_ms is None:
            return
        seconds = self._finish_s(request)
        if seconds is not None and 1000 * seconds > request.deadline_ms:
            if not self._scheduler.running:
                self._forecast.doubt()
            raise DeadlineError(
                f"the answer would take about {1000 * seconds:.0f} ms, "
                f"its deadline is {request.deadline_ms:g} ms",
                hint="ask for fewer new tokens, or give more time",
            )

    def _finish_s(self, request: Request) -> float | None:
        """Seconds until a new request is done if it gets all tokens it asks for; None: nothing measured yet.

        Counted are the prompts that go before it, what is left of the shortest running answer if all places
        are taken, its own prompt and its own steps among as many others as may run. Of prompts that wait,
        what others have computed is left out; it may be evicted meanwhile.
        """
        scheduler = self._scheduler
        ahead = [
            one
            for one in scheduler.answers()
            if one.request.priority > request.priority
            or (one.request.priority == request.priority and one.request.deadline_ms is not None)
            or one in scheduler.running
        ]
        own = len(request.prompt) - self._keeper.known(request)
        prompts = own + sum(map(self._prompt_left, ahead))
        full = len(ahead) >= scheduler.slots
        wait = min((one.left for one in scheduler.running), default=0) if full else 0
        sequences = min(scheduler.slots, len(ahead) + 1)
        return self._forecast.finish_s(prompts, wait + request.max_new_tokens, sequences)

    def _prompt_left(self, answer: Answer) -> int:
        """Tokens of an answer that are to be computed before it gets new ones."""
        if answer in self._scheduler.running:
            return max(0, answer.prompt_tokens - answer.cached.length)
        return len(answer.tokens) - self._keeper.known_of(answer)

    def is_late(self, answer: Answer, now: float) -> bool:
        """Whether an answer's deadline is over, or cannot be kept though it still waits."""
        if answer.request.deadline_ms is None:
            return False
        if now >= answer.deadline or answer.tally.started is not None:
            return now >= answer.deadline
        needed = self._forecast.finish_s(self._prompt_left(answer), answer.left, 1)
        return needed is not None and now + needed > answer.deadline


class Alone:
    """A context for what concerns one answer: an error inside ends this answer, and all others go on.

    Panics of native libraries, which are no `Exception`, are caught too.

    Args:
        fail: ends the answer because of an error.
    """

    __slots__ = ("_answer", "_fail")

    def __init__(self, answer: Answer, fail: Callable[[Answer, BaseException], None]) -> None:
        self._answer = answer
        self._fail = fail

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, wrong: BaseException | None, trace: object) -> bool:
        if wrong is None or isinstance(wrong, NO_FAULTS):
            return False
        self._fail(self._answer, wrong)
        return True


@dataclass(slots=True)
class Work:
    """The work for one answer in a step: `count` known tokens, and drafts behind them to verify."""

    answer: Answer
    count: int
    is_prompt: bool
    completes: bool  # all its known tokens are computed then: a token can be drawn
    drafts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, answer: Answer, count: int) -> Work:
        """The next `count` tokens of an answer, which are all prompt or all not."""
        return cls(answer, count, answer.in_prompt, count == answer.pending)

    def drawn(self) -> list[Answer]:
        """The answers that get a token from its last row: its own, and siblings that wait for the prompt."""
        if not self.completes or self.answer.request.max_new_tokens == 0:
            return []
        return [self.answer, *self.answer.siblings]

    def part(self, masks: Callable[[], Masks] | None) -> Part:
        """This work as the executor takes it. `masks`: gives the masks of the answer itself."""
        answer, done = self.answer, self.answer.cached.length
        request = answer.request
        draws = [
            Draw(
                one.sampler,
                len(answer.tokens),
                request.logprobs,
                masks if one is answer else one.masks if one.is_bound else None,
            )
            for one in self.drawn()
        ]
        every = self.is_prompt and answer.results.every_row
        hidden = 0
        if every and request.pooling == "mean":
            hidden = self.count
        elif self.completes and request.pooling == "last":
            hidden = 1
        return Part(
            answer.cached,
            answer.tokens[done : done + self.count],
            self.is_prompt,
            self.drafts,
            tuple(draws),
            hidden,
            self._scored(done) if every else None,
        )

    def _scored(self, done: int) -> Scored | None:
        """The prompt's tokens to score in this step; those scored before a preemption are left out."""
        request, first = self.answer.request, max(done, self.answer.results.read_tokens)
        targets = request.prompt[first + 1 : done + self.count + 1]
        if request.prompt_logprobs is None or not targets:
            return None
        return Scored(first - done, tuple(targets), request.prompt_logprobs)


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
        counters: EngineStats,
        alone: Callable[[Answer], Alone],
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
            if self._keeper.outgrows(answer, len(answer.tokens)):
                with self._alone(answer):
                    self._outgrow(answer)
        departures = scheduler.departures
        works = self._decodes()
        scheduler.admit(self._begin, self._preempt, self._keeper.is_reading)
        if scheduler.departures != departures:
            works = self._running(works)
        departures = scheduler.departures
        self._add_drafts(works)
        if scheduler.departures != departures:
            works = self._running(works)
        return works + self._chunks(works)

    def _decodes(self) -> list[Work]:
        """A token of every answer whose prompt is computed, as far as there are pages."""
        works = []
        for answer in self._scheduler.in_order():
            if answer.in_prompt or answer.pending != 1 or answer not in self._scheduler.running:
                continue
            if self._keeper.has_room(answer):  # the usual case: one token in 32 needs a new page
                works.append(Work(answer, 1, is_prompt=False, completes=True))
                continue
            with self._alone(answer):
                if self._reserve(answer, 1):
                    works.append(Work(answer, 1, is_prompt=False, completes=True))
        return works

    def begin_anew(self) -> None:
        """A layer was replaced: what is cached is stale. Answers go on from the tokens they have."""
        for answer in list(self._scheduler.running):
            self._preempt(answer)
        self._keeper.start_anew()

    def _running(self, works: list[Work]) -> list[Work]:
        """The works whose answers were neither preempted nor ended."""
        return [work for work in works if work.answer in self._scheduler.running]

    def _chunks(self, works: list[Work]) -> list[Work]:
        """The next tokens of prompts and of preempted answers, up to the step's budget."""
        if len(works) == len(self._scheduler.running):
            return []  # the usual step: all decode
        budget, chunks = self._executor.chunk, []
        decoding = {id(work.answer) for work in works}
        making: set[bytes] = set()
        for answer in self._scheduler.in_order():
            if budget == 0 or id(answer) in decoding:
                continue
            with self._alone(answer):
                self._keeper.catch_up(answer)
            if answer not in self._scheduler.running:
                continue
            if making.intersection(self._keeper.next_keys(answer, 1)):
                continue  # another answer computes the same page: it is there in the next step
            known = answer.prompt_tokens - answer.cached.length if answer.in_prompt else answer.pending
            chunks.append(Work.of(answer, min(known, budget)))  # its pages were given when it was admitted
            making.update(self._keeper.next_keys(answer, chunks[-1].count))
            budget -= chunks[-1].count
        return chunks

    def _outgrow(self, answer: Answer) -> None:
        """LongRoPE: past its threshold all of a text is computed anew, as prompt, with other factors."""
        self._keeper.release(answer)
        answer.prompt_tokens = len(answer.tokens)
        if not self._keeper.begin(answer, alone=len(self._scheduler.running) == 1):
            self._preempt(answer)

    def _begin(self, answer: Answer) -> bool:
        others = len(self._scheduler.running)
        begun = True  # an answer that fails here has left the queue: no other has to make room for it
        with self._alone(answer):
            begun = self._keeper.begin(answer, spare=others, alone=others == 0)
        if not begun:
            return False
        if answer.tally.started is None:
            answer.tally.started = time.perf_counter()
        return True

    def _reserve(self, answer: Answer, tokens: int) -> bool:
        """Pages for so many more tokens; others, and in the end itself, are preempted for them."""
        while not self._keeper.reserve(answer, tokens, alone=len(self._scheduler.running) == 1):
            if self.preempt_last() is answer:
                return False
        return True

    def preempt_last(self) -> Answer:
        """Preempt the running answer that comes last in the order."""
        last = self._scheduler.last()
        self._preempt(last)
        return last

    def _preempt(self, answer: Answer) -> None:
        """Take a running answer's pages; it waits again."""
        self._keeper.release(answer)
        self._scheduler.stand_back(answer)
        answer.tally.preemptions += 1
        self._counters.preemptions += 1
        self._keeper.read_ahead(answer)

    def _add_drafts(self, works: list[Work]) -> None:
        if self._speculator is None or not works:
            return
        for work in works:
            if work.answer.draft is None:
                shared = not work.answer.request.salt  # how fast others are must not tell a salted text
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
