"""Which requests are taken on: what fits, what there is room for, what can be done in its time."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from hasten.core import ServingOptions
from hasten.engine.answer import Answer
from hasten.engine.forecast import Forecast
from hasten.engine.request import Request
from hasten.engine.scheduler import Scheduler
from hasten.errors import DeadlineError, QueueFull, UsageError
from hasten.runtime.tokens import token_ids

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel


class Admission:
    """Says no at once, with the reason, to what would fail later."""

    def __init__(
        self, model: LanguageModel, options: ServingOptions, scheduler: Scheduler, forecast: Forecast
    ) -> None:
        self._model = model
        self._options = options
        self._scheduler = scheduler
        self._forecast = forecast
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
            needed, most = length + max(asked, 1), config.context_length
            longer = f" or load the model with --context {needed} or more" if needed <= most else ""
            raise UsageError(
                f"the prompt has {length} tokens, the context holds {context} with the answer",
                hint=f"shorten the prompt{longer} (the model was made for {most} tokens)",
            )
        return tuple(token_ids(request.prompt, config.vocab_size).tolist())

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
        are taken, its own prompt (nothing of it cached) and its own steps among as many others as may run.
        """
        scheduler = self._scheduler
        ahead = [
            one
            for one in scheduler.answers()
            if one.request.priority > request.priority
            or (one.request.priority == request.priority and one.request.deadline_ms is not None)
            or one in scheduler.running
        ]
        prompts = len(request.prompt) + sum(max(0, one.prompt_tokens - one.cached.length) for one in ahead)
        full = len(ahead) >= scheduler.slots
        wait = min((one.left for one in scheduler.running), default=0) if full else 0
        sequences = min(scheduler.slots, len(ahead) + 1)
        return self._forecast.finish_s(prompts, wait + request.max_new_tokens, sequences)

    def is_late(self, answer: Answer, now: float) -> bool:
        """Whether an answer's time is over, or one that waits cannot be done in it."""
        if answer.request.deadline_ms is None:
            return False
        if now >= answer.deadline or answer.clock.started is not None:
            return now >= answer.deadline
        needed = self._forecast.finish_s(len(answer.tokens), answer.left, 1)
        return needed is not None and now + needed > answer.deadline
