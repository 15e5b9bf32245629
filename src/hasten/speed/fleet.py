"""How many copies of a model a load needs, waiting included.

Requests arrive at random (Poisson) and are all alike. A copy reads one prompt after another and decodes its
answers together, so a request takes of the machine

    p + output * t(b) / b         p: its prompt alone, t(b): a decode step of b answers

and stays `output * t(b) / (1 - rate * p)`, as prompts of others are read between its steps. Little's law
gives b, the answers that run at once on average; places are limited. A prompt waits for prompts before it as
in a queue with equal service (M/D/1), and for a place as among that many servers (Erlang's C formula).

Sources: Little, "A proof for the queuing formula L = lambda W", 1961; Pollaczek's and Khinchine's formula;
Erlang, 1917. What it leaves out: bursts, requests of different lengths, prompts that were seen before (but
for `Case.cached`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hasten.core import EngineOptions, ModelSpec, Recipe
from hasten.errors import UsageError
from hasten.speed.cost import load_of
from hasten.speed.forecast import Case, forecast
from hasten.speed.pace import Pace, Step

SLOTS = EngineOptions.max_sequences
"""Answers that run together on one copy."""
BUSY = 0.85
"""Of a copy's capacity: above it, waiting grows steeply with the least change of the load."""
_MOST = 10_000


@dataclass(frozen=True)
class Fleet:
    """So many copies under a load."""

    replicas: int
    rate: float  # requests a second, of all copies
    busy: float  # of what limits a copy, its prompts or its places: the share in use
    running: float  # answers at once on a copy, mean
    waiting_ms: float  # until a request's prompt is begun, mean
    ttft_ms: float  # mean, waiting included
    tpot_ms: float  # mean, prompts of others included


def fleet_for(
    config: ModelSpec, recipe: Recipe, case: Case, pace: Pace, rate: float, slots: int = SLOTS
) -> Fleet:
    """The fewest copies that carry `rate` requests a second at no more than `BUSY`.

    Raises:
        UsageError: no load, or one that more than 10,000 copies would be needed for.
        MachineError: as `forecast`.
    """
    if not 0 < rate < float("inf"):
        raise UsageError(f"--rate must be above 0 requests a second, got {rate:g}", hint="use --rate 2")
    copy = _Copy.of(config, recipe, case, pace, slots)
    low, high = 0, 1
    while (found := copy.under(rate, high)) is None or found.busy > BUSY:
        low, high = high, 2 * high
        if high > 2 * _MOST:
            raise UsageError(
                f"{rate:g} requests a second need more than {_MOST} copies of this machine",
                hint="take a faster machine, or shorter prompts and answers",
            )
    while high - low > 1:
        middle = (low + high) // 2
        tried = copy.under(rate, middle)
        if tried is None or tried.busy > BUSY:
            low = middle
        else:
            high, found = middle, tried
    return found


@dataclass(frozen=True)
class _Copy:
    """One copy's times."""

    prompt_s: float  # one prompt alone
    steps_s: tuple[float, ...]  # a decode step of 1, 2, ... answers
    steps: float  # that an answer takes

    @classmethod
    def of(cls, config: ModelSpec, recipe: Recipe, case: Case, pace: Pace, slots: int) -> _Copy:
        load, work = load_of(config, recipe), case.workload
        alone = replace(case, workload=replace(work, batch=1))
        context = work.prompt + work.output / 2
        steps = tuple(
            pace.spent(load, Step(answers, context, 1 + case.drafts)).seconds
            for answers in range(1, slots + 1)
        )
        prompt = forecast(config, recipe, alone, pace).ttft_ms.value / 1e3
        return cls(prompt, steps, max(1.0, (work.output - 1) / (1 + case.accepted)))

    def under(self, rate: float, replicas: int) -> Fleet | None:
        """So many copies under a load, or None: they cannot carry it."""
        own = rate / replicas
        reading = own * self.prompt_s
        running = self._running(own, reading)
        if running is None:
            return None
        slots = len(self.steps_s)
        step = self._step_s(running) / (1 - reading)
        waiting = reading * self.prompt_s / (2 * (1 - reading))
        waiting += _erlang_c(running, slots) * step * self.steps / (slots - running)
        return Fleet(
            replicas=replicas,
            rate=rate,
            busy=max(reading, running / slots),
            running=running,
            waiting_ms=1e3 * waiting,
            ttft_ms=1e3 * (waiting + self.prompt_s),
            tpot_ms=1e3 * step,
        )

    def _running(self, own: float, reading: float) -> float | None:
        """Answers at once: the least number that ends as fast as new ones come."""
        if reading >= 1:
            return None
        for number in range(1, 4 * len(self.steps_s)):
            there = number / 4
            if there >= own * self.steps * self._step_s(there) / (1 - reading):
                return own * self.steps * self._step_s(there) / (1 - reading)
        return None

    def _step_s(self, answers: float) -> float:
        """A step's seconds at a mean number of answers, between whole ones."""
        place = min(max(answers, 1.0), float(len(self.steps_s))) - 1
        low = int(place)
        high = min(low + 1, len(self.steps_s) - 1)
        return self.steps_s[low] + (place - low) * (self.steps_s[high] - self.steps_s[low])


def _erlang_c(load: float, servers: int) -> float:
    """The share of those who come and find all servers busy; `load`: servers that are busy on average."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))
