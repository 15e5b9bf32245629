"""Runs a packed model on the CPU: the native decoder, its KV pages, batches of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.core import EngineOptions, ModelSpec, Recipe, dense
from hasten.errors import MachineError, ModelError
from hasten.machine.cores import threads_of
from hasten.machine.memory import memory_room
from hasten.machine.probe import Format, choose_kernels
from hasten.models.rope import key_scales, key_shifts, tables
from hasten.runtime.executor import LONG, Executor, Ids, Part, PartResult, Ticket, finish, prepare
from hasten.runtime.pages import PAGE_TOKENS, PageMemory, PagePool, kv_plan
from hasten.speed.cost import page_bytes
from hasten.weights.packed import PackedLinear, PackedModel, values_of

Floats = npt.NDArray[np.float32]


def decoder_config(config: ModelSpec) -> dict[str, Any]:
    """A model's variation points as the native decoder reads them; keys as in native/decoder.h."""
    rope, blocks = tables(config), dense(config, "the native engine").blocks
    mixer, feed_forward = blocks[0].mixer, blocks[0].feed_forward  # alike in all but windows and rotation
    windows = [block.mixer.window or 0 for block in blocks]
    none: list[float] = []
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": feed_forward.width,
        "layers": len(blocks),
        "heads": mixer.heads,
        "kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "norm_eps": config.final_norm.eps,
        "activation": feed_forward.activation,
        "score_scale": mixer.score_scale,
        "attention_softcap": mixer.softcap or 0.0,
        "logit_softcap": config.head.softcap or 0.0,
        "embed_scale": config.embedding.scale,
        "window": max(windows),
        "sliding": [int(window > 0) for window in windows],
        "rope": [int(block.mixer.rotary is not None) for block in blocks],
        "rope_global": rope.global_inv_freq.tolist(),
        "rope_local": none if rope.local_inv_freq is None else rope.local_inv_freq.tolist(),
        "rope_long": none if rope.long_inv_freq is None else rope.long_inv_freq.tolist(),
        "rope_scale": rope.global_scale,
        "rope_long_scale": rope.long_scale,
    }


class CpuExecutor(Executor):
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
        self._long_threshold = tables(config).long_threshold
        self.page_tokens = PAGE_TOKENS
        try:
            self.name: str = _native.isa()
        except ValueError as wrong:
            raise MachineError(
                str(wrong), hint=f"unset HASTEN_ISA or use one of: {', '.join(_native.isas())}"
            ) from None
        self._integers: set[str] = set()  # linear layers whose weights are integers
        self.weights_version = 0
        int8, room = packed.recipe.kv == "int8", memory_room()
        self.kv = kv_plan(config, page_bytes(config, int8, PAGE_TOKENS), options, room)
        self.context = self.kv.context
        try:
            self._decoder = _native.Decoder(decoder_config(config), self.threads, self.kv.pages, int8)
            behind = PageMemory(room, self.page_bytes, self._decoder.drop_pages)
            self.pool = PagePool(self.kv.pages, PAGE_TOKENS, behind)
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
        scales = (
            key_scales(config, lambda name: values_of(packed.linears[name]), packed.vectors, shifts)
            if int8
            else {}
        )
        for name, values in (*packed.vectors.items(), *shifts.items(), *scales.items()):
            self._decoder.set_vector(name, values)
        self._decoder.check()

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Refuse formats without kernels: tables of values (fp8, mxfp4)."""
        for layout in (recipe.default, recipe.head, *recipe.layers.values()):
            if layout is not None:
                _ = layout.native  # raises where there is no kernel for it

    @property
    def _answers_apart(self) -> bool:
        """Whether answers take other kernels than prompts: with tiles (AMX), where weights are integers."""
        return self.name == "amx" and bool(self._integers)

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
        long = LONG if self._long_threshold is not None and tokens > self._long_threshold else ""
        return long + "answer" if self._answers_apart and not as_prompt else long

    def collect(self, ticket: Ticket) -> list[PartResult]:
        """Compute a step; see `Executor.collect`.

        Where prompts and answers take different kernels they go in two calls: a token's result must depend
        on which of the two it is and on nothing else in the step.
        """
        parts = ticket.parts
        ids, counts = prepare(self, parts)
        if not self._answers_apart:
            return finish(self, parts, self._compute(parts, counts, ids))
        pieces = np.split(ids, np.cumsum(counts)[:-1])
        rows: dict[int, Floats] = {}
        for kind in (False, True):
            call = [i for i, part in enumerate(parts) if part.as_prompt is kind]
            if call:
                mine = np.concatenate([pieces[i] for i in call])
                found = self._compute([parts[i] for i in call], [counts[i] for i in call], mine)
                rows |= dict(zip(call, found, strict=True))
        return finish(self, parts, [rows[i] for i in range(len(parts))])

    def _compute(self, parts: Sequence[Part], counts: list[int], ids: Ids) -> list[Floats]:
        """One native call: hidden states of each part from `Part.first_row` on.

        All parts are prompt, or none is: where the machine has tiles (AMX), prompts read quantised weights as
        bf16, with bf16 activations, which is faster and more exact; answers have int8 activations.
        """
        wanted: list[int] = []
        ends, first, sequences = [0], 0, [part.sequence for part in parts]
        for part, count in zip(parts, counts, strict=True):
            wanted.extend(range(first + part.first_row, first + count))
            ends.append(len(wanted))
            first += count
        table = np.zeros((len(parts), max(len(sequence.pages) for sequence in sequences)), np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        pasts = np.array([sequence.length for sequence in sequences], np.int32)
        longs = np.array([sequence.kv_class == LONG for sequence in sequences], np.uint8)
        lengths, rows = np.array(counts, np.int32), np.array(wanted, np.int32)
        with self.pool.computing():
            hidden: Floats = self._decoder.step(ids, lengths, pasts, table, longs, rows, parts[0].as_prompt)
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.length += count
        return [hidden[start:end] for start, end in pairwise(ends)]

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
        (self._integers.discard if layout.bits == 16 else self._integers.add)(name)

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


def _integer_matrices(packed: PackedModel) -> Iterator[tuple[Format, int, int]]:
    """(format, columns, bytes) of each matrix that integer kernels read."""
    for linear in packed.linears.values():
        layout = linear.layout
        if layout.bits < 16:
            yield layout.native, linear.cols, linear.data.nbytes
