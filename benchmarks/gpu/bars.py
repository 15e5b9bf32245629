"""The bars of decoding on a GPU, measured through `Engine` in one run.

    python benchmarks/gpu/bars.py [--only TEXT] [--saturated]    # four to ten minutes on an H200

Random weights at real shapes, context 512 to 552, greedy, tokens detokenised and delivered; medians of
steps. Every bar is a row of benchmarks/results/gpu-bars.json; those that nothing here measures say why.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from batch_models import MODELS, copy_bandwidth, random_tensor
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from hasten.core import EngineOptions, ModelSpec, Recipe, ServingOptions
from hasten.engine.model import LanguageModel, load
from hasten.engine.request import Request
from hasten.models.tokenizer import Tokenizer
from hasten.quality.text import default_text, windows
from hasten.runtime.executor import Draw, Executor, Part
from hasten.runtime.gpu.chain import SIZES, Row
from hasten.runtime.gpu.executor import GpuExecutor
from hasten.runtime.gpu.shape import WeightFormat
from hasten.runtime.gpu.tiles import Tensors, Weights, rounded
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import SamplingOptions, SequenceSampler
from hasten.speed.cost import page_bytes
from hasten.weights.artifact import write_artifact
from hasten.weights.packed import PackedModel, pack_linear
from hasten.weights.tensors import SourceTensor

RESULTS = Path(__file__).parents[1] / "results" / "gpu-bars.json"
GREEDY = SamplingOptions(ignore_eos=True)
CONTEXT = 1024  # tokens a sequence may have
PROMPT = 512
GEMM = {"bf16": 750e12, "fp8": 1350e12}  # FLOP/s measured on such a machine
DECODE = {
    "0.6B bf16": (1800, 12_000, 30_000),
    "8B bf16": (262, 3_500, 11_000),
    "8B fp8": (410, 5_200, 15_000),
    "8B int4": (500,),
}
"""Bars of 1, 16 and 64 sequences, tok/s."""
INT4 = WeightFormat("int4", 128)
SATURATED = {"8B bf16": 11_000, "8B fp8": 16_000}
KV: dict[Literal["int8", "bf16"], str] = {"int8": "", "bf16": ", keys and values in bf16"}
"""How keys and values are kept, and how rows of many requests are called then."""
TIE = 1e-2  # logits this close may be taken either way
DEMO = "demo model, GPU bf16 against CPU bf16, tokens before the first tie"
STARTS = {"first ever": 20, "cubins cached": 8}
START = """
import sys, time
began = time.perf_counter()
import torch
from hasten.core import EngineOptions
from hasten.engine.model import LanguageModel
from hasten.models.artifact import load_artifact
imported = time.perf_counter()
artifact = load_artifact(sys.argv[1])
verified = time.perf_counter()
model = LanguageModel(artifact.packed, artifact.tokenizer, "8B", EngineOptions(device="cuda"))
loaded = time.perf_counter()
token = next(iter(model.stream(list(range(300, 812)), 1)))
now = time.perf_counter()
print(imported - began, verified - imported, loaded - verified, now - loaded, flush=True)
"""
STAGES = ("import_s", "verify_s", "load_s", "prompt_s")
ROOT = Path(__file__).parents[2]


@cache
def words(count: int) -> Tokenizer:
    """A tokenizer of as many words as a model has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab | {f"Ġw{i:x}": i for i in range(len(vocab), count)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        return Tokenizer.from_folder(folder)


def tensors_of(config: ModelSpec, precision: str) -> Tensors:
    """Random weights."""

    def tensor(name: str) -> torch.Tensor | None:
        return random_tensor(config, name, "cuda")

    def tile(name: str) -> Weights:
        value = tensor(name)
        assert value is not None
        return rounded(value, INT4)

    if precision != "int4":
        return Tensors(tensor, precision, precision)  # type: ignore[arg-type]
    linears = config.linear_shapes()
    return Tensors(lambda name: tile(name).values() if name in linears else tensor(name), tiles=tile)


@contextmanager
def opened(
    model: str,
    precision: str,
    sequences: int,
    context: int = CONTEXT,
    kv: Literal["bf16", "int8"] = "bf16",
) -> Iterator[LanguageModel]:
    """A model of random weights behind the engine."""
    config = MODELS[model]
    packed = PackedModel(config, Recipe(precision, kv=kv), {})
    options = EngineOptions(1, context, sequences, 8192, device="cuda")
    tensors = tensors_of(config, precision)
    with behind_engine(
        f"{model} {precision}", packed, options, lambda: GpuExecutor(packed, options, tensors=tensors)
    ) as running:
        yield running


@contextmanager
def behind_engine(
    name: str, packed: PackedModel, options: EngineOptions, make: Callable[[], Executor]
) -> Iterator[LanguageModel]:
    """A model whose executor `make` loads."""
    running = LanguageModel.__new__(LanguageModel)
    running.name, running.packed, running.options = name, packed, options
    running.tokenizer = words(packed.config.vocab)
    began = time.perf_counter()
    running.executor = make()
    running.executor.device = "cuda"
    print(f"{name}: ready in {time.perf_counter() - began:.1f} s, {running.executor.summary}", flush=True)
    try:
        yield running
    finally:
        running.close()
        gc.collect()
        torch.cuda.empty_cache()


def requests(model: LanguageModel, count: int, prompt: int, output: int, seed: int = 1) -> list[Request]:
    ids = np.random.default_rng(seed).integers(300, model.config.vocab, (count, prompt))
    return [Request(tuple(one), output, GREEDY, id=f"{seed}.{i}") for i, one in enumerate(ids.tolist())]


def decode_times(model: LanguageModel, count: int, output: int, seed: int) -> tuple[list[float], float]:
    """Seconds of each step in which all sequences got a token, and seconds spent outside the executor."""
    times = []
    with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
        for request in requests(model, count, PROMPT, output, seed):
            engine.add(request)
        last = None
        before = 0.0
        while engine.busy:
            outputs = engine.step()
            now = time.perf_counter()
            if len(outputs) == count and all(one.token_ids for one in outputs):
                if last is not None:
                    times.append(now - last)
                else:
                    before = engine.counters.schedule_s
                last = now
            else:
                last = None
        outside = (engine.counters.schedule_s - before) / max(1, len(times))
    return times[8:], outside


def bare_step(model: LanguageModel, count: int, steps: int = 64) -> float:
    """Seconds of a step of the device alone: launched one behind another, nothing read."""
    executor: Any = model.executor
    executor._chain = None
    rows, per = executor._rows(count), -(-CONTEXT // 32)
    state = [Row(1000 + i, PROMPT, list(range(i * per, (i + 1) * per))) for i in range(count)]
    found = []
    for _ in range(4):
        rows.start(state)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        for n in range(steps):
            rows.launch(PROMPT + 1 + n)
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / steps)
    return statistics.median(found[1:])


def prompt_time(model: LanguageModel, tokens: int) -> float:
    """Seconds from a prompt to its first token, a median."""
    executor, sampler, times = model.executor, SequenceSampler(GREEDY, [], model.config.vocab), []
    ids = np.random.default_rng(5).integers(300, model.config.vocab, tokens).tolist()
    for _ in range(4):
        sequence = CachedSequence()
        torch.cuda.synchronize()
        began = time.perf_counter()
        executor.collect(executor.submit([Part(sequence, ids, True, draws=(Draw(sampler, tokens),))]))
        times.append(time.perf_counter() - began)
        executor.pool.truncate(sequence, 0)
    return statistics.median(times[1:])


def git_commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


class Table(Protocol):
    """Where rows go."""

    def add(
        self, name: str, value: float | None, bar: float | None, unit: str, at_most: bool = False, **more: Any
    ) -> None:
        """A row, as `row_of` makes it."""


def row_of(
    name: str, value: float | None, bar: float | None, unit: str, at_most: bool = False, **more: Any
) -> dict[str, Any]:
    """A measurement and whether it passes its bar, if it has one.

    `value` None: it was not measured, and `why` is among `more`.
    """
    is_good = None
    if bar is not None:
        is_good = value is not None and (value <= bar if at_most else value >= bar)
    return {"name": name, "value": value, "bar": bar, "unit": unit, "pass": is_good, **more}


class Bars:
    """The record, written anew after every row."""

    def __init__(self, path: Path, commit: str | None, is_added: bool, command: str, gpus: int = 1) -> None:
        self.path, self.commit = path, commit or git_commit()
        name = torch.cuda.get_device_name()
        self.value: dict[str, Any] = {
            "machine": f"{name if gpus == 1 else f'{gpus} x {name}'}, torch {torch.__version__}",
            "date": date.today().isoformat(),
            "commit": self.commit,
            "command": command,
            "bars": json.loads(path.read_text())["bars"] if is_added else [],
        }

    def add(
        self, name: str, value: float | None, bar: float | None, unit: str, at_most: bool = False, **more: Any
    ) -> None:
        """See `Table`."""
        self.keep(row_of(name, value, bar, unit, at_most, **more))

    def keep(self, row: dict[str, Any]) -> None:
        """A row in the place of one with its name."""
        row["commit"] = self.commit
        self.value["bars"] = [*(one for one in self.value["bars"] if one["name"] != row["name"]), row]
        print(json.dumps(row), flush=True)
        self.path.write_text(json.dumps(self.value, indent=1) + "\n")


def decode(bars: Bars, model: LanguageModel, label: str, count: int, bar: float) -> None:
    """Tokens a second of `count` sequences, and what of it is the host's."""
    decode_times(model, count, 16, 2)  # compiles and captures
    runs = [decode_times(model, count, 40, seed) for seed in (3, 4, 5)]
    times, outside = [one for found, _ in runs for one in found], statistics.median(run[1] for run in runs)
    step, bare = statistics.median(times), bare_step(model, count)
    bars.add(
        f"{label}, batch {count}", count / step, bar, "tok/s", step_us=step * 1e6, bare_us=bare * 1e6,
        python_us=outside * 1e6, mean_us=statistics.mean(times) * 1e6,
    )  # fmt: skip
    waits, name = max(0.0, step - bare), f"host time a step that the GPU waits for, {label}, batch {count}"
    if count == 1:
        bars.add(name, waits * 1e6, 10, "us", at_most=True)
    elif count == 64:
        bars.add(name, waits / step, 0.05, "share", at_most=True)


def prefill(bars: Bars, model: LanguageModel, label: str, precision: str) -> None:
    """The rate of one prompt of 8k tokens, products of layers alone counted as work."""
    config, tokens = model.config, 8192
    mixer, seconds = config.blocks[0].mixer, prompt_time(model, tokens)
    flops = 2 * (config.weights_read - config.vocab * config.width) * tokens
    flops += 2 * 2 * tokens * tokens // 2 * mixer.heads * mixer.head_dim * len(config.blocks)
    bars.add(f"{label} prefill of 8k tokens", flops / seconds / GEMM[precision], 0.65, "of the GEMM rate",
             seconds=seconds, tok_s=tokens / seconds)  # fmt: skip


def long_context(bars: Bars, model: LanguageModel, name: str, bandwidth: float) -> None:
    """Batch 1 at 32k tokens of context: bytes of weights, keys and values over the copy bandwidth."""
    with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
        (request,) = requests(model, 1, 32768, 96, 7)
        engine.add(request)
        times, last = [], None
        while engine.busy:
            outputs, now = engine.step(), time.perf_counter()
            if outputs and last is not None:
                times.append(now - last)
            last = now if outputs else None
    step = statistics.median(times[8:])
    executor: Any = model.executor
    read = executor._weights.bytes + page_bytes(model.config, False, 1) * 32768
    bars.add(name, read / bandwidth / step, 0.75, "of copy bandwidth",
             step_us=step * 1e6, tok_s=1 / step)  # fmt: skip


def saturated(bars: Bars, model: LanguageModel, label: str, bar: float, count: int) -> None:
    """Output tokens a second of many requests of 1,000 in, 1,000 out, by a server whose graphs are there."""
    step: Any = model.executor._batch.step  # type: ignore[attr-defined]
    step.positions.fill_(-1)
    sizes = [size for size in SIZES if size <= step.options.rows]
    for rows, length in product(sizes, (1024, 2048)):
        step.step(rows, length)
    gc.collect()
    gc.freeze()  # as `hasten serve` does, and the line below: 5 of 36 s went into walking what stays anyway
    gc.set_threshold(10_000)
    began = first = time.perf_counter()
    made = 0
    with model.engine(ServingOptions(prefix_cache=False, speculate=False, max_waiting=count)) as engine:
        for output in engine.run(requests(model, count, 1000, 1000, 11)):
            if not made:
                first = time.perf_counter()
            made += len(output.token_ids)
        python, preemptions = engine.counters.schedule_s, engine.stats().preemptions
    seconds = time.perf_counter() - began
    gc.unfreeze()
    bars.add(
        label, made / seconds, bar, "tok/s", seconds=seconds, first_s=first - began, python_s=python,
        preemptions=preemptions, kv=model.packed.recipe.kv,
    )  # fmt: skip


def start(bars: Bars) -> None:
    """From a process's start to its first token: an 8B artifact whose files are in the page cache."""
    config = MODELS["8B"]
    with tempfile.TemporaryDirectory() as folder:
        place, environment = Path(folder) / "model.hasten", dict(os.environ)
        environment |= {"HASTEN_CACHE": f"{folder}/cache", "TRITON_CACHE_DIR": f"{folder}/triton"}
        write_artifact(place, packed_8b(config), {"name": "8B"}, {}, words(config.vocab).save, {}, 16)
        gc.collect()
        for name, bar in STARTS.items():
            began = time.perf_counter()
            command = [sys.executable, "-c", START, str(place)]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                line, seconds = process.stdout.readline(), time.perf_counter() - began
            stages = dict(zip(STAGES, map(float, line.split()), strict=True))
            bars.add(f"process start to first token, 8B artifact, {name}", seconds, bar, "s", True, **stages)


def packed_8b(config: ModelSpec) -> PackedModel:
    """Random weights as an artifact holds them."""
    linears, vectors = {}, {}
    for name, shape in config.parameter_shapes().items():
        value = random_tensor(config, name, "cuda")
        assert value is not None
        if len(shape) == 1:
            vectors[name] = value.float().cpu().numpy()
        else:
            data = value.cpu().view(torch.uint8).numpy().reshape(-1)
            linears[name] = pack_linear(SourceTensor(name, shape, "BF16", data), None, threads=16)
    return PackedModel(config, Recipe("bf16"), linears, vectors)


def equality(bars: Bars) -> None:
    """The tests that compare tiny models of every architecture with transformers, on this GPU."""
    tests = str(ROOT / "tests/runtime/gpu/test_executor.py")
    command = [sys.executable, "-m", "pytest", "-n", "8", "-p", "no:cacheprovider", "-k", "cuda", tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    passed, total = counted(done.stdout)
    name = "every architecture, tiny, against transformers and the CPU engine; pairs of features"
    why = {} if total else {"why": (done.stdout + done.stderr)[-500:]}
    bars.add(name, passed / total if total else None, 1, "of the tests", tests=total, **why)


def counted(progress: str) -> tuple[int, int]:
    """Tests that passed, and that ran, of pytest's lines of dots."""
    marks = "".join(re.findall(r"^([.FEs]+)(?: |$)", progress, re.MULTILINE))
    return marks.count("."), len(marks) - marks.count("s")


def demo(bars: Bars, path: Path) -> None:
    """Greedy tokens of the GPU against those of the CPU, both bf16, up to the CPU's first near tie."""
    cpu, gpu = greedy_answers(path, "cpu"), greedy_answers(path, "cuda")
    counted = equal = 0
    for name, (wanted, gaps) in cpu.items():
        before = next((at for at, gap in enumerate(gaps) if gap < TIE), len(gaps))
        pairs = list(zip(wanted[:before], gpu[name][0], strict=False))
        counted += before
        equal += next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    prompts = len(cpu)
    bars.add(DEMO, equal / counted, 0.95, "share", tokens=counted, prompts=prompts, of=64 * prompts)


def greedy_answers(path: Path, device: Literal["cpu", "cuda"]) -> dict[str, tuple[list[int], list[float]]]:
    """64 greedy tokens after each of 64 pieces of a text, and how far the second logit lies below."""
    options = EngineOptions(max_sequences=64, context=256, device=device)
    found: dict[str, tuple[list[int], list[float]]] = {}
    with closing(load(path, "bf16", options=options, store=False)) as model:
        pieces = windows(default_text().evaluation, model.tokenizer, tokens=64 * 64, length=64)
        logprobs = 2 if device == "cpu" else None
        asked = [
            Request(tuple(map(int, piece.inputs)), 64, GREEDY, id=str(i), logprobs=logprobs)
            for i, piece in enumerate(pieces)
        ]
        with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
            for output in engine.run(asked):
                tokens, gaps = found.setdefault(output.request_id, ([], []))
                tokens += output.token_ids
                gaps += [one.top[0][1] - one.top[1][1] for one in output.logprobs]
    return found


def guarded(bars: Table, name: str, bar: float, work: Callable[[], None]) -> None:
    """One measurement; what goes wrong is its row."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the other rows go on
        traceback.print_exc(limit=8)
        bars.add(name, None, bar, "", why=repr(error)[:400])


def compile_beforehand(wanted: list[list[str]]) -> None:
    """Kernels into Triton's cache by many processes; one process would wait for each in turn."""
    from batch_step import Job, compile_all

    jobs = [
        Job(model, precision, rows, early=2 if model == "0.6B" and rows <= 16 else 1)
        for model, precision in wanted
        for rows in (16, 64)
    ]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        compile_all(pool, jobs)


def measure(bars: Bars, label: str, rows: tuple[float, ...]) -> None:
    """One model in one precision: 1 to 64 sequences, a long prompt and a long context."""
    name, precision = label.split()
    with opened(name, precision, 64) as model:
        for count, bar in zip((1, 16, 64), rows, strict=False):
            guarded(bars, f"{label}, batch {count}", bar, partial(decode, bars, model, label, count, bar))
    if label not in SATURATED:
        return
    with opened(name, precision, 2, 33_792) as model:
        guarded(bars, f"{label} prefill of 8k tokens", 0.65, partial(prefill, bars, model, label, precision))
        if precision == "bf16":
            bandwidth = bars.value["copy_bytes_per_s"]
            name = "8B bf16, batch 1, 32k context"
            guarded(bars, name, 0.75, partial(long_context, bars, model, name, bandwidth))


def measure_saturated(bars: Bars, label: str, count: int, kinds: list[Literal["int8", "bf16"]]) -> None:
    """Many requests at once, with keys and values in each of these kinds."""
    bar = SATURATED[label]
    for kv, end in ((kind, KV[kind]) for kind in kinds):
        name = f"{label}, 500 requests of 1,000 in / 1,000 out{end}"
        if not count:
            bars.add(name, None, bar, "tok/s", why="not asked for: --saturated 500")
            continue
        sequences = 512 if kv == "int8" else 256
        with opened("8B", label.split()[1], sequences, 2048, kv) as model:
            guarded(bars, name, bar, partial(saturated, bars, model, name, bar, count))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="what has this text: 0.6B, 8B bf16, 8B fp8, requests, start, equality"
    )
    parser.add_argument("--saturated", type=int, default=0, metavar="N", help="also so many long requests")
    parser.add_argument("--kv", nargs="*", choices=KV, help="how keys and values of these are kept")
    parser.add_argument("--demo", type=Path, help="the demo model's file, which is compared with the CPU's")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep the record's other rows")
    parser.add_argument("--commit", help="of this tree, where it has no repository")
    options = parser.parse_args()
    chosen = {label: rows for label, rows in DECODE.items() if options.only in label}
    if wanted := [label.split() for label in chosen if len(DECODE[label]) > 1]:
        compile_beforehand(wanted)
    bars = Bars(options.json, options.commit, options.add, "python benchmarks/gpu/bars.py --saturated 500")
    bars.value["copy_bytes_per_s"] = copy_bandwidth()
    torch.cuda.empty_cache()
    for label, rows in chosen.items():
        measure(bars, label, rows)
    for label in SATURATED if options.saturated or not options.add else ():
        if options.only in label or options.only == "requests":
            measure_saturated(bars, label, options.saturated, options.kv or list(KV))
    if options.only in ("", "start"):
        guarded(bars, "process start to first token, 8B artifact", 8, partial(start, bars))
    if options.only in ("", "equality"):
        guarded(bars, "every architecture, tiny, against transformers", 1, partial(equality, bars))
    if options.demo is not None:
        guarded(bars, DEMO, 0.95, partial(demo, bars, options.demo))
    elif not options.add:
        bars.add(DEMO, None, 0.95, "share", why="not asked for: --demo PATH")


if __name__ == "__main__":
    main()
