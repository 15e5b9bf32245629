"""Runs a packed model on a GPU: own kernels for decode, the library's for prompts.

A step goes one of three ways, all over the same pages of keys and values:

- sequences that each get a greedy token: a `Chain`, which runs a step ahead of the host; one sequence in the
  persistent kernel, 2 to 512 in the batched step's graphs;
- a few rows of any kind (sampled tokens, drafts to verify, the end of a prompt): the batched step, a row a
  token. Sampling is the host's, the same for every executor: from the 256 highest logits of a row where they
  tell what is drawn, else from the whole row;
- more rows: plain torch.

The three round differently, so two equal requests may differ where two logits tie within rounding. In plain
torch on a CPU (`device="cpu"`) the same executor runs without a GPU: tests compare it with the CPU engine.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hasten.core import EngineOptions, Recipe, dense
from hasten.errors import HastenError, MachineError, UsageError
from hasten.machine.cores import threads_of
from hasten.machine.memory import available_bytes, installed_bytes
from hasten.runtime.executor import Draw, Executor, Part, PartResult, Ticket, finish, prepare
from hasten.runtime.gpu.batch_weights import BatchWeights, load, longest
from hasten.runtime.gpu.chain import SIZES, BatchRows, Chain, OneRow, Pending, PlainRows, Row, Rows, to_host
from hasten.runtime.gpu.driver import current_device, telling
from hasten.runtime.gpu.plain import PagedCache, PlainStep, Span, upload
from hasten.runtime.gpu.ranks import Team
from hasten.runtime.gpu.shape import PAGE
from hasten.runtime.gpu.tiles import Tensors, matrix_of, tensors_of, weight_bytes
from hasten.runtime.pages import DeviceMemory, KvPlan, PagePool, context_of, plan_pages
from hasten.runtime.sampling import Choice, choose_of_few, no_token
from hasten.weights.packed import PackedLinear, PackedModel

Floats = npt.NDArray[np.float32]
_FEW = 64  # rows that one sequence may have in the batched step, whose attention takes each by itself
LEAST_CHUNK = 2048  # prompt tokens a step: a GPU is not busy with the CPU's 512
_FEW_LOGITS = 256  # of a row that cross to the host: more than top-k asks for, and room for penalties
_RESERVE = 2 << 30  # bytes of the device that pages leave free: products' workspaces, activations of a chunk

_log = logging.getLogger("hasten.runtime")


@dataclass(frozen=True)
class _FewLogits:
    """The highest logits of some parts' rows, on their way to the host, as `choose_of_few` takes them."""

    parts: Sequence[int]
    logits: Pending  # float32 [R, N]
    ids: Pending  # int32 [R, N]
    totals: Pending | None  # float64 [R]; None: top-k or a temperature of 0 cuts all rows


@dataclass(frozen=True)
class _Result:
    """What a launch gives for some parts of a step, on its way to the host."""

    tokens: Pending | None  # chosen behind rows
    firsts: Mapping[int, int]  # parts that read them: number -> the row of `Part.first_row`
    hidden: Pending | None = None  # float32 [rows, E], final, of the others from `first_row` on
    others: Sequence[int] = ()
    logits: Pending | None = None  # float32 [1, V] of a single row, instead of hidden states
    few: _FewLogits | None = None  # of some of the others


class GpuExecutor(Executor):
    """A model on a GPU. Not for several threads at once: a second one gets a UsageError.

    Args:
        packed: the model; nothing of it is used after loading, but its shape.
        options: threads (for sampling), context and batch limits; `kv_gb` is of the device's memory.
        device: "cuda", or "cpu" for the plain twin.
        tensors: other weights than the packed ones.
        team: this process computes one rank's share of the model; the weights are that share's.

    Raises:
        MachineError: there is no usable GPU, or too little memory on it.
        ModelError: the model has parts that no kernel here computes; they are named.
        UsageError: options out of range.
    """

    def __init__(
        self,
        packed: PackedModel,
        options: EngineOptions,
        device: str = "cuda",
        tensors: Tensors | None = None,
        team: Team | None = None,
    ) -> None:
        config = self.config = dense(packed.config, "the GPU engine")
        self.team = team
        self._local = config if team is None else team.shard.local
        self.check(packed.recipe)
        self.threads = threads_of(options.threads)
        self.context = context_of(options.context, config)
        if options.context is None:
            self.context = min(self.context, longest(config))
        self.page_tokens, self.weights_version = PAGE, 0
        self._device = device
        self.name = "torch"
        if device == "cuda":
            found = current_device()
            self.name = f"cuda {found.architecture}"
        least = 1 if device == "cpu" else LEAST_CHUNK
        self.chunk = max(options.prefill_chunk, least)
        tensors = tensors or tensors_of(packed, device)
        self._is_kv_int8 = packed.recipe.kv == "int8"
        self._weights: BatchWeights = self._load(tensors, options)
        self._tiled = self._tile(tensors, options) if device == "cuda" else None
        if not self._least(int(self._tiled is not None)):
            self._tiled = None
        self._limit = next((n for n in SIZES if n >= max(options.max_sequences, _FEW)), SIZES[-1])
        self.kv = self._plan(options)
        self.context = self.kv.context
        # one more for each row ahead of its sequence, and one for rows that idle
        self.cache = PagedCache(self._local, self.kv.pages + self._limit + 1, device, self._is_kv_int8)
        self.pool = PagePool(self.kv.pages, PAGE)
        self._plain = self._in_torch()
        self._rows_in_torch = PlainRows(self._plain)
        self._none = np.zeros((0, config.width), np.float32)
        self._one: OneRow | None = None
        self._batch: BatchRows | None = None
        self._chain: Chain | None = None
        if device == "cuda":
            self._make_kernels()

    @staticmethod
    def check(recipe: Recipe) -> None:
        """Every recipe runs: formats without kernels of their own as their values in bf16."""

    @staticmethod
    def give_back() -> None:
        """Return memory that torch holds for models that are gone; a GPU that was lost has none to return."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gc.collect()
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    # ---- loading -------------------------------------------------------------------------------------------

    def _load(self, tensors: Tensors, options: EngineOptions) -> BatchWeights:
        memory = self._memory(options)
        needed = weight_bytes(self._local, tensors.precision, tensors.head)
        if memory is not None and needed > memory.left:
            raise self._too_large(needed, tensors, memory)
        try:
            return load(
                self._local,
                tensors.of,
                self.context,
                tensors.precision,
                self._device,
                tensors.head,
                self._is_kv_int8,
            )
        except torch.OutOfMemoryError as error:
            raise self._too_large(needed, tensors, self._memory(options) or memory) from error

    def _too_large(self, needed: int, tensors: Tensors, memory: DeviceMemory | None) -> MachineError:
        """The weights do not fit: say what would."""
        said = f"the weights take {needed / 1e9:.2f} GB of GPU memory in {tensors.precision}"
        left = "" if memory is None else f", {memory.said}"
        fp8 = weight_bytes(self._local, "fp8", "fp8")
        if memory is not None and fp8 <= memory.left and fp8 < needed:
            return MachineError(
                said + left, hint=f"use --recipe fp8, which takes {fp8 / 1e9:.2f} GB, or --device cpu"
            )
        return MachineError(
            said + left, hint="use a smaller model, close what else runs on the GPU, or use --device cpu"
        )

    def _tile(self, tensors: Tensors, options: EngineOptions) -> Any:
        """A second copy of the weights, for the persistent kernel; None where it cannot run."""
        from hasten.runtime.gpu.persistent import tiled_copy

        if self._is_kv_int8:
            _log.info("no persistent kernel for one sequence: it reads keys and values in bf16")
            return None
        memory = self._memory(options)
        has_room = memory is None or memory.left >= 2 * self._weights.bytes
        if torch.cuda.get_device_capability()[0] != 9 or not has_room:
            _log.info("no persistent kernel for one sequence: it needs an H100 or H200, and memory")
            return None
        try:
            return tiled_copy(self._weights, tensors.tiles)
        except HastenError as why:
            _log.info("no persistent kernel for one sequence: %s", why)
            return None

    def _in_torch(self) -> PlainStep:
        if self._device == "cpu":
            return PlainStep(self._weights, self.cache, self.team)
        from hasten.runtime.gpu.plain_kernels import KernelStep

        return KernelStep(self._weights, self.cache, self.team)

    def _least(self, value: int) -> int:
        """The smallest of all ranks' values, where there are several."""
        return value if self.team is None else self.team.ranks.least(value)

    def _make_kernels(self) -> None:
        from hasten.runtime.gpu.batch_step import BatchStep, StepOptions

        options = StepOptions(self._limit, 0, self.context)
        self._batch = BatchRows(
            BatchStep(self._weights, options, cache=self.cache, team=self.team), self.cache
        )
        one = self._persistent()
        self._one = one if self._least(int(one is not None)) else None  # all ranks, or none of them

    def _persistent(self) -> OneRow | None:
        from hasten.runtime.gpu.persistent import PersistentDecoder

        if self._tiled is None:
            return None
        try:
            decoder = PersistentDecoder(self._tiled, self.context, cache=self.cache, team=self.team)
        except MachineError as why:
            _log.warning("one sequence decodes without its own kernel: %s", why.message)
            self._tiled = None
            return None
        return OneRow(decoder, self.cache)

    def _plan(self, options: EngineOptions) -> KvPlan:
        """Pages for `max_sequences` contexts, or for what the device has free."""
        size = PagedCache.page_bytes(self._local, self._is_kv_int8)
        memory = self._memory(options)
        room = None if memory is None else memory.room(_RESERVE + (self._limit + 1) * size)
        if room is not None:
            room = replace(room, bytes=self._least(room.bytes))
        return plan_pages(replace(self._local, context=self.context), size, options, room, at_once=True)

    def _memory(self, options: EngineOptions) -> DeviceMemory | None:
        """The device's memory now; None for the plain twin, unless it is given a limit."""
        if self._device == "cuda":
            torch.cuda.empty_cache()  # what was on its way to the device is free again
            free, whole = torch.cuda.mem_get_info()
            return DeviceMemory(free, whole, torch.cuda.memory_reserved(), options.gpu_memory)
        if options.gpu_memory is None:
            return None
        weights: BatchWeights | None = self.__dict__.get("_weights")
        held = 0 if weights is None else weights.bytes
        return DeviceMemory(available_bytes() or 0, installed_bytes() or 0, held, options.gpu_memory)

    @telling
    def replace(self, name: str, linear: PackedLinear) -> None:
        """Put another matrix in a linear layer's place; what was computed before cannot be continued."""
        self._refuse_misfit(name, linear)
        values, shard = matrix_of(linear, self._device), None if self.team is None else self.team.shard
        for own in {name, "head"} if shard is not None else {name}:  # a share's head is a matrix of its own
            if shard is None:
                self._weights.replace(own, values)
            elif shard.source(own) == name and (piece := shard.piece(own)) is not None:
                self._weights.replace(own, piece.of(values, torch.cat))
        self._chain, self.weights_version = None, self.weights_version + 1
        self._one = self._tiled = None  # its copy is of other weights

    def _refuse_misfit(self, name: str, linear: PackedLinear) -> None:
        self.pool.refuse_others()
        wanted = self.config.parameter_shapes().get(name)
        if wanted != (linear.rows, linear.cols):
            said = "there is no such matrix" if wanted is None else f"it is {wanted[0]} x {wanted[-1]}"
            raise UsageError(
                f"{name} cannot be replaced by a matrix of {linear.rows} x {linear.cols}: {said}",
                hint="take names and shapes from model.config.linear_shapes()",
            )

    # ---- a step --------------------------------------------------------------------------------------------

    @telling
    def submit(self, parts: Sequence[Part]) -> Ticket:
        """Begin a step: everything is launched when this returns, often the step after it too."""
        prepare(self, parts)
        return self._launch(parts)

    def _launch(self, parts: Sequence[Part]) -> Ticket:
        """A step whose sequences have their pages."""
        with self.pool.computing():
            chain, self._chain = self._chain, None
            rows = self._known_ahead(chain, parts)
            if chain is not None and rows:
                results = [_Result(chain.pending, rows)]
                chain.keep(list(rows.values()))
                rest = [i for i in range(len(parts)) if i not in rows]
                results += [self._compute(parts, rest, is_plain=True)] if rest else []
            else:
                chain, results = self._begin(parts)
                rest = [] if chain else list(range(len(parts)))
            for part in parts:
                part.sequence.length += len(part.tokens) + len(part.drafts)
            if chain is not None and chain.rows is self._rows(len(chain)):
                # a prompt that ends here joins the others in the next step, which then begins anew
                is_joined = any(parts[i].draws for i in rest)
                self._chain = chain if not is_joined and chain.run_ahead() else None
        return Ticket(tuple(parts), results)

    def _known_ahead(self, chain: Chain | None, parts: Sequence[Part]) -> dict[int, int]:
        """Parts whose results are computed ahead: number -> row. Empty if a part of one token is new."""
        if chain is None:
            return {}
        rows = chain.find({i: part for i, part in enumerate(parts) if is_step(part)})
        rest = [part for i, part in enumerate(parts) if i not in rows]
        return {} if any(len(part.tokens) + len(part.drafts) == 1 for part in rest) else rows

    def _begin(self, parts: Sequence[Part]) -> tuple[Chain | None, list[_Result]]:
        """Launch a step of which nothing is known."""
        if parts and all(is_step(part) for part in parts):
            rows = self._rows(len(parts))
            if len(parts) <= rows.limit:
                chain = Chain(rows, parts, self.kv.pages, self.context)
                return chain, [_Result(chain.pending, {i: i for i in range(len(parts))})]
        if len(parts) == 1 and self._one is not None and _is_one_row(parts[0]):
            sequence = parts[0].sequence
            self._one.start([Row(parts[0].tokens[0], sequence.length, sequence.pages)])
            self._one.launch(sequence.length + 1)
            logits = self._one.decoder.logits[None]
            if self.team is not None and self.team.shares_head:
                logits = self.team.ranks.gather(logits)
            return None, [_Result(None, {}, None, [0], to_host(logits))]
        return None, [
            self._compute(parts, group, is_plain)
            for group, is_plain in _groups(parts, 0 if self._batch is None else self._limit)
        ]

    def _rows(self, count: int) -> Rows:
        """What decodes so many sequences."""
        if count == 1 and self._one is not None:
            return self._one
        return self._batch or self._rows_in_torch

    def _compute(self, parts: Sequence[Part], group: Sequence[int], is_plain: bool) -> _Result:
        """Launch some parts together: tokens of those that are greedy, hidden states of the others."""
        ids: list[int] = []
        spans, starts = [], {}
        for i in group:
            part, starts[i] = parts[i], len(ids)
            ids += [*part.tokens, *part.drafts]
            spans.append(Span(part.sequence.length, len(ids) - starts[i], part.sequence.pages))
        ends = {i: starts[i] + span.count for i, span in zip(group, spans, strict=True)}
        greedy = [i for i in group if _is_greedy(parts[i])]
        others = [i for i in group if not _is_greedy(parts[i])]
        if is_plain or self._batch is None:
            residual, tokens = self._plain.run(np.array(ids, np.int32), spans), None
        else:
            rows = [Row(ids[starts[i] + n], s.past + n, s.pages)
                    for i, s in zip(group, spans, strict=True) for n in range(s.count)]  # fmt: skip
            self._batch.start(rows)
            tokens = self._batch.launch(max(s.past + s.count for s in spans))
            residual = self._batch.step.buffers.residual
        firsts = {i: starts[i] + parts[i].first_row for i in greedy}
        if tokens is None and (wanted := [row for i in greedy for row in range(firsts[i], ends[i])]):
            place = {row: at for at, row in enumerate(wanted)}
            firsts = {i: place.get(first, 0) for i, first in firsts.items()}
            tokens = to_host(self._plain.best(self._final(residual, wanted)))
        wanted = [row for i in others for row in range(starts[i] + parts[i].first_row, ends[i])]
        if not wanted:
            return _Result(tokens, firsts)
        final = self._final(residual, wanted)
        drawn = [i for i in others if _needs_few(parts[i])] if self.team is None else []
        few = self._few_logits(final, {i: wanted.index(ends[i] - 1) for i in drawn}, parts) if drawn else None
        return _Result(tokens, firsts, to_host(final), others, few=few)

    def _few_logits(self, final: torch.Tensor, rows: Mapping[int, int], parts: Sequence[Part]) -> _FewLogits:
        """The highest logits of parts: number -> its row of the hidden states `final`, float32 [R, E]."""
        logits = self._plain.logits(final[upload(np.array(list(rows.values()), np.int64), final.device)])
        highest, ids = logits.topk(min(_FEW_LOGITS, logits.shape[1]), sorted=False)
        ids, order = ids.sort()
        options, totals = [parts[i].draws[0].sampler.options for i in rows], None
        if any(o.top_k == 0 and o.temperature > 0 for o in options):
            colds = upload(np.array([[o.temperature or 1] for o in options], np.float32), logits.device)
            weights = ((logits - logits.amax(1, keepdim=True)) / colds).exp()
            totals = to_host(weights.sum(1, dtype=torch.float64))
        return _FewLogits(list(rows), to_host(highest.gather(1, order)), to_host(ids.int()), totals)

    def _final(self, residual: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return self._plain.final(residual[upload(np.array(rows, np.int64), residual.device)])

    @telling
    def collect(self, ticket: Ticket) -> list[PartResult]:
        parts, found = ticket.parts, [PartResult() for _ in ticket.parts]
        with self.pool.computing():
            others: list[int] = []
            rows: list[Floats] = []
            logits: Floats | None = None
            for result in ticket.state:
                tokens = result.tokens.read() if result.tokens is not None else []
                for i, first in result.firsts.items():
                    draws = range(len(parts[i].draws))
                    found[i].choices = [_choice(parts[i], which, tokens, first) for which in draws]
                told = self._draw_of_few(parts, result.few)
                hidden = self._none if result.hidden is None else result.hidden.wait().numpy()
                if result.logits is not None:
                    logits = result.logits.wait().numpy()
                    hidden = np.zeros((1, 0), np.float32)
                at = 0
                for i in result.others:
                    count = len(parts[i].tokens) + len(parts[i].drafts) - parts[i].first_row
                    if i in told:
                        found[i].choices = [Choice([told[i]], [])]
                    else:
                        others.append(i)
                        rows.append(hidden[at : at + count])
                    at += count
            head = self.head if logits is None else lambda hidden: logits
            chosen = finish(self, [parts[i] for i in others], rows, head)
            for i, one in zip(others, chosen, strict=True):
                found[i] = one
        return found

    def _draw_of_few(self, parts: Sequence[Part], few: _FewLogits | None) -> dict[int, int]:
        """Parts -> tokens, where the highest logits tell."""
        if few is None:
            return {}
        draws = [parts[i].draws[0] for i in few.parts]
        totals = np.zeros(len(draws)) if few.totals is None else few.totals.wait().numpy()
        tokens = choose_of_few(
            few.logits.wait().numpy(),
            few.ids.wait().numpy(),
            totals,
            [draw.sampler for draw in draws],
            [draw.position for draw in draws],
            threads=self.threads,
        )
        return {i: token for i, token in zip(few.parts, tokens, strict=True) if token is not None}

    @telling
    def head(self, hidden: Floats) -> Floats:
        """float32 [R, E] hidden states -> float32 [R, V] logits."""
        self.pool.refuse_others()
        rows = torch.from_numpy(np.ascontiguousarray(hidden, np.float32)).to(self._device)
        logits: Floats = to_host(self._plain.logits(rows)).wait().numpy()
        return logits

    # ---- pages ---------------------------------------------------------------------------------------------

    def kv_class(self, tokens: int, as_prompt: bool) -> str:
        """One class: prompts and answers differ by rounding alone, and rotations never change here."""
        return ""

    @property
    def page_bytes(self) -> int:
        """Bytes of `read_page`: keys and values of `page_tokens` tokens, all layers."""
        return self.kv.page_bytes

    @property
    def summary(self) -> str:
        """How much memory keys and values may take, and why."""
        return self.kv.summary

    @telling
    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of keys and values, all layers."""
        self.pool.refuse_others()
        self.cache.copy([source], [target])
        self.pool.wrote([target])

    @telling
    def read_page(self, page: int) -> npt.NDArray[np.uint8]:
        """A copy of one page's keys and values, all layers: uint8 [page_bytes]."""
        self.pool.refuse_others()
        return self.cache.read(page)

    @telling
    def write_page(self, page: int, data: npt.NDArray[np.uint8]) -> None:
        """Put what `read_page` gave, uint8 [page_bytes], into a page of this executor or one just like it."""
        self.pool.refuse_others()
        self.cache.write(page, data)
        self.pool.wrote([page])


class TorchExecutor(GpuExecutor):
    """The same in plain torch on a CPU: slow, for tests of what runs on GPUs."""

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        super().__init__(packed, options, "cpu")


def _is_plain(draw: Draw) -> bool:
    """Whether the largest logit is all that decides."""
    o = draw.sampler.options
    is_untouched = (
        not o.logit_bias and o.repetition_penalty == 1 and not (o.presence_penalty or o.frequency_penalty)
    )
    return o.temperature == 0 and is_untouched and draw.masks is None and draw.logprobs is None


def _is_greedy(part: Part) -> bool:
    """Whether tokens are all that is wanted, and the largest logits decide them."""
    return part.hidden == 0 and part.scored is None and all(_is_plain(draw) for draw in part.draws)


def _needs_few(part: Part) -> bool:
    """Whether one token is drawn from few candidates: cut by top-k, top-p or min-p, without a mask."""
    if len(part.draws) != 1 or part.drafts or part.hidden or part.scored is not None:
        return False
    draw = part.draws[0]
    o = draw.sampler.options
    is_cut = (
        o.temperature == 0 or 0 < o.top_k < _FEW_LOGITS or (o.top_k == 0 and (o.top_p < 1 or o.min_p > 0))
    )
    return is_cut and draw.masks is None and draw.logprobs is None


def is_step(part: Part) -> bool:
    """Whether a sequence gets its next greedy token, and nothing else."""
    return _is_one_row(part) and _is_greedy(part)


def _is_one_row(part: Part) -> bool:
    """Whether one token of one answer is drawn, whatever decides it."""
    rows = len(part.tokens) + len(part.drafts)
    return rows == 1 and len(part.draws) == 1 and part.hidden == 0 and part.scored is None


def _choice(part: Part, which: int, tokens: Sequence[int], first: int) -> Choice:
    """One answer's tokens: the drafts that are the largest logits' too, and one more.

    -1 is no token: a logit there is no number, and the answer ends with an error.
    """
    drafts = part.drafts if which == 0 else ()
    taken = [tokens[first]]
    for n, draft in enumerate(drafts):
        if draft != taken[n]:
            break
        taken.append(tokens[first + n + 1])
    if taken[-1] >= 0:
        return Choice(taken, [], len(drafts))
    del taken[-1]
    return Choice(taken, [], len(drafts), no_token("nan", part.draws[which].position + len(taken)))


def _groups(parts: Sequence[Part], most: int) -> Iterator[tuple[list[int], bool]]:
    """The parts in few launches: small ones in the batched step, `most` rows at a time, others in torch."""
    counts = [len(part.tokens) + len(part.drafts) for part in parts]
    few = min(most, _FEW if sum(counts) <= most else _FEW // 8)
    small: list[int] = []
    for i in sorted(range(len(parts)), key=lambda i: counts[i]):
        if counts[i] > few:
            break
        if sum(counts[j] for j in small) + counts[i] > most:
            yield small, False
            small = []
        small.append(i)
    if small:
        yield small, False
    large = [i for i, count in enumerate(counts) if count > few]
    if large:
        yield large, True
