"""What the engine knows of a device: the protocol that every executor implements.

The engine decides what a step computes and which pages belong to whom. The executor computes: it runs the
model over the step's tokens, and behind it the head, masks, penalties, sampling and the acceptance of drafts.
Logits (float32 [R, V], 600 KB a row with a vocabulary of 150,000) do not leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.errors import HastenError, MachineError, UsageError
from hasten.machine.memory import memory_amount
from hasten.runtime.pages import CachedSequence, PagePool
from hasten.runtime.sampling import Choice, Masks, SequenceSampler, TokenLogprob, choose, score

if TYPE_CHECKING:
    from hasten.core import EngineOptions, ModelSpec, Recipe
    from hasten.weights.packed import PackedLinear, PackedModel

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

EXECUTORS = {
    "cpu": "hasten.runtime.cpu:CpuExecutor",
    "reference": "hasten.runtime.reference:ReferenceExecutor",
    "cuda": "hasten.runtime.gpu.executor:GpuExecutor",
    "torch": "hasten.runtime.gpu.executor:TorchExecutor",
}
"""Devices by name. A new one is a file with a class that implements `Executor`, and a line here."""
LEADERS = {
    "cuda": "hasten.runtime.gpu.parallel:LeadingExecutor",
    "torch": "hasten.runtime.gpu.parallel:TorchLeader",
}
"""Devices of which several compute one model together, and what leads them."""

LONG = "long"
"""The class of pages whose keys LongRoPE rotated by its long factors."""
_SCORED_ROWS = 32  # positions whose logits exist at a time: 19 MB with a vocabulary of 150,000
NO_FAULTS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # they end the process, not one answer


@dataclass(slots=True)
class Draw:
    """One answer that gets its next tokens from the last rows of a part of the step."""

    sampler: SequenceSampler
    position: int  # of the first token that is drawn: with the sampler's seed it fixes the draw
    logprobs: int | None = None  # alternatives to report; 0: the chosen token alone; None: no logprobs
    masks: Callable[[], Masks] | None = None
    """Gives uint32 [rows, ceil(V / 32)], asked for after the model has computed: a grammar's masks are made
    meanwhile. Fewer rows than drafts + 1 say that the grammar forbids the drafts behind them."""


@dataclass(frozen=True)
class Scored:
    """Prompt tokens whose log-probabilities are wanted."""

    first: int  # the row, counted in the part, whose prediction is compared with the first target
    targets: tuple[int, ...]  # one a row
    top: int  # alternatives to report with each


@dataclass(slots=True)
class Part:
    """What one sequence has computed in a step."""

    sequence: CachedSequence
    tokens: Sequence[int]  # known ones: int32, behind those that the sequence holds
    as_prompt: bool = False
    drafts: Sequence[int] = ()  # guesses behind them, to be confirmed by the first of `draws`
    draws: tuple[Draw, ...] = ()  # answers that go on from the last known token
    hidden: int = 0  # so many of the last rows come back as hidden states
    scored: Scored | None = None

    @property
    def first_row(self) -> int:
        """The first row of this part whose result is needed; the number of rows if none is."""
        known = len(self.tokens)
        first = known + len(self.drafts) - self.hidden
        if self.draws and known <= first:
            first = known - 1
        if self.scored is not None and self.scored.first < first:
            first = self.scored.first
        return first


@dataclass
class PartResult:
    """What a part of a step gave. A fault in the work for one answer stands in that answer's place."""

    choices: list[Choice | BaseException] = field(default_factory=list)  # one a draw
    hidden: Floats | None = None  # float32 [Part.hidden, E], after the final norm
    scores: list[TokenLogprob] | BaseException = field(default_factory=list)  # one a target


@dataclass(frozen=True)
class Ticket:
    """A step on its way through a device."""

    parts: tuple[Part, ...]
    state: Any = None  # the executor's own


class Executor(Protocol):
    """A model on a device. One thread at a time: a second one gets a UsageError."""

    name: str  # what its results depend on beside the weights: an instruction set, a device
    device: str  # its name in `EXECUTORS`
    because: str = ""  # why "auto" chose it
    config: ModelSpec
    context: int  # longest prompt plus answer, tokens
    chunk: int  # prompt tokens in one step
    threads: int
    pool: PagePool
    page_tokens: int
    weights_version: int  # counts replaced layers: keys and values of another version are stale

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Asked before minutes of packing.

        Raises:
            UsageError: the device cannot run a format of the recipe.
        """

    @staticmethod
    def give_back() -> None:
        """Give memory of executors that are gone to the device's other users."""

    @property
    def page_bytes(self) -> int:
        """Bytes of `read_page`: keys and values of `page_tokens` tokens, all layers."""

    @property
    def summary(self) -> str:
        """How much memory keys and values may take, and why, in one line."""

    def kv_class(self, tokens: int, as_prompt: bool) -> str:
        """The class of the pages of a text of this length. Pages of two classes are never shared: their keys
        and values differ though their tokens are the same. A text whose class changes is computed anew."""

    def submit(self, parts: Sequence[Part]) -> Ticket:
        """Begin a step; every sequence at most once. Returns before the device is done, where it can: a
        CPU computes in `collect`."""
        return Ticket(tuple(parts))

    def collect(self, ticket: Ticket) -> list[PartResult]:
        """The results of a step, one a part; the sequences hold its tokens, drafts included.

        Raises:
            UsageError: a sequence outgrows the context or was computed with weights that were replaced, a
                token id is unknown, the cache is full, or another thread is computing.
        """

    def hidden(self, sequence: CachedSequence, tokens: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """Hidden states float32 [T, E] of tokens behind those of a sequence, computed as an answer's.

        A sequence that is not empty must stay in its class: `kv_class` of its whole length.
        """
        known: list[int] = token_ids(tokens, self.config.vocab).tolist()
        sequence.kv_class = self.kv_class(sequence.length + len(known), True)
        found = [np.zeros((0, self.config.width), np.float32)]
        for at in range(0, len(known), self.chunk):
            some = known[at : at + self.chunk]
            (result,) = self.collect(self.submit([Part(sequence, some, hidden=len(some))]))
            assert result.hidden is not None
            found.append(result.hidden)
        return found[1] if len(found) == 2 else np.concatenate(found)

    def head(self, hidden: Floats) -> Floats:
        """float32 [R, E] hidden states -> float32 [R, V] logits: for whoever asks for them."""

    def copy_page(self, source: int, target: int) -> None: ...

    def read_page(self, page: int) -> Bytes: ...

    def write_page(self, page: int, data: Bytes) -> None: ...

    def replace(self, name: str, linear: PackedLinear) -> None:
        """Put another matrix in a linear layer's place; what was computed before cannot be continued."""

    def close(self) -> None:
        """End what runs outside this process; nothing is computed any more."""
        return


def choose_device(wanted: str) -> tuple[str, str]:
    """(device, why) of a name in `EXECUTORS`, or of "auto": a GPU that can be used, else the CPU.

    Raises:
        UsageError: `EXECUTORS` has no such device.
        MachineError: "cuda" is asked for, and torch or a usable GPU is missing.
    """
    if wanted != "auto" and wanted not in EXECUTORS:
        raise UsageError(
            f"there is no device {wanted!r}", hint=f"use --device with one of: {', '.join(EXECUTORS)}, auto"
        )
    if wanted not in ("auto", "cuda"):
        return wanted, "as asked for"
    from hasten.runtime.gpu.driver import current_device

    try:
        return "cuda", current_device().name
    except MachineError as why:
        if wanted == "cuda":
            raise
        return "cpu", why.message


def executor_class(device: str, count: int = 1) -> type[Executor]:
    """The class that runs models on a device of `EXECUTORS`, or on `count` of them together.

    Raises:
        UsageError: several of this kind cannot compute together.
        MachineError: a library that it needs is not installed.
    """
    if count > 1 and device not in LEADERS:
        raise UsageError(
            f"--tensor-parallel {count} runs on GPUs, and the device is {device}",
            hint="use --device cuda, or leave --tensor-parallel out",
        )
    module, _, kind = (LEADERS if count > 1 else EXECUTORS)[device].partition(":")
    with _needed_by(device):
        found: type[Executor] = getattr(import_module(module), kind)
    return found


def check_recipe(wanted: str, recipe: Recipe) -> None:
    """Refuse a recipe that the device cannot run; asked before minutes of packing.

    Raises:
        UsageError: `Executor.check` refuses it; of "auto", that of a GPU and that of the CPU.
        MachineError: as `choose_device`.
    """
    device, _ = choose_device(wanted)
    try:
        executor_class(device).check(recipe)
    except HastenError:
        if wanted != "auto" or device == "cpu":
            raise
        executor_class("cpu").check(recipe)


def open_executor(packed: PackedModel, options: EngineOptions) -> Executor:
    """A model on the device that the options name.

    "auto" takes the CPU where a GPU is, but does not run this model or recipe, or has too little memory for
    it: `Executor.because` says so.

    Raises:
        UsageError: `EXECUTORS` has no such device.
        MachineError: it cannot be used here, or a library that it needs is not installed.
    """
    device, because = choose_device(options.device)
    if options.gpu_memory is not None:
        memory_amount(options.gpu_memory, 1 << 50, "--gpu-memory")  # can be read, wherever the model goes
    if options.device != "auto":
        return _opened(device, "", packed, options)
    if device != "cpu":
        try:
            return _opened(device, because, packed, options)
        except HastenError as refused:
            because = refused.message
        executor_class(device).give_back()  # behind the block: until then the error holds what was loaded
        try:
            return _opened("cpu", because, packed, options)
        except HastenError as too:
            if too.message != because:
                too.message = f"{too.message}; and on the GPU: {because}"
                too.args = (too.message,)
            raise
    return _opened("cpu", because, packed, options)


def _opened(device: str, because: str, packed: PackedModel, options: EngineOptions) -> Executor:
    if options.tensor_parallel < 1:
        raise UsageError(f"tensor_parallel is {options.tensor_parallel}", hint="use 1 (one device) or more")
    kind = executor_class(device, options.tensor_parallel)
    with _needed_by(device):
        found: Executor = kind(packed, options)  # type: ignore[call-arg]
    found.device, found.because = device, because
    return found


@contextmanager
def _needed_by(device: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name not in ("torch", "triton"):
            raise
        raise MachineError(
            f"--device {device} needs {missing.name}, which is not installed",
            hint="pip install 'hasten[gpu]', or use --device cpu",
        ) from missing


def admit(executor: Executor, sequence: CachedSequence, tokens: int) -> None:
    """Before so many more tokens of a sequence are computed.

    Raises:
        UsageError: it would outgrow the context, or was computed with weights that were replaced.
    """
    if sequence.length == 0 and sequence.kv_class is None:
        sequence.kv_class = executor.kv_class(tokens, True)
    if sequence.length == 0 or sequence.weights is None:
        sequence.weights = executor.weights_version
    elif sequence.weights != executor.weights_version:
        raise UsageError(
            "weights were replaced since this text was begun: its keys and values are of others",
            hint="begin the text again",
        )
    if sequence.length + tokens > executor.context:
        raise UsageError(
            f"{sequence.length + tokens} tokens do not fit the context of {executor.context}",
            hint="shorten the prompt, or load the model with a larger --context",
        )


def prepare(executor: Executor, parts: Sequence[Part]) -> tuple[Ids, list[int]]:
    """Check a step and give its sequences pages: what an executor does before it computes.

    Returns:
        int32 [N] ids of all parts one after another, and how many each has, drafts included.

    Raises:
        UsageError: as `Executor.collect`; no sequence has changed its length then.
    """
    vocab, pool, size = executor.config.vocab, executor.pool, executor.page_tokens
    counts = [len(part.tokens) + len(part.drafts) for part in parts]
    ids = token_ids([token for part in parts for token in (*part.tokens, *part.drafts)], vocab)
    pool.refuse_others()
    for part, count in zip(parts, counts, strict=True):
        admit(executor, part.sequence, count)
    for part, count in zip(parts, counts, strict=True):
        pool.grow(part.sequence, part.sequence.length + count)
    written: list[int] = []
    for part, count in zip(parts, counts, strict=True):
        first, pages = part.sequence.length, part.sequence.pages
        if count == 1:
            written.append(pages[first // size])
        else:
            written += pages[first // size : (first + count - 1) // size + 1]
    pool.wrote(written)
    return ids, counts


def finish(
    executor: Executor,
    parts: Sequence[Part],
    rows: Sequence[Floats],
    head: Callable[[Floats], Floats] | None = None,
) -> list[PartResult]:
    """Everything behind the final norm: scores of prompts, then the next tokens of all answers in one call.

    Args:
        executor: whose head is used.
        parts: of the step.
        rows: float32 [tokens + drafts - first_row, E] of each part: hidden states from `Part.first_row` on.
        head: gives logits of hidden states; None: the executor's.
    """
    results = [_read(executor, part, mine) for part, mine in zip(parts, rows, strict=True)]
    places: list[tuple[int, int]] = []
    samplers, drafts, positions, masks, logprobs, hidden = [], [], [], [], [], []
    for at, (part, mine) in enumerate(zip(parts, rows, strict=True)):
        for which, draw in enumerate(part.draws):
            proposed = list(part.drafts) if which == 0 else []
            mask = _caught(draw.masks)
            results[at].choices.append(mask if isinstance(mask, BaseException) else Choice([], []))
            if isinstance(mask, BaseException):
                continue
            if mask is not None:
                proposed = proposed[: len(mask) - 1]
            first = len(part.tokens) - 1 - part.first_row
            hidden.append(mine[first : first + 1 + len(proposed)])
            samplers.append(draw.sampler)
            drafts.append(proposed)
            positions.append(draw.position)
            masks.append(mask)
            logprobs.append(draw.logprobs)
            places.append((at, which))
    if places:
        logits = (head or executor.head)(hidden[0] if len(hidden) == 1 else np.concatenate(hidden))
        chosen = choose(logits, samplers, drafts, positions, masks, logprobs, threads=executor.threads)
        for (at, which), choice in zip(places, chosen, strict=True):
            results[at].choices[which] = choice
    return results


def _caught(make: Callable[[], Masks] | None) -> Masks | BaseException | None:
    """A grammar's masks, or why there are none: panics of native libraries are no `Exception`."""
    try:
        return None if make is None else make()
    except NO_FAULTS:
        raise
    except BaseException as wrong:  # noqa: BLE001  raised where its answer is looked at
        return wrong


def _read(executor: Executor, part: Part, rows: Floats) -> PartResult:
    """What a prompt itself gives: hidden states, and log-probabilities of its tokens."""
    result = PartResult(hidden=rows[len(rows) - part.hidden :] if part.hidden else None)
    if part.scored is None:
        return result
    first, targets = part.scored.first - part.first_row, part.scored.targets
    scores: list[TokenLogprob] = []
    try:
        for at in range(0, len(targets), _SCORED_ROWS):
            some = targets[at : at + _SCORED_ROWS]
            logits = executor.head(rows[first + at : first + at + len(some)])
            scores += score(logits, some, part.scored.top, threads=executor.threads)
    except NO_FAULTS:
        raise
    except BaseException as wrong:  # noqa: BLE001
        result.scores = wrong
    else:
        result.scores = scores
    return result


def token_ids(ids: Sequence[int] | npt.NDArray[Any], vocab_size: int) -> Ids:
    """Token ids as the native engine takes them.

    Args:
        ids: whole numbers from 0 to `vocab_size` - 1: a sequence of ints, NumPy's included, or an array of
            any integer type, [N].
        vocab_size: of the model.

    Returns:
        int32 [N].

    Raises:
        UsageError: what was given is no such sequence (a bool, a float and a string are no ids), or an id is
            not in the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise _no_ids(f"an array of shape {ids.shape} and type {ids.dtype}")
        lowest, highest = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    else:
        try:
            ids = list(ids)
        except TypeError:
            raise _no_ids(repr(ids)) from None
        if not set(map(type, ids)) <= {int}:  # type() and not isinstance(): True is an int
            for one in ids:
                if isinstance(one, bool) or not isinstance(one, int | np.integer):
                    raise _no_ids(f"{one!r:.60} among them")
            ids = [int(one) for one in ids]
        lowest, highest = (min(ids), max(ids)) if ids else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        strange = highest if highest >= vocab_size else lowest
        raise UsageError(
            f"token id {strange} is not in the vocabulary of {vocab_size}",
            hint="encode text with this model's own tokenizer",
        )
    return np.asarray(ids, np.int32)


def _no_ids(found: str) -> UsageError:
    return UsageError(
        f"token ids must be whole numbers, got {found}", hint="encode text with model.tokenizer.encode(text)"
    )
