"""The engine for many requests at once: every step computes a little of each."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.core import ServingOptions
from hasten.engine.answer import Answer, rules_of
from hasten.engine.keep import PrefixKeeper
from hasten.engine.request import EngineStats, FinishReason, Output, Request
from hasten.engine.scheduler import Admission, Alone, Forecast, Planner, Scheduler, Work
from hasten.engine.speculate import Speculator
from hasten.errors import HastenError
from hasten.runtime.executor import NO_FAULTS, PartResult
from hasten.runtime.sampling import Choice, Masks

if TYPE_CHECKING:
    from hasten.engine.grammar_compiler import GrammarCompiler
    from hasten.engine.loaded import LoadedModel

log = logging.getLogger(__name__)

_DISK_WAIT_S = 0.005  # a wait for pages from disk while nothing can run; a request that comes then waits too


class Engine:
    """Runs many requests on one model: continuous batching, chunked prefill, prefix cache, speculation.

    Nothing about a request's answer depends on what else runs: not on batch, chunks, preemption, what was
    cached or drafted. One thread at a time; `hasten.engine.async_engine.AsyncEngine` is for servers.

    Args:
        model: the caller closes it, and must not run it otherwise while the engine has requests.
        options: caches, speculation, queue.

    Raises:
        UsageError: another engine's prefix cache is open on this model.
    """

    def __init__(self, model: LoadedModel, options: ServingOptions | None = None) -> None:
        self.model = model
        self.options = options or ServingOptions()
        self.counters = EngineStats()
        self.forecast = forecast = Forecast()
        self._executor = model.executor
        self._scheduler = Scheduler(model.options.max_sequences)
        self._speculator = Speculator() if self.options.speculate else None
        self._keeper = PrefixKeeper(model, self.options, self.counters, lambda: forecast.prefill_s)
        self._admission = Admission(model, self.options, self._scheduler, forecast, self._keeper)
        self._planner = Planner(
            self._executor, self._scheduler, self._keeper, self._speculator, self.counters, self._alone
        )
        self._grammars: GrammarCompiler | None = None
        self._mask_maker = ThreadPoolExecutor(1, thread_name_prefix="hasten-masks")
        self._answers: dict[str, list[Answer]] = {}  # by request, until all of them ended
        self._mail: dict[str, deque[Output]] = {}  # of requests that are streamed
        self._unclaimed: list[Output] = []
        # an engine that is dropped gives its pages back too
        self._dropped = weakref.finalize(self, self._keeper.close)
        self._dropped.atexit = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What comes in ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> str:
        """Take a request on.

        Returns:
            Its id, which its Outputs carry.

        Raises:
            UsageError: the prompt does not fit, an id is in use or a grammar cannot be read.
            QueueFull: `max_waiting` requests wait already.
            DeadlineError: it would not be done in its time.
        """
        self.counters.requests += 1
        try:
            request = self._admission.check(request, self._answers)
            answers = self._answers_of(request)
        except HastenError:
            self.counters.refused += 1
            raise
        answers[0].siblings = answers[1:]
        self._answers[request.id] = answers
        self._mail.pop(request.id, None)  # of an earlier request with this id, which has ended
        self._scheduler.arrive(answers[0])
        self._keeper.read_ahead(answers[0])
        return request.id

    def _answers_of(self, request: Request) -> list[Answer]:
        start = self.compiler().compile(request.grammar).start if request.grammar else None
        tokenizer, vocab = self.model.tokenizer, self.model.config.vocab
        rules = rules_of(request, tokenizer.eos_ids, vocab)
        now = time.perf_counter()
        return [
            Answer(request, index, now, tokenizer, vocab, start() if start else None, rules)
            for index in range(request.n)
        ]

    def compiler(self) -> GrammarCompiler:
        """The compiler of grammars for this model, built for the first one."""
        if self._grammars is None:
            from hasten.engine.grammar_compiler import GrammarCompiler

            self._grammars = GrammarCompiler(self.model.tokenizer, self.model.config.vocab)
        return self._grammars

    def cancel(self, request_id: str) -> bool:
        """Stop a request; its Outputs end with finish_reason "cancelled". False: there is none of that id."""
        answers = self._answers.get(request_id)
        if answers is None:
            return False
        self.counters.cancelled += 1
        now = time.perf_counter()
        self._post([self._end(answer, answer.output(now, finish="cancelled")) for answer in list(answers)])
        return True

    # One step -----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step has work to do or outputs to give."""
        return bool(self._answers or self._unclaimed)

    def step(self) -> list[Output]:
        """Compute a little of every running request: prompt chunks and answer tokens, mixed.

        Returns:
            New outputs, also of requests that were cancelled since the last step.
        """
        self._post(self._advance())
        return self.news()

    def news(self) -> list[Output]:
        """Outputs that nobody has taken yet, without a step."""
        outputs, self._unclaimed = self._unclaimed, []
        return outputs

    def _advance(self) -> list[Output]:
        started = time.perf_counter()
        self.spare_memory()
        outputs = self._refuse_late(started)
        works = self._planner.plan()
        if not works:
            return outputs + self._end_stuck(started)
        rows = sum(1 + len(work.drafts) for work in works)
        masks = self._start_masks(works)
        before = time.perf_counter()
        ticket = self._executor.submit([work.part(masks.get(id(work))) for work in works])
        results = self._executor.collect(ticket)
        computed = time.perf_counter()
        for work, result in zip(works, results, strict=True):
            try:  # what `_alone` does; a context costs every token a microsecond
                outputs += self._after(work, result, computed)
            except NO_FAULTS:
                raise
            except BaseException as wrong:  # noqa: BLE001  the fault ends this answer alone
                self._fail(work.answer, wrong)
        self._observe(works, rows, computed - before)
        self.counters.step_s += time.perf_counter() - started
        self.counters.schedule_s += time.perf_counter() - started - (computed - before)
        return outputs

    def _alone(self, answer: Answer) -> Alone:
        return Alone(answer, self._fail)

    def _fail(self, answer: Answer, wrong: BaseException) -> None:
        error = wrong.message if isinstance(wrong, HastenError) else ""
        if not error:
            log.error("a request failed in the engine", exc_info=wrong)
            error = f"a fault of the engine ended this answer ({type(wrong).__name__}); its log says more"
        self._post(self._end_all(answer, time.perf_counter(), "error", error=error))

    def _refuse_late(self, now: float) -> list[Output]:
        """End the answers that cannot keep their deadline any more."""
        timed = (one for one in self._scheduler.answers() if one.request.deadline_ms is not None)
        late = [answer for answer in timed if self._admission.is_late(answer, now)]
        return [
            output
            for one in late
            for output in self._end_all(one, now, "deadline", error="the deadline passed")
        ]

    def _end_stuck(self, now: float) -> list[Output]:
        """End the first waiting answer if it gets no pages though nothing runs: others hold the memory."""
        scheduler, pool = self._scheduler, self._executor.pool
        if scheduler.running or not scheduler.waiting:
            return []
        if any(self._keeper.is_reading(one) for one in scheduler.waiting):
            self._keeper.wait_for_disk(_DISK_WAIT_S)
            return []
        first = min(scheduler.waiting, key=scheduler.order)
        error = f"the {pool.usable} free pages of {pool.page_tokens} tokens are too few; others hold the rest"
        return self._end_all(first, now, "error", error=error)

    def _start_masks(self, works: list[Work]) -> dict[int, Callable[[], Masks]]:
        """Start making the masks of grammars and rules, in a thread, while the model computes."""
        return {
            id(work): self._mask_maker.submit(work.answer.masks, work.drafts).result
            for work in works
            if work.answer.is_bound and work.completes
        }

    def _after(self, work: Work, result: PartResult, now: float) -> list[Output]:
        """Share the pages a work computed, and give their tokens to its answer and to waiting siblings."""
        answer, outputs = work.answer, []
        if work.is_prompt:
            if answer.results.every_row:
                answer.results.read(answer.cached.length - work.count, work.count, result)
            self._keeper.publish(answer)
            self.counters.prompt_tokens += work.count
            self._scheduler.share.serve(answer.request.client, work.count, 0)
        if not work.completes:
            return []
        for sibling in answer.siblings:
            answer.results.share(sibling.results)
        answer.is_first_pass = False
        if answer.request.max_new_tokens == 0:
            return self._end_all(answer, now, "length", embedding=answer.results.embedding(result))
        if not answer.siblings:
            return [self._publish(answer, _drawn(result.choices[0]), now)]
        drawn = work.drawn()
        self._fork(answer)
        for one, choice in zip(drawn, result.choices, strict=True):
            with self._alone(one):
                outputs.append(self._publish(one, _drawn(choice), now))
        return outputs

    def _fork(self, leader: Answer) -> None:
        """Let siblings go on from the computed prompt where there is room; the others wait for a place."""
        for sibling in leader.siblings:
            sibling.tally.started = leader.tally.started
            has_slot = len(self._scheduler.running) < self._scheduler.slots
            if has_slot and self._keeper.fork(leader, sibling):
                sibling.is_first_pass = False
                self._scheduler.join(sibling)
            else:
                self._scheduler.arrive(sibling)
        leader.siblings = []

    def _publish(self, answer: Answer, choice: Choice, now: float) -> Output:
        """Give an answer its new tokens, and forget the pages of rejected drafts."""
        tokens, logprobs, finish, text = answer.take(choice)  # with an error, the drafts that held before it
        error = ""
        if choice.error and finish is None:
            refused = answer.grammar.failure if answer.grammar is not None else None
            finish, error = "error", refused.message if refused is not None else choice.error
        if tokens and answer.tally.first is None:
            answer.tally.first = now
        # The newest token is not computed yet. Without a new token all known ones are computed and stay: a
        # shared page must not be cut, or the cache would hold it under a second key.
        known = len(answer.tokens) - bool(tokens)
        if answer.cached.length != known:
            self._executor.pool.truncate(answer.cached, known)
        self._count(answer, choice.drafted, len(tokens))
        if answer.draft is not None and self._speculator is not None:
            self._speculator.accept(answer.draft, tokens, choice.drafted)
        if finish is None and answer.grammar is not None:
            answer.grammar.accept(tokens)
        output = answer.output(now, tokens, text, logprobs, finish, error)
        if finish is not None:
            return self._end(answer, output)
        if self._keeper.shares_answers:
            self._keeper.publish(answer)
        return output

    def _count(self, answer: Answer, drafted: int, made: int) -> None:
        counters = self.counters
        if drafted:
            answer.tally.drafted += drafted
            answer.tally.accepted += max(0, made - 1)
            counters.drafted_tokens += drafted
            counters.accepted_tokens += max(0, made - 1)
        counters.output_tokens += made
        self._scheduler.share.serve(answer.request.client, 0, made)

    def _observe(self, works: list[Work], rows: int, seconds: float) -> None:
        prompts = sum(work.count for work in works if work.count > 1 or work.is_prompt)
        decodes = [work for work in works if work.count == 1 and not work.is_prompt]
        self.counters.steps += 1
        self.counters.batch = len(works)
        if rows == len(works):  # no drafts
            self.forecast.observe(prompts, len(decodes), seconds)
        if prompts == 0 and self._speculator is not None:
            self._speculator.observe(rows, len(decodes), seconds)

    def _end_all(self, leader: Answer, now: float, finish: FinishReason, **news: Any) -> list[Output]:
        """End an answer and the siblings that wait for its prompt."""
        there = self._answers.get(leader.request.id, ())
        answers = [one for one in (leader, *leader.siblings) if one in there]
        return [self._end(one, one.output(now, finish=finish, **news)) for one in answers]

    def _end(self, answer: Answer, output: Output) -> Output:
        """End an answer: its pages, its place and its id are free again.

        An error while its pages and text are kept for others is logged and does not change its output.
        """
        self._scheduler.leave(answer)
        others = self._answers[answer.request.id]
        others.remove(answer)
        if not others:
            del self._answers[answer.request.id]
        draft, answer.draft = answer.draft, None
        try:
            self._keeper.end(answer, keep=output.finish_reason != "error")
            if self._speculator is not None and draft is not None:
                self._speculator.close(draft, keep=output.finish_reason in ("stop", "length"))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:
            log.exception("what an answer computed could not be kept for others")
        return output

    # What goes out ------------------------------------------------------------------------------------------

    def stream(self, request: Request) -> Iterator[Output]:
        """Take a request on and run the engine until it is done; others run along.

        Closing the iterator early cancels the request.

        Raises:
            UsageError, QueueFull, DeadlineError: at once, as `add`.
        """
        mail: deque[Output] = deque()
        outputs = self._deliver(self._add_for(request, mail), mail, deque())
        next(outputs)  # run it to its first yield: a generator that began is closed when it is dropped
        return outputs

    def tokens(self, request: Request) -> Iterator[int]:
        """As `stream`, for one answer: its token ids alone, the end token included.

        Raises:
            UsageError, QueueFull, DeadlineError: at once, as `add`.
            HastenError: from the iterator, if the answer failed.
        """
        outputs = self.stream(request)
        return (token for output in outputs for token in _good(output).token_ids)

    def run(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Run any number of requests: the outputs of all of them as they come.

        They wait here, not in the queue, so that `max_waiting` does not limit their number. Closing the
        iterator early cancels those that run.

        Raises:
            UsageError: at once, if one of them could never be taken on; from the iterator, as `add`.
            HastenError: from the iterator, if an answer failed.
        """
        for request in requests:
            self._admission.prompt_of(request)
        outputs = self._deliver({}, deque(), deque(requests))
        next(outputs)
        return map(_good, outputs)

    def _add_for(self, request: Request, mail: deque[Output]) -> dict[str, int]:
        name = self.add(request)
        self._mail[name] = mail
        return {name: request.n}

    def _deliver(self, left: dict[str, int], mail: deque[Output], coming: deque[Request]) -> Iterator[Output]:
        """Outputs from `mail`; `left`: the answers of each request that go on; `coming`: requests to add."""
        most = max(1, min(self._scheduler.slots, self.options.max_waiting))
        try:
            yield Output("", 0)  # for `next`, which starts this generator
            while left or coming:
                while coming and len(self._scheduler.waiting) < most:
                    left |= self._add_for(coming.popleft(), mail)
                if not mail:  # a step may make room for requests that wait here
                    self._post(self._advance())
                    continue
                output = mail.popleft()
                name = output.request_id
                left[name] -= output.finish_reason is not None
                if not left[name]:
                    del left[name]
                    self._forget_mail(name, mail)
                yield output
        finally:
            for name in left:
                if self._mail.get(name) is mail:
                    self.cancel(name)
                self._forget_mail(name, mail)

    def _forget_mail(self, name: str, mail: deque[Output]) -> None:
        if self._mail.get(name) is mail:  # else another request has this id now
            del self._mail[name]

    def _post(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._mail.get(output.request_id, self._unclaimed).append(output)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._answers

    @property
    def holds_memory(self) -> bool:
        """Whether `spare_memory` could give any back."""
        return self._executor.pool.held_bytes() > 0

    def spare_memory(self) -> None:
        """Look, at most every second, whether memory is short: give cached pages back, then preempt answers.

        A preempted answer goes on when there is room again. The last one that runs may use the reserve.
        """
        pool = self._executor.pool
        missing = pool.look()
        while missing and len(self._scheduler.running) > 1:
            self._planner.preempt_last()
            missing = pool.give_back()

    @property
    def untidy(self) -> bool:
        """Whether `tidy` has anything to do."""
        return self._keeper.unsettled > 0

    def tidy(self) -> bool:
        """Do a little work that can wait, while nothing else is to do. False: nothing is left.

        On machines whose prompts and answers take different kernels (AMX), answers are computed once more as
        the prompt they will be in the next turn: see `PrefixKeeper.settle`.
        """
        if self._keeper.is_stale:
            self._planner.begin_anew()
        try:
            return self._keeper.settle()
        except Exception:  # it only saves time
            log.exception("an ended answer could not be computed ahead")
            return False

    def stats(self) -> EngineStats:
        """What the engine holds now and has done since it started."""
        scheduler, pool = self._scheduler, self._executor.pool
        return replace(
            self.counters,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_pages=pool.pages,
            kv_pages_used=pool.pages - pool.free,
            kv_pages_cached=self._keeper.cached_pages,
        )

    def close(self) -> None:
        """Cancel what runs and give all pages back; the model stays open."""
        for name in list(self._answers):
            self.cancel(name)
        self._mask_maker.shutdown()
        self._dropped()


def _drawn(choice: Choice | BaseException) -> Choice:
    """What an answer drew; a fault that stands in its place is raised."""
    if isinstance(choice, BaseException):
        raise choice
    return choice


def _good(output: Output) -> Output:
    """An output that brings no error.

    Raises:
        HastenError: it does.
    """
    if output.finish_reason in ("error", "deadline"):
        raise HastenError(output.error, hint="run fewer sequences at once, or look at the log for the cause")
    return output
