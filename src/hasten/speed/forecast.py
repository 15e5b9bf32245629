"""How fast a workload runs: the engine's steps, one after another, at a machine's pace.

All sequences arrive at once, as in `hasten bench`. A step computes one token of every answer that decodes and
up to `chunk` tokens of prompts beside them, in the order they came: so does the engine's planner. The time to
the first token ends when the last sequence has its first; what comes later is decode, and batches shrink as
answers end. Answers are as long as asked for.

Not in it: tokenizing, the network, a server's process, and reuse of prompts beyond `Case.cached`. How many
copies of a model carry requests that come at random: `fleet_for`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hasten.core import EngineOptions, Estimate, Machine, ModelSpec, Recipe, Workload
from hasten.errors import UsageError
from hasten.speed.cost import Load, load_of, page_bytes, read_bytes, stored_bytes
from hasten.speed.pace import Bound, Ceilings, Efficiency, Pace, Piece, Spent, Step

CHUNK = EngineOptions.prefill_chunk
"""Prompt tokens of a step."""
_MOST_STEPS = 96  # of a prompt phase that are looked at one by one; more are sampled evenly


@dataclass(frozen=True)
class Range:
    """A prediction with the interval that holds the truth nine times of ten."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)

    def per(self, amount: float) -> Range:
        """The rate of so much work in this time: the ends change places."""
        return Range(amount / self.value, amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Case:
    """A workload, and what helps it."""

    workload: Workload
    cached: float = 0.0  # share of a prompt whose keys and values are there already
    drafts: int = 0  # tokens that are guessed in each step
    accepted: float = 0.0  # of them, that hold

    def __post_init__(self) -> None:
        work = self.workload
        if min(work.prompt, work.batch) < 1 or work.output < 0:
            raise UsageError(
                f"cannot estimate {work}: prompt and batch start at 1",
                hint="use --prompt 512 --output 128 --batch 1",
            )
        if not 0 <= self.cached < 1:
            raise UsageError(
                f"the cached share of a prompt lies between 0 and 1, got {self.cached:g}", hint="use 0.8"
            )
        if self.drafts < 0 or not 0 <= self.accepted <= self.drafts:
            raise UsageError(
                f"of {self.drafts} drafts {self.accepted:g} cannot be accepted",
                hint="use --drafts 4 --accepted 2.5",
            )


@dataclass(frozen=True)
class Forecast:
    """What is predicted of one recipe and one case."""

    recipe: str
    case: Case
    ttft_ms: Range
    tpot_ms: Range | None  # from a token to the next of its sequence; None: one token has no second
    prefill_tok_per_s: Range
    decode_tok_per_s: Range | None  # all sequences together
    weight_bytes: int  # of linear layers that a decode step reads
    bound: Bound  # of decode
    prefill_bound: Bound
    decode_parts: dict[str, float] = field(default_factory=dict)  # seconds of the middle decode step
    prefill_parts: dict[str, float] = field(default_factory=dict)  # seconds of the whole prompt phase

    @property
    def whole_ms(self) -> float:
        """Milliseconds from asking to the last token."""
        tpot = 0.0 if self.tpot_ms is None else self.tpot_ms.value
        return self.ttft_ms.value + tpot * max(0, self.case.workload.output - 1)


def forecast(
    config: ModelSpec, recipe: Recipe, case: Case, pace: Pace, *, chunk: int = CHUNK, load: Load | None = None
) -> Forecast:
    """Predict a case.

    Args:
        config: the model.
        recipe: layouts of the weights, kind of the KV cache.
        case: the workload and what helps it.
        pace: the machine's.
        chunk: prompt tokens of a step at most.
        load: `load_of` the two, where the caller has it.

    Raises:
        MachineError: a ceiling that the prediction needs is unknown.
        UsageError: a recipe whose bytes only the opened model knows, or that the machine cannot run.
    """
    if load is None:
        read_bytes(config, recipe, 1)  # raises where they are unknown
        load = load_of(config, recipe)
    work = case.workload
    reading = _Sum()
    for step, times in _prompt_steps(case, chunk):
        reading.add(pace.spent(load, step), times)
    answering, tokens, waited = _Sum(), 0.0, 0.0
    for step, repeated, made in _answer_steps(case, chunk):
        spent = pace.spent(load, step)
        answering.add(spent, repeated)
        tokens += made * repeated
        waited += spent.seconds * step.answers * repeated
    ttft = reading.range()
    decode = answering.range() if tokens else None
    return Forecast(
        recipe=recipe.name,
        case=case,
        ttft_ms=ttft.scaled(1e3),
        tpot_ms=None if decode is None else decode.scaled(1e3 * waited / (answering.seconds * tokens)),
        prefill_tok_per_s=ttft.per(work.batch * work.prompt),
        decode_tok_per_s=None if decode is None else decode.per(tokens),
        weight_bytes=round(load.bytes_of(work.batch * (1 + case.drafts))),
        bound=answering.bound if tokens else reading.bound,
        prefill_bound=reading.bound,
        decode_parts=answering.parts_of_one(),
        prefill_parts=dict(reading.parts),
    )


@dataclass
class _Sum:
    """Steps one after another. What makes them slower or faster than predicted is the same for all."""

    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    steps: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    by_bound: dict[Bound, float] = field(default_factory=dict)

    def add(self, spent: Spent, times: float) -> None:
        self.seconds += spent.seconds * times
        self.low += (spent.low_s or spent.seconds) * times
        self.high += (spent.high_s or spent.seconds) * times
        self.steps += times
        for name, seconds in spent.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + seconds * times
        self.by_bound[spent.bound] = self.by_bound.get(spent.bound, 0.0) + spent.seconds * times

    @property
    def bound(self) -> Bound:
        return max(self.by_bound, key=lambda one: self.by_bound[one], default="memory")

    def range(self) -> Range:
        return Range(self.seconds, self.low, self.high)

    def parts_of_one(self) -> dict[str, float]:
        return {name: seconds / self.steps for name, seconds in self.parts.items()} if self.steps else {}


def _new_tokens(case: Case) -> tuple[int, int]:
    """Of a prompt: tokens that are there already, and tokens to compute, at least one."""
    past = min(int(case.workload.prompt * case.cached), case.workload.prompt - 1)
    return past, case.workload.prompt - past


def _prompt_steps(case: Case, chunk: int) -> Iterator[tuple[Step, int]]:
    """Steps until the last sequence has its first token, each with how many it stands for."""
    last = -(-_new_tokens(case)[1] * case.workload.batch // chunk) - 1
    count = min(last, _MOST_STEPS)
    for start, end in pairwise(round(i * last / max(count, 1)) for i in range(count + 1)):
        yield _prompt_step(case, (start + end) // 2, chunk), end - start
    yield _prompt_step(case, last, chunk), 1  # which is rarely a full one


def _prompt_step(case: Case, number: int, chunk: int) -> Step:
    """The step of this number: its tokens of all prompts laid end to end, and the answers beside them."""
    work, (past, new) = case.workload, _new_tokens(case)
    at, end, pieces = number * chunk, min(new * case.workload.batch, (number + 1) * chunk), []
    done = at // new
    while at < end:
        inside = at % new
        count = min(new - inside, end - at)
        pieces.append(Piece(past + inside, count, inside + count == new))
        at += count
    ended = max(0, (number - work.output + 1) * chunk // new)  # answers that have all their tokens by now
    since = min(number - (new - 1) // chunk - 1, work.output - 2) / 2  # tokens that the others made, mean
    return Step(max(0, done - ended), work.prompt + 1 + max(0.0, since), 1 + case.drafts, tuple(pieces))


def _answer_steps(case: Case, chunk: int) -> Iterator[tuple[Step, float, float]]:
    """Decode steps after that: (a step, how many it stands for, tokens that one makes)."""
    _, new = _new_tokens(case)
    work, gain = case.workload, 1 + case.accepted
    steps = -(-new * work.batch // chunk)
    made = [steps - 1 - ((place + 1) * new - 1) // chunk for place in range(work.batch)]
    left = sorted(max(0.0, (work.output - 1 - early * gain) / gain) for early in made)
    done = work.output - 1 - (left[-1] * gain if left else 0.0)
    for number, (before, after) in enumerate(pairwise([0.0, *left])):
        if after > before:
            there = work.batch - number
            context = work.prompt + done + gain * (before + after + 1) / 2
            yield Step(there, context, 1 + case.drafts), after - before, there * gain


def estimate(
    config: ModelSpec,
    machine: Machine,
    workload: Workload,
    recipe: Recipe,
    *,
    weight_bytes: int | None = None,
    efficiency: Efficiency | None = None,
    isa: str | None = None,
    pace: Pace | None = None,
    chunk: int = CHUNK,
) -> Estimate:
    """Predict the speed of `workload`: tokens a second over the whole batch, milliseconds to the first token.

    Args:
        config: the model.
        machine: with measured ceilings.
        workload: prompt and output in tokens, sequences at once.
        recipe: layouts of the weights, kind of the KV cache.
        weight_bytes: bytes of linear weights a step reads; None: as the recipe packs them, of a mixture
            those experts that the step's tokens choose.
        efficiency: fractions of the ceilings; None: the defaults of `Efficiency`.
        isa: take this instruction set's ceilings instead of the machine's best.
        pace: instead of the ceilings: what was measured on the machine.
        chunk: prompt tokens of a step at most.

    Raises:
        MachineError: a ceiling that the prediction needs was not measured.
        UsageError: lengths below one, or a recipe whose bytes only the opened model knows.
    """
    case = Case(replace(workload, output=max(2, workload.output) if workload.output >= 0 else -1))
    load = load_of(config, recipe)
    if weight_bytes is None:
        read_bytes(config, recipe, 1)
    else:
        load = _with_bytes(load, weight_bytes)
    found = forecast(
        config, recipe, case, pace or Ceilings.of(machine, efficiency, isa), chunk=chunk, load=load
    )
    assert found.decode_tok_per_s is not None
    return Estimate(
        decode_tok_per_s=found.decode_tok_per_s.value,
        prefill_tok_per_s=found.prefill_tok_per_s.value,
        ttft_ms=found.ttft_ms.value,
        weight_bytes=found.weight_bytes,
        bound=found.bound,
    )


def _with_bytes(load: Load, weight_bytes: int) -> Load:
    """The same load with these bytes of linear weights a step, shared out by the number of weights."""
    used = sum(p.weights * p.count * p.share for p in load.products)
    products, whole = [], []
    for product in load.products:
        of_one = weight_bytes * product.weights * product.share / used
        changed = replace(product, bytes=of_one / product.share if product.share else 0.0)
        products.append(changed)
        if product in load.integer_products:
            whole.append(changed)
    return replace(load, products=tuple(products), integer_products=tuple(whole))


_PROCESS_BYTES, _TOKEN_BYTES = 98_000_000, 420
"""Of a process with Python, NumPy, the engine and no model, and of a token of the vocabulary: measured on the
CPU with a tiny model of 263 tokens and with the demo's 151,936."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak."""

    weights: int  # every matrix as stored, the embedding table too
    keys_and_values: int  # pages of all sequences at their full length
    activations: int  # of the largest step, logits included
    overhead: int  # of the process

    @property
    def total(self) -> int:
        return self.weights + self.keys_and_values + self.activations + self.overhead


def memory_of(
    config: ModelSpec, recipe: Recipe, case: Case, *, chunk: int = CHUNK, stored: int | None = None
) -> Memory:
    """What a case takes on the CPU engine.

    Args: as for `forecast`, and
        stored: bytes of all matrices, where the model was packed; None: as the recipe packs them.

    Raises:
        UsageError: the recipe keeps the source's values, so only the opened file knows.
    """
    from hasten._native import PAGE_TOKENS  # workers that time other engines run without the native module

    work = case.workload
    pages = work.batch * -(-(work.prompt + work.output) // PAGE_TOKENS)
    return Memory(
        weights=stored_bytes(config, recipe) if stored is None else stored,
        keys_and_values=pages * page_bytes(config, recipe.kv != "bf16", PAGE_TOKENS),
        activations=_activations(
            config, min(chunk, work.batch * work.prompt), work.batch * (1 + case.drafts)
        ),
        overhead=_PROCESS_BYTES + _TOKEN_BYTES * config.vocab,
    )


def _activations(config: ModelSpec, rows: int, drawn: int) -> int:
    """Buffers of a step (`Decoder::reserve`): floats between layers, and what products read as bf16."""
    widest = 0
    for block in dict.fromkeys(config.blocks):
        mixer, ways = block.mixer, block.feed_forward
        inner, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        floats = 4 * (config.width + max(config.width, inner) + inner + 2 * keys)
        widest = max(widest, floats + 2 * (max(config.width, inner) + ways.width))
    return rows * widest + 4 * drawn * (config.vocab + config.width)


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
    """The fewest copies that carry `rate` requests a second at no more than `BUSY`, waiting included.

    Requests arrive at random (Poisson) and are all alike. A copy reads one prompt after another and decodes
    its answers together, so a request takes of the machine

        p + output * t(b) / b         p: its prompt alone, t(b): a decode step of b answers

    and stays `output * t(b) / (1 - rate * p)`, as prompts of others are read between its steps. Little's law
    gives b, the answers that run at once on average; places are limited. A prompt waits for prompts before it
    as in a queue with equal service (M/D/1), and for a place as among that many servers (Erlang's C formula).

    Sources: Little, "A proof for the queuing formula L = lambda W", 1961; Pollaczek's and Khinchine's
    formula; Erlang, 1917. What it leaves out: bursts, requests of different lengths, prompts that were seen
    before (but for `Case.cached`).

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
