"""Runs a packed model on the CPU: the native decoder, its KV pages, batches of sequences."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.core import EngineOptions, ModelSpec
from hasten.errors import MachineError, ModelError, UsageError
from hasten.machine.cores import core_ids, usable_cores
from hasten.machine.memory import MemoryRoom, address_space_left, memory_room
from hasten.machine.probe import Format, choose_kernels
from hasten.models.rope import tables
from hasten.runtime.executor import Part, PartResult, Ticket, admit, finish
from hasten.runtime.keys import key_scales, key_shifts
from hasten.runtime.pages import CachedSequence, PageMemory, PagePool
from hasten.runtime.tokens import Ids, token_ids
from hasten.speed import page_bytes
from hasten.weights.packed import PackedLinear, PackedModel

Floats = npt.NDArray[np.float32]
_LONG = "long"
"""The class of pages whose keys LongRoPE rotated by its long factors."""
_DEFAULT_CONTEXT = 8192
_LEAST_CONTEXT = 512
"""A default context is not cut below this many tokens where memory is short: the model is refused instead."""

_log = logging.getLogger("hasten.runtime")


@dataclass(frozen=True)
class KvPlan:
    """How much memory keys and values may take, decided when a model is loaded."""

    context: int  # tokens
    pages: int
    page_bytes: int  # of all layers
    because: str  # what set the number of pages

    @property
    def bytes(self) -> int:
        """Most that the pages may take."""
        return self.pages * self.page_bytes

    @property
    def summary(self) -> str:
        """In one line."""
        tokens = self.pages * _native.PAGE_TOKENS
        return f"{tokens} tokens in at most {self.bytes / 1e9:.2f} GB ({self.because})"


def kv_plan(config: ModelSpec, int8: bool, options: EngineOptions, room: MemoryRoom | None = None) -> KvPlan:
    """Size the pages from what is free now: the weights are in memory already.

    No more than `max_sequences` full contexts, no less than one. Free is what the system and the control
    groups leave beside `MemoryRoom.reserve`, what a step computes with, and address space. What other models
    of this process hold in their prefix caches counts as free: they give it back when it is needed.

    Raises:
        UsageError: what the options ask for does not fit; the hint says what does.
    """
    room = room or memory_room()
    tokens, size = _native.PAGE_TOKENS, page_bytes(config, int8, _native.PAGE_TOKENS)
    context = context_of(options.context, config)
    longest = -(-context // tokens)
    free = _free_bytes(room, config, options, longest * size)
    fitting = max(0, free // size * tokens)
    if options.kv_gb is not None:
        return _wanted_plan(options.kv_gb, KvPlan(context, longest, size, "--kv-gb"), free)
    if fitting < context:
        least = min(_LEAST_CONTEXT, config.context_length)
        if options.context is not None or fitting < least:
            raise UsageError(
                f"keys and values of {context} tokens take {longest * size / 1e9:.2f} GB, "
                f"{max(0, free) / 1e9:.2f} GB are free here",
                hint=f"use --context {fitting}"
                if fitting >= least
                else "end other programs, or use a smaller model",
            )
        _log.warning(
            "the context is %d tokens and not %d: keys and values take %.1f KB a token, %.2f GB are free",
            fitting, context, size / tokens / 1e3, free / 1e9,
        )  # fmt: skip
        context, longest = fitting, fitting // tokens
    most = longest * options.max_sequences
    if free // size < most:
        return KvPlan(context, free // size, size, f"{free / 1e9:.2f} GB are free")
    return KvPlan(context, most, size, f"{options.max_sequences} sequences of {context} tokens")


def _free_bytes(room: MemoryRoom, config: ModelSpec, options: EngineOptions, one: int) -> int:
    """Bytes that pages may take; below 0 where not even a step fits. `one`: bytes of a full context."""
    chunk, widths = options.prefill_chunk, config.hidden_size + config.intermediate_size
    step = 4 * (4 * chunk * widths + options.max_sequences * config.vocab_size)  # float32 rows and logits
    free = room.ask(one + step + room.reserve) + room.held() - room.reserve
    mappable = address_space_left()
    return (free if mappable is None else min(free, mappable - room.reserve)) - step


def _wanted_plan(kv_gb: float, one: KvPlan, free: int) -> KvPlan:
    """The pages that a user asks for; `one` is a single context's plan."""
    pages, least = int(kv_gb * 1e9) // one.page_bytes, math.ceil(one.bytes / 1e7) / 100
    if pages < one.pages:
        raise UsageError(
            f"{kv_gb} GB for keys and values hold {pages * _native.PAGE_TOKENS} tokens, "
            f"less than one context of {one.context}",
            hint=f"use --kv-gb {least} or more, or a smaller --context",
        )
    if pages * one.page_bytes > free:
        fits = math.floor(free / 1e7) / 100
        raise UsageError(
            f"{kv_gb} GB are asked for keys and values, {max(0, free) / 1e9:.2f} GB are free here",
            hint=f"use --kv-gb {fits}" if fits >= least else "use a smaller --context, and no --kv-gb",
        )
    return KvPlan(one.context, pages, one.page_bytes, one.because)


def decoder_config(config: ModelSpec) -> dict[str, Any]:
    """A model's variation points as the native decoder reads them; keys as in native/decoder.h."""
    rope = tables(config)
    none: list[float] = []
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "activation": config.activation,
        "score_scale": config.score_scale,
        "attention_softcap": config.attention_softcap or 0.0,
        "logit_softcap": config.logit_softcap or 0.0,
        "embed_scale": config.embed_scale,
        "window": config.sliding_window or 0,
        "sliding": [int(x) for x in config.sliding_layers or (False,) * config.num_layers],
        "rope": [int(x) for x in config.rope_layers or (True,) * config.num_layers],
        "rope_global": rope.global_inv_freq.tolist(),
        "rope_local": none if rope.local_inv_freq is None else rope.local_inv_freq.tolist(),
        "rope_long": none if rope.long_inv_freq is None else rope.long_inv_freq.tolist(),
        "rope_scale": rope.global_scale,
        "rope_long_scale": rope.long_scale,
    }


class CpuExecutor:
    """A packed model on the native engine. Not for several threads at once: a second one gets a UsageError.

    Args:
        packed: the model; its arrays are used in place and must not change but through `replace`.
        options: threads, context and batch limits.

    Raises:
        MachineError: HASTEN_ISA names an instruction set this machine lacks.
        ModelError: the model's parts do not fit each other.
        UsageError: more threads than cores, or a context or batch that is not positive.
    """

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        config = packed.config
        self.config = config
        self.threads = threads_of(options.threads)
        self.chunk = max(1, options.prefill_chunk)
        if options.max_sequences < 1:
            raise UsageError(
                f"{options.max_sequences} sequences at once",
                hint="use EngineOptions(max_sequences=1) or more",
            )
        self._long_threshold = tables(config).long_threshold
        self.page_tokens: int = _native.PAGE_TOKENS
        try:
            self.name: str = _native.isa()
        except ValueError as wrong:
            raise MachineError(
                str(wrong), hint=f"unset HASTEN_ISA or use one of: {', '.join(_native.isas())}"
            ) from None
        self._bits: dict[str, int] = {}  # of each linear layer
        self.weights_version = 0  # counts replaced layers: keys and values of another version are stale
        int8 = packed.recipe.kv == "int8"
        self.kv = kv_plan(config, int8, options)
        self.context = self.kv.context
        try:
            self._decoder = _native.Decoder(decoder_config(config), self.threads, self.kv.pages, int8)
            behind = PageMemory(memory_room(), self.page_bytes, self._decoder.drop_pages)
            self.pool = PagePool(self.kv.pages, self.page_tokens, behind)
            self._give_weights(packed)
        except (ValueError, OverflowError) as wrong:
            raise ModelError(
                f"the model's parts do not fit each other: {wrong}", hint="get or make the model again"
            ) from None
        self.kernels = choose_kernels(_integer_matrices(packed), self.threads)

    def _give_weights(self, packed: PackedModel) -> None:
        config, int8 = packed.config, packed.recipe.kv == "int8"
        for name, linear in packed.linears.items():
            self._set_linear(name, linear)
        shifts = key_shifts(config, packed.vectors)
        scales = key_scales(config, packed.linears, packed.vectors, shifts) if int8 else {}
        for name, values in (*packed.vectors.items(), *shifts.items(), *scales.items()):
            self._decoder.set_vector(name, values)
        self._decoder.check()

    @property
    def page_bytes(self) -> int:
        """Bytes of KV cache one page of `page_tokens` tokens takes, all layers."""
        return int(self._decoder.page_bytes)

    @property
    def summary(self) -> str:
        """How much memory keys and values may take, and why."""
        return self.kv.summary

    def kv_class(self, tokens: int, as_prompt: bool) -> str:
        """See `Executor.kv_class`. LongRoPE rotates by other factors past its threshold; where the machine
        has tiles (AMX), prompts and answers take different kernels."""
        long = _LONG if self._long_threshold is not None and tokens > self._long_threshold else ""
        apart = not as_prompt and self.name == "amx" and set(self._bits.values()) != {16}
        return long + "answer" if apart else long

    def submit(self, parts: Sequence[Part]) -> Ticket:
        """Begin a step. A CPU computes in `collect`: there is nobody who could do it meanwhile."""
        return Ticket(tuple(parts))

    def collect(self, ticket: Ticket) -> list[PartResult]:
        """Compute a step; see `Executor.collect`.

        Where prompts and answers take different kernels they go in two calls: a token's result must depend
        on which of the two it is and on nothing else in the step.
        """
        parts = ticket.parts
        calls: list[list[int]] = [list(range(len(parts)))]
        if self.kv_class(1, True) != self.kv_class(1, False):
            calls = [[i for i, part in enumerate(parts) if part.as_prompt is kind] for kind in (False, True)]
        rows: dict[int, Floats] = {}
        for call in calls:
            if call:
                rows.update(zip(call, self._compute([parts[i] for i in call]), strict=True))
        return finish(self, parts, [rows[i] for i in range(len(parts))])

    def _compute(self, parts: list[Part]) -> list[Floats]:
        wanted: list[int] = []
        batch, ends, first = [], [], 0
        for part in parts:
            total = len(part.tokens) + len(part.drafts)
            batch.append((part.sequence, [*part.tokens, *part.drafts] if part.drafts else part.tokens))
            wanted.extend(range(first + part.first_row, first + total))
            ends.append(len(wanted))
            first += total
        hidden = self.step(batch, wanted, prefill=parts[0].as_prompt)
        return [hidden[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def hidden(self, sequence: CachedSequence, tokens: Sequence[int] | Ids) -> Floats:
        """Hidden states float32 [T, E] of all tokens of an empty sequence, computed as an answer's."""
        sequence.kv_class = self.kv_class(len(tokens), True)
        parts = []
        for at in range(0, len(tokens), self.chunk):
            some = tokens[at : at + self.chunk]
            parts.append(self.step([(sequence, some)], range(len(some))))
        return np.concatenate(parts) if parts else np.zeros((0, self.config.hidden_size), np.float32)

    def replace(self, name: str, linear: PackedLinear) -> None:
        """Put another matrix in a linear layer's place. What was computed before cannot be continued.

        An open engine notices by `weights_version`: it drops what it cached and computes what runs anew.

        Raises:
            UsageError: another thread is computing.
        """
        self._set_linear(name, linear)
        self.weights_version += 1

    def _set_linear(self, name: str, linear: PackedLinear) -> None:
        layout = linear.layout
        self._decoder.set_linear(name, linear.data, linear.rows, linear.cols, *layout.native)
        self._bits[name] = layout.bits

    def step(
        self,
        batch: Sequence[tuple[CachedSequence, Sequence[int] | Ids]],
        rows: Sequence[int],
        *,
        prefill: bool = False,
    ) -> Floats:
        """Compute new tokens of several sequences together; their keys and values join the cache.

        Args:
            batch: (sequence, its new token ids), every sequence at most once.
            rows: positions in the packed tokens whose result is wanted.
            prefill: the tokens are prompt: where the machine has tiles (AMX), quantised weights are then
                read as bf16 with bf16 activations, which is faster and more exact; decoding quantises
                activations to int8. Either way a token's result does not depend on what else is in the call.

        Returns:
            float32 [len(rows), E], hidden states after the final norm.

        Raises:
            UsageError: a sequence outgrows the context or was computed with weights that were replaced, a
                token id is unknown, the cache is full, or another thread is computing.
        """
        vocab = self.config.vocab_size
        lists = [ids if isinstance(ids, list) else token_ids(ids, vocab).tolist() for _, ids in batch]
        tokens = token_ids([token for ids in lists for token in ids], vocab)
        self.pool.refuse_others()
        for sequence, ids in batch:
            admit(self, sequence, len(ids))
        for sequence, ids in batch:
            self.pool.grow(sequence, sequence.length + len(ids))
        table = np.zeros((len(batch), max(len(sequence.pages) for sequence, _ in batch)), np.int32)
        for row, (sequence, ids) in zip(table, batch, strict=True):
            row[: len(sequence.pages)] = sequence.pages
            first, last = sequence.length, sequence.length + len(ids) - 1
            self.pool.wrote(sequence.pages[first // self.page_tokens : last // self.page_tokens + 1])
        counts = np.array([len(ids) for _, ids in batch], np.int32)
        pasts = np.array([sequence.length for sequence, _ in batch], np.int32)
        longs = np.array([sequence.kv_class == _LONG for sequence, _ in batch], np.uint8)
        with self.pool.computing():
            hidden: Floats = self._decoder.step(
                tokens, counts, pasts, table, longs, np.asarray(rows, np.int32), prefill
            )
        for sequence, ids in batch:
            sequence.length += len(ids)
        return hidden

    def head(self, hidden: Floats) -> Floats:
        """float32 [R, E] hidden states -> float32 [R, V] logits."""
        logits: Floats = self._decoder.head(np.ascontiguousarray(hidden, np.float32))
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of keys and values, all layers."""
        self._decoder.copy_page(source, target)
        self.pool.wrote([target])

    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        """A copy of one page's keys and values, all layers: uint8 [page_bytes]."""
        data: npt.NDArray[np.uint8] = self._decoder.read_page(page)
        return data

    def write_page(self, page: int, data: npt.NDArray[np.uint8]) -> None:
        """Put what `read_page` gave, uint8 [page_bytes], into a page of this executor or one just like it."""
        self._decoder.write_page(page, data)
        self.pool.wrote([page])

    def profile(self, reset: bool = True) -> dict[str, float]:
        """Seconds spent in each operation since the last reset."""
        return dict(self._decoder.profile(reset))


def _integer_matrices(packed: PackedModel) -> Iterator[tuple[Format, int, int]]:
    """(format, columns, bytes) of each matrix that integer kernels read."""
    for linear in packed.linears.values():
        layout = linear.layout
        if layout.bits < 16:
            yield layout.native, linear.cols, linear.data.nbytes


def threads_of(wanted: int | None) -> int:
    """How many threads an executor uses."""
    if wanted is None:
        return usable_cores()
    allowed = len(core_ids())
    if wanted < 1 or wanted > 4 * allowed:
        raise UsageError(
            f"{wanted} threads asked for, this process may use {allowed} processors",
            hint=f"use --threads {usable_cores()}, the default here",
        )
    return wanted


def context_of(wanted: int | None, config: ModelSpec) -> int:
    """Longest sequence of an executor, tokens."""
    if wanted is None:
        return min(config.context_length, _DEFAULT_CONTEXT)
    if wanted < 1:
        raise UsageError(f"a context of {wanted} tokens", hint="use --context 1 or more")
    if wanted > config.context_length:
        raise UsageError(
            f"a context of {wanted} tokens asked for, the model was made for {config.context_length}",
            hint=f"use --context {config.context_length} or less",
        )
    return wanted
