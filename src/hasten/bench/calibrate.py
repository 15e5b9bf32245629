"""Times real layer shapes on this machine, for `hasten.speed.fit`: under a minute, once for a version.

What is timed runs on the native decoder, as models do: blocks of three published models' sizes with random
weights, in each format, with 1 to 32 rows of answers and 16 to 512 of prompts; attention of four head shapes
at several contexts; greedy choice; and the engine's own work around a step. The decoder says how long each
kind of layer took (`Decoder.profile`).

Other work can only slow a round down. A time is the median of the fastest half of its rounds; rounds go on
while that half does not agree. A slow minute of the whole machine looks steady. So two small steps of known
speed are timed beside every round, one that reads and one that computes: a round is divided by how slow they
were, and one during which they took half as long again as in quiet moments is taken again. What stays
disturbed is counted.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import cache_dir, read_record, write_record
from hasten.core import (
    Attention,
    Block,
    EngineOptions,
    FeedForward,
    Head,
    ModelSpec,
    Recipe,
    Rotary,
    ServingOptions,
    as_json,
)
from hasten.engine.engine import Engine
from hasten.engine.loaded import LoadedModel
from hasten.engine.request import Request
from hasten.errors import DiskError, MachineError
from hasten.machine.cores import threads_of
from hasten.machine.memory import available_bytes
from hasten.machine.probe import choose_kernels, processor_id, processor_name
from hasten.models.text_stream import TextStream
from hasten.runtime.cpu import decoder_config
from hasten.runtime.pages import PAGE_TOKENS
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose
from hasten.speed.fit import (
    ANSWER,
    PROMPT,
    Calibration,
    Curve,
    Point,
    Weighing,
    answer_features,
    line,
    non_negative,
    prompt_features,
    turned,
)
from hasten.weights import FORMATS, Format
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear
from hasten.weights.tensors import SourceTensor

FORMATS_TIMED = ("bf16", "w8", "w6", "w5", "w4", "w4-g128", "w4-asym", "w6-g16")
"""Those of recipes' names, and two that GGUF's k-quants become. Others are reckoned from their relatives."""
ANSWER_ROWS = (1, 2, 4, 8, 16, 32)
PROMPT_ROWS = (16, 64, 256, 512)
_FEW = ((1, 4, 8, 32), (16, 512))
"""Rows of the same two kinds for formats whose kernels are those of another: w4-g128, w4-asym, w6-g16."""
_MEMORY = 2_500_000_000  # bytes that are filled at a time
_VOCAB = 65_536
_HURRY_S = (
    45.0  # of a calibration; on a machine that is busy all the time, rounds would be repeated for minutes
)
_CHOICES = 151_936  # logits of the greedy choice that is timed
_log = logging.getLogger("hasten.bench")


def _blocks(layers: int, width: int, feed_forward: int, heads: tuple[int, int, int], vocab: int) -> ModelSpec:
    mixer = Attention(*heads, rotary=Rotary(heads[2]))
    block = Block(mixer, FeedForward(feed_forward))
    return ModelSpec("llama", vocab, width, 8192, (block,) * layers, head=Head(tied=True))


ANSWERING = (  # widths of Gemma 3 270M, Qwen3 0.6B, Llama 3.2 1B: 0.65 GB in 8 bits, more than caches hold
    _blocks(8, 640, 2048, (10, 5, 64), 16_384),
    _blocks(12, 1024, 3072, (16, 8, 128), 32_768),
    _blocks(4, 2048, 8192, (32, 8, 64), _VOCAB),
)
READING = (  # the same layers, fewer: many rows are bound by arithmetic
    _blocks(4, 640, 2048, (10, 5, 64), 16),
    _blocks(3, 1024, 3072, (16, 8, 128), 16),
    _blocks(1, 2048, 8192, (32, 8, 64), 16),
)
HEADS = ((9, 3, 64), (16, 2, 64), (32, 8, 64), (12, 2, 128), (32, 8, 128), (4, 1, 256))
"""Query heads, KV heads, head size. Keys and values of a layer lie in pages of all layers, so there are eight
layers: one layer's pages would lie side by side, and be read faster than any model's."""
_LAYERS = 8
ANSWER_CASES = ((1, 128), (1, 1024), (1, 4096), (4, 512), (8, 1024), (16, 256), (16, 1024))
"""(sequences, context)"""
PROMPT_CASES = ((0, 64), (0, 512), (512, 64), (512, 512), (2560, 512))
"""(past, count)"""
_PAST = max(past + count for past, count in PROMPT_CASES)
_KEYS = max(sequences * -(-context // PAGE_TOKENS) * PAGE_TOKENS for sequences, context in ANSWER_CASES)


# Rounds that other work disturbs ----------------------------------------------------------------------------


READS, COMPUTES = 0, 1
"""Kinds of work: bound by memory, bound by arithmetic."""


@dataclass
class Watch:
    """Takes rounds until they agree, each held against a step of known speed beside it.

    Seconds it gives are those of a machine as fast as it was while `learn` looked; `correction` is what they
    have to be multiplied with if quieter moments came later.
    """

    canary: Callable[[], Sequence[float]]  # seconds of a step that reads, and of one that computes
    wait_s: float = 10.0  # for quiet moments, in all
    sleep: Callable[[float], None] = time.sleep
    until: float = math.inf  # on `time.perf_counter`: from then on two rounds must do
    repeated: int = 0
    untrusted: int = 0
    timed: int = 0
    _seen: list[tuple[float, ...]] = field(default_factory=list)
    _base: tuple[float, ...] = ()

    SLOW = 1.5  # of the canary's usual time: a round beside it counts for nothing
    AGREE = 1.1  # within which the fastest half of rounds lies

    def learn(self, rounds: int = 40) -> None:
        """Find out how fast the canary is."""
        for _ in range(rounds):
            self._look()
        self._base = self.usual

    def rounds(self, take: Callable[[], Mapping[str, float]], kind: int, least: int = 5) -> dict[str, float]:
        """Seconds by name: the median of the fastest half of the rounds, three times `least` at most."""
        self.timed += 1
        taken: list[tuple[float, dict[str, float]]] = []
        before, is_late = self._look(), time.perf_counter() > self.until
        least, most = (2, 2) if is_late else (least, 3 * least)
        for number in range(1, most + 1):
            found = take()
            after = self._look()
            slow = (before[kind] + after[kind]) / 2 / self._base[kind]
            before = after
            if slow > self.SLOW * self.usual[kind] / self._base[kind]:
                self.repeated += 1
                self._wait()
                continue
            taken.append((sum(found.values()) / slow, {name: s / slow for name, s in found.items()}))
            taken.sort(key=lambda pair: pair[0])
            half = taken if is_late else taken[: (len(taken) + 1) // 2]
            if len(taken) >= least and half[-1][0] <= self.AGREE * half[0][0]:
                break
            self.repeated += number >= least
        else:
            self.untrusted += 1
            if not taken:
                taken.append((0.0, dict(found)))
        half = taken[: (len(taken) + 1) // 2]
        return {name: statistics.median(one[name] for _, one in half) for name in half[0][1]}

    def correction(self, kind: int) -> float:
        """The canary's usual time of all moments over that of the first ones."""
        return self.usual[kind] / self._base[kind]

    def _look(self) -> tuple[float, ...]:
        self._seen.append(tuple(self.canary()))
        return self._seen[-1]

    @property
    def usual(self) -> tuple[float, ...]:
        """The canary's time in a quiet moment: of each kind, the fastest third's slowest."""
        return tuple(sorted(column)[len(self._seen) // 3] for column in zip(*self._seen, strict=True))

    def _wait(self) -> None:
        if self.wait_s > 0:
            self.sleep(0.1)
            self.wait_s -= 0.1

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of the canary where rounds count, by its quartiles."""
        found = []
        for column, usual in zip(zip(*self._seen, strict=True), self.usual, strict=True):
            logs = [math.log(one / usual) for one in column if one <= self.SLOW * usual]
            if len(logs) > 3:
                low, _, high = statistics.quantiles(logs, n=4)
                found.append((high - low) / 1.349)
        return max(found, default=0.0)


# A decoder with random weights ------------------------------------------------------------------------------


class Bench:
    """A native decoder of a spec with random weights of one format."""

    def __init__(
        self, spec: ModelSpec, layout: Format, threads: int, tokens: int, int8: bool = False
    ) -> None:
        self.spec, self.layout = spec, layout
        self.pages = -(-tokens // PAGE_TOKENS)
        self._decoder = _native.Decoder(decoder_config(spec), threads, self.pages, int8)
        self._kept: list[npt.NDArray[Any]] = []
        self._random = np.random.default_rng(7)
        for name, (rows, cols) in spec.linear_shapes().items():
            data = self._matrix(rows, cols)
            self._decoder.set_linear(name, data, rows, cols, *layout.native)
        for name, shape in spec.parameter_shapes().items():
            if len(shape) == 1:
                self._kept.append(np.ones(shape[0], np.float32))
                self._decoder.set_vector(name, self._kept[-1])
        self._decoder.check()

    def _matrix(self, rows: int, cols: int) -> npt.NDArray[np.uint8]:
        """Some packed rows of random values, again and again: zeros would be multiplied faster."""
        some = min(rows, 32)
        values = (self._random.standard_normal((some, cols)) * 0.02).astype(np.float32)
        raw = values.reshape(-1).view(np.uint8)
        piece = pack_linear(SourceTensor("random", (some, cols), "F32", raw), self.layout, threads=1).data
        whole = _native.allocate(self.layout.bytes_of(rows, cols))
        full = len(whole) // len(piece)
        whole[: full * len(piece)].reshape(full, len(piece))[:] = piece
        whole[full * len(piece) :] = piece[: len(whole) - full * len(piece)]
        self._kept.append(whole)
        return whole

    def fill(self) -> None:
        """Put keys and values into all pages: what was never written is one page of zeros, and in cache."""
        self.step(1, PAGE_TOKENS, 0, True, head=False)
        for page in range(1, self.pages):
            self._decoder.copy_page(0, page)

    def matrices(self) -> Iterator[tuple[tuple[int, int, bool], int, int]]:
        """As `choose_kernels` takes them."""
        for rows, cols in self.spec.linear_shapes().values():
            yield self.layout.native, cols, self.layout.bytes_of(rows, cols)

    def step(
        self, sequences: int, count: int, past: int, prompt: bool, head: bool = True
    ) -> dict[str, float]:
        """Seconds by operation of one step (`native/decoder.h`) over the sequences' own pages."""
        each = min(-(-(past + count) // PAGE_TOKENS), self.pages // sequences)
        tables = np.arange(sequences * each, dtype=np.int32).reshape(sequences, each)
        ids = np.arange(sequences * count, dtype=np.int32) * 7 % self.spec.vocab
        rows = np.arange(count - 1, sequences * count, count, dtype=np.int32)
        counts, pasts = np.full(sequences, count, np.int32), np.full(sequences, past, np.int32)
        self._decoder.profile(True)
        hidden = self._decoder.step(ids, counts, pasts, tables, np.zeros(sequences, np.uint8), rows, prompt)
        if head:
            self._decoder.head(hidden)
        return dict(self._decoder.profile(True))


def _linear_points(bench: Bench, found: Mapping[str, float]) -> Iterator[tuple[float, float]]:
    """(weights, seconds) of one product of each kind of a step; the head's where it ran."""
    spec, layers = bench.spec, len(bench.spec.blocks)
    sizes = {name: rows * cols for name, (rows, cols) in spec.blocks[0].linears(spec.width).items()}
    for op, names in {"qkv": "q k v", "out": "o", "gate+up": "gate up", "down": "down"}.items():
        yield sum(sizes[name] for name in names.split()), found[op] / layers
    if found["head"] and spec.vocab > 16:
        yield spec.vocab * spec.width, found["head"]


def _lines(benches: Sequence[Bench], mode: str, all_rows: Sequence[int], watch: Watch) -> dict[str, Curve]:
    """Curves of one format and mode: linear layers, norms, rotation, gates.

    A round is one step of every model: together they are more than the caches hold.
    """
    layout = benches[0].layout
    kind = "bf16" if layout.bits == 16 else "int"
    points: dict[str, list[Point]] = {}
    for rows in all_rows:
        sequences, count = (rows, 1) if mode == ANSWER else (1, rows)

        def once(sequences: int = sequences, count: int = count) -> dict[str, float]:
            taken = [bench.step(sequences, count, 0, mode == PROMPT) for bench in benches]
            return {f"{i} {op}": s for i, found in enumerate(taken) for op, s in found.items()}

        found = watch.rounds(once, READS if mode == ANSWER else COMPUTES)
        pairs: dict[str, list[tuple[float, float]]] = {}
        for number, bench in enumerate(benches):
            own = {op: found[f"{number} {op}"] for op in ("qkv", "out", "gate+up", "down", "head")}
            pairs.setdefault(f"linear {layout} {mode}", []).extend(_linear_points(bench, own))
            layers, spec = len(bench.spec.blocks), bench.spec
            for name, op, size, times in (
                (f"norm {kind} {mode}", "norm", spec.width, 2),
                (f"gated {kind} {mode}", "gated", spec.blocks[0].feed_forward.width, 1),
                (f"rope {mode}", "rope+kv", turned(spec.blocks[0].mixer), 1),
            ):
                pairs.setdefault(name, []).append((size, found[f"{number} {op}"] / layers / times))
        for name, of in pairs.items():
            points.setdefault(name, []).append(_through(rows, of))
    return {name: Curve(tuple(of)) for name, of in points.items()}


def _through(rows: int, pairs: Sequence[tuple[float, float]]) -> Point:
    """The line through (size, seconds); nothing where nothing took time."""
    units, seconds = zip(*pairs, strict=True)
    return Point(rows, 0.0, 0.0, 0.0) if min(seconds) <= 0 else line(rows, units, seconds)


def _format(layout: Format, threads: int, watch: Watch) -> dict[str, Curve]:
    answering = [Bench(spec, layout, threads, 32 * PAGE_TOKENS) for spec in ANSWERING]
    if layout.bits < 16:
        choose_kernels((m for bench in answering for m in bench.matrices()), threads)
    answer_rows, prompt_rows = _FEW if "-" in layout.name else (ANSWER_ROWS, PROMPT_ROWS)
    found = _lines(answering, ANSWER, answer_rows, watch)
    del answering
    reading = [Bench(spec, layout, threads, max(PROMPT_ROWS)) for spec in READING]
    return found | _lines(reading, PROMPT, prompt_rows, watch)


# Attention, choice, the engine's own work -------------------------------------------------------------------


def _attention(int8: bool, threads: int, watch: Watch) -> dict[str, Weighing]:
    """Both kinds of rows, for each size of a head, over shapes of heads, sequences and contexts."""
    kind, found = "int8" if int8 else "bf16", {}
    for dim in dict.fromkeys(heads[2] for heads in HEADS):
        points: dict[str, list[tuple[list[float], float]]] = {ANSWER: [], PROMPT: []}
        for heads in HEADS:
            if heads[2] == dim:
                answers, prompts = (
                    Bench(_blocks(layers, 256, 256, heads, 16), FORMATS["w8"], threads, tokens, int8)
                    for layers, tokens in ((_LAYERS, _KEYS), (1, _PAST))
                )
                _attend(answers, prompts, int8, watch, points)
        for mode, of in points.items():
            factors, error = non_negative(*zip(*of, strict=True))
            found[f"{kind} {mode} {dim}"] = Weighing(tuple(factors), error)
    return found


def _attend(
    answers: Bench,
    prompts: Bench,
    int8: bool,
    watch: Watch,
    points: dict[str, list[tuple[list[float], float]]],
) -> None:
    mixer = answers.spec.blocks[0].mixer
    answers.fill()
    prompts.fill()
    for sequences, context in ANSWER_CASES:
        # The canary between rounds reads so much that no cache holds these keys, as a model's weights do.
        def decode(sequences: int = sequences, context: int = context) -> dict[str, float]:
            return {"": answers.step(sequences, 1, context - 1, False, head=False)["attention"] / _LAYERS}

        features = answer_features(mixer, int8, sequences, sequences, context)
        points[ANSWER].append((features, watch.rounds(decode, READS, least=4)[""]))
    for past, count in PROMPT_CASES:

        def read(past: int = past, count: int = count) -> dict[str, float]:
            return {"": prompts.step(1, count, past, True, head=False)["attention"]}

        features = prompt_features(mixer, int8, past, count)
        points[PROMPT].append((features, watch.rounds(read, COMPUTES, least=3)[""]))


def _choice_s(threads: int, watch: Watch) -> float:
    """Seconds a logit of greedy choice over four rows."""
    logits = np.random.default_rng(1).standard_normal((4, _CHOICES)).astype(np.float32)
    samplers = [SequenceSampler(SamplingOptions(), (), _CHOICES) for _ in logits]

    def once() -> dict[str, float]:
        started = time.perf_counter()
        choose(logits, samplers, [()] * 4, [0] * 4, [None] * 4, [None] * 4, threads=threads)
        return {"choose": time.perf_counter() - started}

    return watch.rounds(once, READS, least=9)["choose"] / logits.size


class _Letters:
    """A tokenizer for what has no text: every token is one letter."""

    eos_ids: tuple[int, ...] = ()

    def stream(self, *_: object) -> TextStream:
        return TextStream(lambda _: "a", {"type": "ByteLevel"})


def _engine_s(threads: int, watch: Watch) -> tuple[float, float]:
    """Seconds of a step outside the kernels: of every step, and of each answer in it."""
    spec = _blocks(1, 64, 64, (1, 1, 64), 512)
    layout, random = FORMATS["w8"], np.random.default_rng(3)
    linears: dict[str, PackedLinear] = {}
    for name, shape in spec.linear_shapes().items():
        raw = random.standard_normal(shape).astype(np.float32).reshape(-1).view(np.uint8)
        linears[name] = pack_linear(SourceTensor(name, shape, "F32", raw), layout, threads=1)
    vectors = {n: np.ones(s[0], np.float32) for n, s in spec.parameter_shapes().items() if len(s) == 1}
    packed = PackedModel(spec, Recipe("w8", layout), linears, vectors)
    model = LoadedModel(packed, cast(Any, _Letters()), "letters", EngineOptions(threads=threads, context=256))
    try:
        few, many = (_around(model, batch, watch) for batch in (1, 16))
    finally:
        model.close()
    each = max(0.0, (many - few) / 15)
    return max(0.0, few - each), each


def _around(model: LoadedModel, batch: int, watch: Watch) -> float:
    """Seconds of a step outside the native decoder with so many answers."""
    decoder: Any = model.executor._decoder  # type: ignore[attr-defined]
    sampling = SamplingOptions(ignore_eos=True)
    requests = [Request((1, 2, 3), 40, sampling, id=str(i)) for i in range(batch)]

    def once() -> dict[str, float]:
        with Engine(model, ServingOptions(prefix_cache=False, speculate=False)) as engine:
            decoder.profile(True)
            started = time.perf_counter()
            for _ in engine.run(requests):
                pass
            seconds = time.perf_counter() - started
            return {"engine": (seconds - sum(decoder.profile(True).values())) / engine.stats().steps}

    return watch.rounds(once, COMPUTES)["engine"]


class Canary:
    """Two small steps of known speed: one that reads 380 MB of weights, one that computes 64 rows."""

    def __init__(self, threads: int) -> None:
        sizes = (1024, 3072, (16, 8, 128), 16)
        self._reading = Bench(_blocks(12, *sizes), FORMATS["bf16"], threads, 64)
        self._computing = Bench(_blocks(1, *sizes), FORMATS["bf16"], threads, 64)

    def __call__(self) -> tuple[float, float]:
        """Seconds of each."""
        reading, computing = self._reading.step(1, 1, 0, False), self._computing.step(1, 64, 0, True)
        return sum(reading.values()), sum(computing.values())


# All of it --------------------------------------------------------------------------------------------------


def calibrate(
    threads: int | None = None,
    formats: Sequence[str] = FORMATS_TIMED,
    say: Callable[[str], None] = lambda _: None,
    wait_s: float = 10.0,
) -> Calibration:
    """Measure this machine: under a minute where nobody else works on it, `wait_s` more where others do.

    Args:
        threads: to compute with; None: the cores this process may use.
        formats: of weights, by name.
        say: told of each stage.
        wait_s: to wait at most, in all, for quiet moments.

    Raises:
        MachineError: less than 3 GB of memory are free.
        UsageError: more threads than cores.
    """
    started, count = time.perf_counter(), threads_of(threads)
    free = available_bytes()
    if free is not None and free < _MEMORY:
        raise MachineError(
            f"calibrating fills {_MEMORY / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            hint="free some memory, or estimate for a machine by name: --machine h200",
        )
    watch = Watch(Canary(count), wait_s, until=started + _HURRY_S)
    watch.learn()
    curves: dict[str, Curve] = {}
    for name in formats:
        say(f"timing layers in {name}")
        curves |= {k: v for k, v in _format(FORMATS[name], count, watch).items() if k not in curves}
    say("timing attention and the engine's own work")
    attentions = _attention(False, count, watch) | _attention(True, count, watch)
    step_s, answer_s = _engine_s(count, watch)
    choose_s, isa = _choice_s(count, watch), _native.isa()
    reads, computes = watch.correction(READS), watch.correction(COMPUTES)
    return Calibration(
        cpu=processor_name(),
        isa=isa,
        threads=count,
        curves={k: c.scaled(reads if k.endswith(ANSWER) else computes) for k, c in curves.items()},
        attentions={k: a.scaled(reads if ANSWER in k else computes) for k, a in attentions.items()},
        choose_s=choose_s * reads,
        step_s=step_s * computes,
        answer_s=answer_s * computes,
        noise=watch.noise,
        canary_s=watch.usual,
        seconds=time.perf_counter() - started,
        repeated=watch.repeated,
        untrusted=watch.untrusted,
        timed=watch.timed,
        splits=isa == "amx",
    )


def load_or_calibrate(
    threads: int | None = None, *, fresh: bool = False, say: Callable[[str], None] = lambda _: None
) -> Calibration:
    """What was kept of this processor, instruction set, threads and build, else a new one, which is kept.

    Raises:
        MachineError, UsageError: as `calibrate`.
    """
    found = None if fresh else kept(threads)
    if found is not None:
        return found
    made = calibrate(threads, say=say)
    path, key = _place(threads_of(threads))
    with contextlib.suppress(DiskError):
        write_record(
            path, key, {k: v for k, v in as_json(made).items() if k not in ("source", "is_measured")}
        )
    return made


def kept(threads: int | None = None) -> Calibration | None:
    """What an earlier calibration measured, where there is one."""
    found = read_record(*_place(threads_of(threads)))
    return None if found is None else Calibration.from_json(found)


def _place(threads: int) -> tuple[Any, dict[str, Any]]:
    from hasten import __version__

    isa, built = _native.isa(), Path(_native.__file__).stat()
    key = {
        "cpu": processor_id(),
        "isa": isa,
        "threads": threads,
        "version": __version__,
        "build": [built.st_size, built.st_mtime_ns],
        "formats": list(FORMATS_TIMED),
        "form": 2,
    }
    return cache_dir() / "machine" / f"speed-{isa}-{threads}.json", key
