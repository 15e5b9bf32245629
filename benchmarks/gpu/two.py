"""Tensor parallel on several GPUs of one host: checked, timed and recorded in one run.

    python benchmarks/gpu/two.py [--only TEXT] [--ranks 2]    # about six minutes on two H200

Each part is a process of its own, under a limit of its own: what hangs costs its own rows. Random weights at
real shapes, context 512 to 552, greedy, through `Engine`. Rows go to benchmarks/results/gpu-two.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batch_models import MODELS, copy_bandwidth

from bars import (
    GREEDY,
    Bars,
    behind_engine,
    decode_times,
    guarded,
    prompt_time,
    requests,
    row_of,
    tensors_of,
)
from hasten.core import EngineOptions, ModelSpec, Recipe, ServingOptions
from hasten.engine.model import LanguageModel
from hasten.errors import HastenError
from hasten.runtime.executor import Executor
from hasten.runtime.gpu.executor import GpuExecutor
from hasten.runtime.gpu.parallel import LeadingExecutor
from hasten.runtime.gpu.tiles import Tensors
from hasten.speed.cost import page_bytes
from hasten.weights.packed import PackedModel
from hasten.weights.plan import FlatConfig

RESULTS = Path(__file__).parents[1] / "results" / "gpu-two.json"
EXCHANGES = {1: (8, 6.0), 16: (128, 8.0), 64: (512, 9.0)}
"""Rows of 4,096 bf16 values: kilobytes, and the bar in microseconds."""
WIDTH = 4096
PROMPT, CONTEXT = 512, 1024
TINY = {
    "llama": FlatConfig("llama", 1024, 256, 512, 4, 8, 4, 64, 2048, norm_eps=1e-5),
    "qwen3": FlatConfig("qwen3", 1023, 256, 512, 4, 4, 2, 128, 2048, qk_norm="head", tied_head=True),
    "gemma3": FlatConfig(
        "gemma3", 1024, 256, 512, 4, 4, 1, 64, 2048, activation="gelu_tanh", norm_placement="sandwich",
        qk_norm="head", embed_scale=16.0, tied_head=True, logit_softcap=20.0,
    ),
}  # fmt: skip
SHAPES: dict[str, ModelSpec] = {
    **MODELS,
    "70B": FlatConfig(
        "llama", 128256, 8192, 28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
        context_length=8192, norm_eps=1e-5, rope_theta=5e5,
    ).spec(),
    **{f"tiny {name}": config.spec() for name, config in TINY.items()},
}  # fmt: skip


def random_tensors(packed: PackedModel, device: str) -> Tensors:
    """Random weights, the same on every rank."""
    return tensors_of(packed.config, packed.recipe.name)


@contextmanager
def opened(
    model: str, precision: str, ranks: int, sequences: int, context: int = CONTEXT
) -> Iterator[LanguageModel]:
    """A model of random weights behind the engine, on one GPU or several; on 0, in plain torch on a CPU."""
    packed = PackedModel(SHAPES[model], Recipe(precision), {})
    options = EngineOptions(1, context, sequences, 8192, device="cuda", tensor_parallel=max(1, ranks))

    def make() -> Executor:
        if ranks > 1:
            return LeadingExecutor(packed, options, maker="two:random_tensors")
        return GpuExecutor(packed, options, ("cpu", "cuda")[ranks], random_tensors(packed, "cuda"))

    with behind_engine(f"{model} {precision} on {ranks}", packed, options, make) as running:
        yield running


class Rows:
    """The rows of one part, printed as they come: the parent reads them."""

    def add(
        self, name: str, value: float | None, bar: float | None, unit: str, at_most: bool = False, **more: Any
    ) -> None:
        """See `Table`."""
        print("ROW " + json.dumps(row_of(name, value, bar, unit, at_most, **more)), flush=True)


def tokens_of(model: LanguageModel, count: int, prompt: int, output: int, together: bool) -> list[list[int]]:
    """Greedy tokens of some prompts."""
    found: dict[str, list[int]] = {}
    wanted = requests(model, count, prompt, output, 9)
    with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
        for some in [wanted] if together else [[one] for one in wanted]:
            for out in engine.run(some):
                found.setdefault(out.request_id, []).extend(out.token_ids)
    return [found[one.id] for one in wanted]


def equal_until_a_tie(
    model: LanguageModel, tokens: list[list[int]], others: list[list[int]], tie: float
) -> tuple[int, int]:
    """(tokens that are equal, tokens) up to each text's first token whose margin is less than `tie`."""
    same = total = 0
    for request, mine, its in zip(requests(model, len(tokens), 64, 1, 9), tokens, others, strict=True):
        logits = model.logits([*request.prompt, *mine])[len(request.prompt) - 1 : -1]
        top = np.sort(np.partition(logits, -2, axis=1)[:, -2:], axis=1)
        is_tie = top[:, 1] - top[:, 0] < tie
        first = next((i for i, (a, b) in enumerate(zip(mine, its, strict=True)) if a != b), len(mine))
        ties = np.flatnonzero(is_tie)
        end = min(len(mine), int(ties[0]) if len(ties) else len(mine))
        same, total = same + min(first, end), total + end
    return same, total


def outputs(model: LanguageModel, count: int, output: int) -> tuple[np.ndarray, list[Any]]:
    """Logits of a prompt, greedy tokens of prompts together (graphs) and one by one (persistent kernel)."""
    ids = requests(model, 1, 64, 1, 3)[0].prompt
    alone = tokens_of(model, min(8, count), 64, output, False)
    return model.logits(ids), [tokens_of(model, count, 64, output, True), alone]


def compared(rows: Rows, label: str, reference: LanguageModel, found: Any, output: int) -> None:
    """Outputs of several GPUs against those of a model that is open."""
    count = len(found[1][0])
    logits, tokens = outputs(reference, count, output)
    error = float(np.sqrt(np.mean((found[0] - logits) ** 2)) / logits.std())
    rows.add(f"{label}: logits", error, 0.03, "of their spread", True)
    for which, how in enumerate((f"{count} prompts together", "one by one")):
        tie = 4 * error * float(logits.std())
        same, total = equal_until_a_tie(reference, tokens[which], found[1][which], tie)
        name = f"{label}: greedy tokens, {how}, before a tie"
        rows.add(name, same / max(1, total), 0.99, "equal", tokens=total, tie=tie)


def small(rows: Rows, name: str, precision: str, ranks: int) -> None:
    """A small model on several GPUs against plain torch on a CPU."""
    with opened(name, precision, ranks, 64) as model:
        found = outputs(model, 12, 16)
    with opened(name, precision, 0, 64) as model:
        compared(rows, f"{name} {precision}, {ranks} GPUs against a CPU", model, found, 16)


def tiny(rows: Rows, ranks: int) -> None:
    """Small models: every kernel of the way, before anything large."""
    for name, precision in (("llama", "bf16"), ("qwen3", "bf16"), ("gemma3", "bf16"), ("llama", "fp8")):
        guarded(rows, f"tiny {name} {precision}", 0, partial(small, rows, f"tiny {name}", precision, ranks))


def step_time(model: LanguageModel, count: int) -> tuple[float, float]:
    """Seconds of a step in which `count` sequences get a token, and seconds in which Python does not wait."""
    decode_times(model, count, 16, 2)  # compiles and captures
    executor, spent = model.executor, list[float]()
    submit = executor.submit

    def timed(parts: Any) -> Any:
        began = time.perf_counter()
        ticket = submit(parts)
        spent.append(time.perf_counter() - began)
        return ticket

    executor.submit = timed  # type: ignore[method-assign]
    try:
        runs = [decode_times(model, count, 40, seed) for seed in (3, 4)]
    finally:
        del executor.submit
    python = statistics.median(run[1] for run in runs) + statistics.median(spent)
    return statistics.median(t for run in runs for t in run[0]), python


def eight(rows: Rows, ranks: int) -> None:
    """8B in bf16: decode, prefill and equality, several GPUs and one."""
    seconds: dict[str, dict[int, float]] = {"1": {}, "64": {}, "16": {}, "prefill": {}}
    outside: dict[str, float] = {}
    found: Any = None
    for n in (ranks, 1):
        with opened("8B", "bf16", n, 64, 8704) as model:
            for count in (1, 64, 16):
                name = f"8B bf16 on {n}, batch {count}"
                guarded(rows, name, 0, partial(_timed, model, count, n, seconds, outside))
            guarded(rows, f"8B prefill on {n}", 0, partial(_prompted, model, n, seconds))
            if n != 1:
                found = outputs(model, 64, 32)
            else:
                guarded(
                    rows,
                    "8B bf16",
                    0,
                    partial(compared, rows, f"8B bf16, {ranks} GPUs against one", model, found, 32),
                )
    for count, bar in (("1", 1.5), ("64", 1.6), ("16", None), ("prefill", 1.7)):
        one, several = seconds[count].get(1), seconds[count].get(ranks)
        if one and several:
            tokens = 8192 if count == "prefill" else int(count)
            what = "prefill of 8k" if count == "prefill" else f"batch {count}"
            rows.add(f"8B bf16, {what}, {ranks} GPUs over one", one / several, bar, "times", one=tokens / one,
                     several=tokens / several, python_us=outside.get(count))  # fmt: skip


def _prompted(model: LanguageModel, n: int, seconds: Any) -> None:
    seconds["prefill"][n] = prompt_time(model, 8192)
    print(f"{n} GPUs, prefill: {8192 / seconds['prefill'][n]:.0f} tok/s", flush=True)


def _timed(model: LanguageModel, count: int, n: int, seconds: Any, outside: Any) -> None:
    seconds[str(count)][n], python = step_time(model, count)
    outside[str(count)] = python * 1e6
    print(f"{n} GPUs, batch {count}: {count / seconds[str(count)][n]:.0f} tok/s", flush=True)


def seventy(rows: Rows, ranks: int) -> None:
    """A 70B shape in fp8 at batch 1: bytes that a GPU reads over what it can read in the time."""
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    with opened("70B", "fp8", ranks, 1) as model:
        step, _ = step_time(model, 1)
        executor: Any = model.executor
        read = executor._weights.bytes + page_bytes(model.config, False, 1) * PROMPT / ranks
        rows.add(f"70B shape fp8, batch 1, {ranks} GPUs", read / bandwidth / step, 0.75, "of their reading",
                 tok_s=1 / step, bytes_a_gpu=read, copy_bytes_per_s=bandwidth)  # fmt: skip


def lost(how: signal.Signals, name: str, rows: Rows, ranks: int) -> None:
    """A rank that gets a signal: how long until the stream ends, and how many ranks are left."""
    with opened("tiny llama", "bf16", ranks, 4) as model:
        executor: Any = model.executor
        processes = [link.process for link in executor._crew.links]
        stream = model.stream(list(range(300, 364)), 900, GREEDY)
        for _ in range(20):
            next(stream)
        os.kill(processes[-1].pid, how)
        began = time.monotonic()
        try:
            list(stream)
            said = "it went on"
        except HastenError as error:
            said = error.message
        seconds = time.monotonic() - began
    left = sum(process.poll() is None for process in processes)
    rows.add(f"a rank {name}: seconds until its streams end", seconds, 5, "s", True, left=left, said=said)


def exchange(rows: Rows, ranks: int) -> None:
    """All-reduce with residual and norm in a graph, and sums of prompts."""
    from two_exchange import lead

    lead(rows, ranks, EXCHANGES, WIDTH)


PARTS: dict[str, tuple[int, Callable[[Rows, int], None]]] = {
    "tiny": (100, tiny),
    "exchange": (60, exchange),
    "8B bf16": (200, eight),
    "70B fp8": (150, seventy),
    "lost dies": (50, partial(lost, signal.SIGKILL, "dies")),
    "lost hangs": (50, partial(lost, signal.SIGSTOP, "hangs")),
}
"""The seconds that each part may take, and what measures it."""


def run_part(name: str, ranks: int, take: Callable[[dict[str, Any]], None]) -> None:
    """One part in a process of its own; its rows as they come."""
    limit, _ = PARTS[name]
    command = [sys.executable, __file__, "--part", name, "--ranks", str(ranks)]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ROW "):
            take(json.loads(line[4:]))
        else:
            print(line, end="", flush=True)
    timer.cancel()
    print(f"part {name}: exit code {process.wait()} after {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="parts with this text; several with commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep the record's other rows")
    parser.add_argument("--commit", help="of this tree, where it has no repository")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        _, measure = PARTS[options.part]
        guarded(Rows(), options.part, 0, partial(measure, Rows(), options.ranks))
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    is_added = options.add and options.json.exists()
    record = Bars(options.json, options.commit, is_added, "python benchmarks/gpu/two.py", options.ranks)
    for name in PARTS:
        if any(text in name for text in options.only.split(",")):
            run_part(name, options.ranks, record.keep)


if __name__ == "__main__":
    main()
