"""The decode step at 2 to 64 rows on a GPU: checked, tuned and timed in one run.

    python benchmarks/gpu/batch_step.py --out benchmarks/results/gpu-batch.json    # three to four minutes

Random weights at real shapes, context 512 to 544, greedy token chosen and fed on the device, one CUDA graph a
batch size; medians of rounds of 32 steps. Every model is first compared with plain float32 torch, and one
sequence is decoded in changing company, whose logits must stay equal to the bit. `--tune` times every
candidate tile of every product first and uses the best; otherwise the step uses its own choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import batch_reference
import batch_tuning
import torch
from batch_models import CONTEXT, copy_bandwidth, random_weights

from hasten.runtime.gpu.batch_step import BatchStep, StepOptions
from hasten.runtime.gpu.batch_weights import AttentionTile, Product, Tile
from hasten.speed.cost import page_bytes

BARS = {("0.6B", "bf16"): (12_000, 30_000), ("8B", "bf16"): (3_500, 11_000), ("8B", "fp8"): (5_200, 15_000)}
FIRST, STEPS, ROUNDS = 512, 32, 5
EARLY = {"0.6B": 2, "8B": 1}  # the level of dependent launch that tiles are tuned at
VARIANTS = ((0, False), (1, False), (2, False), (0, True))  # dependent launch, logits kept
SIZES = (2, 4, 8, 16, 32, 64)
Choice = dict[int, dict[Any, Any]]  # padded rows -> product or "attention" -> tile


# ---- compiling beforehand ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """Kernels that a worker compiles: of one product with one tile, or a whole step."""

    model: str
    precision: str
    rows: int
    product: Product | None = None
    tile: Tile | AttentionTile | None = None
    choice: Any = None
    early: int = 0
    logits: bool = False


_META: dict[tuple[str, str], Any] = {}


def compile_job(job: Job) -> str:
    """Runs in a worker, without the GPU; what it compiled is in Triton's cache."""
    import triton
    from batch_compile import _NoDevice, compiling

    triton.runtime.driver.set_active(_NoDevice())
    key = job.model, job.precision
    weights = _META.setdefault(key, None) or random_weights(*key, "meta")
    _META[key] = weights
    options = StepOptions(64, 32, CONTEXT, keep_logits=job.logits, early=job.early)
    step = BatchStep(weights, options, *_overrides(job.choice))
    shape = step.shape(job.rows, FIRST + STEPS)
    try:
        with compiling():
            if job.product is not None:
                tried = batch_tuning.with_tile(shape, job.product, job.tile)  # type: ignore[arg-type]
                getattr(step, job.product)(tried, *([0] if job.product != "head" else []))
            elif job.tile is not None:
                step.attention(dataclasses.replace(shape, attention=job.tile), 0)
            else:
                step.run(shape)
    except Exception as error:  # noqa: BLE001 - reported; the run goes on
        return f"{job}: {error}"[:300]
    return ""


def _overrides(choice: Choice | None) -> tuple[Any, Any]:
    if choice is None:
        return None, None
    return (lambda product, m: choice[m][product]), (
        lambda rows, is_int8: choice[16 if rows <= 16 else 64]["attention"]
    )


def compile_all(pool: ProcessPoolExecutor, jobs: list[Job]) -> None:
    start = time.time()
    failed = [message for message in pool.map(compile_job, jobs) if message]
    print(f"compiled {len(jobs)} jobs in {time.time() - start:.0f} s", *failed, sep="\n", flush=True)


# ---- one model ---------------------------------------------------------------------------------------


def new_step(weights: Any, choice: Choice | None, rows: int = 64, **options: Any) -> BatchStep:
    """A step whose cache holds random keys and values, every sequence at position FIRST."""
    pages = rows * CONTEXT // 32
    step = BatchStep(weights, StepOptions(rows, pages, CONTEXT, **options), *_overrides(choice))
    generator = torch.Generator("cuda").manual_seed(7)
    for cache in (*step.keys, *step.values):
        cache.normal_(generator=generator)
    reset(step)
    return step


def reset(step: BatchStep) -> None:
    rows, pages = step.options.rows, step.options.pages
    generator = torch.Generator().manual_seed(3)
    step.table[:rows] = torch.randperm(pages, generator=generator).reshape(rows, -1).to(step.table)
    step.tokens[:rows] = torch.randint(0, step.weights.config.vocab, (rows,), generator=generator).to(
        step.tokens
    )
    step.positions[:rows] = FIRST


def tuned(model: str, precision: str, step: BatchStep, record: dict[str, Any]) -> Choice:
    """The best tiles for 16, 32 (as 64) and 64 rows."""
    choice: Choice = {}
    for rows in (16, 64):
        reset(step)
        shape = step.shape(rows, FIRST + STEPS)
        step.run(shape)
        choice[rows] = {}
        for product in batch_tuning.PRODUCTS:
            found = batch_tuning.tune(
                step, shape, product, batch_tuning.candidates(model, precision, product)
            )
            cublas = batch_tuning.library(step, rows, product)
            choice[rows][product] = found[0][1]
            key = f"{model} {precision} {rows} {product}"
            record[key] = {
                "library_us": round(cublas, 2),
                "tiles": [[round(t, 2), *dataclasses.astuple(x)] for t, x in found],
            }
            print(
                f"{key:28} library {cublas:7.2f}  "
                + "  ".join(f"{t:.2f} {dataclasses.astuple(x)}" for t, x in found[:4]),
                flush=True,
            )
        reset(step)
        attention = batch_tuning.tune_attention(step, shape)
        choice[rows]["attention"] = attention[0][1]
        record[f"{model} {precision} {rows} attention"] = [
            [round(t, 2), *dataclasses.astuple(x)] for t, x in attention
        ]
        print(
            f"{model} {precision} {rows} attention  "
            + "  ".join(f"{t:.2f} {dataclasses.astuple(x)}" for t, x in attention[:10]),
            flush=True,
        )
    choice[32] = choice[64]
    return choice


def check(weights: Any, choice: Choice | None) -> dict[str, Any]:
    """Against plain torch, and the law: equal to the bit in any company."""
    step, found = new_step(weights, choice, keep_logits=True), {}
    for rows in (16, 64):
        reset(step)
        step.positions[:rows:3] -= 300  # rows of different lengths
        for buffer in (step.buffers.logits, step.buffers.residual, step.buffers.plain):
            buffer.fill_(float("nan"))
        layer = batch_reference.relative_error(*batch_reference.first_layer(step, rows))
        found[f"layer_error_{rows}"] = round(layer, 6)
        expected, exact = (batch_reference.logits(step, rows, exact=exact) for exact in (False, True))
        step.step(rows, FIRST + 1)
        logits = step.buffers.logits[:rows]
        found[f"noise_{rows}"] = round(batch_reference.relative_error(expected, exact), 6)
        found[f"error_{rows}"] = round(batch_reference.relative_error(logits, expected), 6)
        tops = expected.topk(2).values
        agrees = (step.tokens[:rows] == expected.argmax(-1)) | (tops[:, 0] - tops[:, 1] < 0.05)
        found[f"tokens_{rows}"] = f"{int(agrees.sum())}/{rows}"
        found[f"picked_{rows}"] = bool((step.tokens[:rows] == logits.argmax(-1)).all())
    alone = batch_reference.Company(step, 400)
    expected_logits, expected_tokens = alone.decode(64, 5, 1, 1000)
    same_size = [
        (64, 0, 2, 1000),
        (64, 63, 3, 1000),
        (64, 40, 4, 1024),
        (64, 17, 5, 500),
    ]  # the last: another graph
    other_sizes = [(32, 9, 6, 1000), (48, 40, 7, 1000), (16, 3, 8, 1000), (2, 1, 9, 1000)]
    for name, cases in (("law_same_size", same_size), ("law_other_sizes", other_sizes)):
        equal = []
        for case in cases:
            logits, tokens = alone.decode(*case)
            equal.append(bool(torch.equal(logits, expected_logits) and torch.equal(tokens, expected_tokens)))
        found[name] = equal
    small, small_tokens = alone.decode(16, 3, 11, 1000)
    again, again_tokens = alone.decode(16, 12, 12, 1000)
    found["law_16"] = bool(torch.equal(small, again) and torch.equal(small_tokens, again_tokens))
    found["logits_finite"] = bool(expected_logits.isfinite().all())
    return found


def timed(step: BatchStep, rows: int) -> float:
    """Median microseconds a step."""
    times = []
    for _ in range(ROUNDS + 1):
        reset(step)
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        step.step(rows, FIRST + STEPS)
        reset(step)
        begin.record()
        for _ in range(STEPS):
            step.step(rows, FIRST + STEPS)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / STEPS)
    return statistics.median(times[1:])


def parts_of(step: BatchStep, rows: int) -> dict[str, float]:
    """Microseconds of each kernel, alone and back to back over all layers."""
    reset(step)
    shape, layers = step.shape(rows, FIRST + STEPS), range(len(step.weights.config.blocks))
    step.run(shape)
    found = {}
    for name in ("qkv", "attention", "o", "gate_up", "down"):
        kernel = getattr(step, name)
        found[name] = batch_tuning.microseconds(
            lambda kernel=kernel: [kernel(shape, i) for i in layers] and None, len(layers)
        )  # type: ignore[misc]
    found["head"] = batch_tuning.microseconds(lambda: step.head(shape), 1)

    def ends() -> None:
        step.begin(shape)
        step.look_up(shape)
        step.pick(shape)

    found["ends"] = batch_tuning.microseconds(ends, 1)
    return {name: round(value, 2) for name, value in found.items()}


def measure(model: str, precision: str, weights: Any, choice: Choice | None) -> list[dict[str, Any]]:
    c, rows_out = weights.config, []
    steps = {level: new_step(weights, choice, early=level) for level in (0, 1, 2)}
    with_logits = new_step(weights, choice, keep_logits=True)
    for rows in SIZES:
        kv = rows * (FIRST + STEPS // 2) * page_bytes(c, False, 1)
        row: dict[str, Any] = {
            "model": model,
            "precision": precision,
            "rows": rows,
            "bytes": weights.bytes + kv,
        }
        times = {level: timed(step, rows) for level, step in steps.items()}
        best = min(times, key=times.__getitem__)
        row["us"], row["tok_s"] = round(times[best], 1), round(rows / times[best] * 1e6)
        row["early"], row["us_by_level"] = best, {level: round(us, 1) for level, us in times.items()}
        row["tb_per_s"] = round(row["bytes"] / times[best] / 1e6, 2)
        bars = dict(zip((16, 64), BARS[model, precision], strict=True))
        if rows in bars:
            row["bar"], row["pass"] = bars[rows], row["tok_s"] >= bars[rows]
            row["us_with_logits"] = round(timed(with_logits, rows), 1)
            row["kernels_us"] = {level: parts_of(steps[level], rows) for level in (0, best)}
        rows_out.append(row)
        print(json.dumps(row), flush=True)
    return rows_out


def whole_steps(model: str, precision: str, choice: Choice | None) -> list[Job]:
    """Every whole step that is checked or timed."""
    variants = [(rows, *variant) for rows in (16, 32, 64) for variant in VARIANTS]
    return [
        Job(model, precision, rows, None, None, choice, early, logits) for rows, early, logits in variants
    ]


def tuning_jobs(model: str, precision: str) -> list[Job]:
    """Every tile that is tried, and the steps they are tried in."""
    jobs = []
    for rows in (16, 64):
        jobs.append(Job(model, precision, rows, early=EARLY[model]))
        for product in batch_tuning.PRODUCTS:
            tiles = batch_tuning.candidates(model, precision, product)
            jobs += [Job(model, precision, rows, product, tile, early=EARLY[model]) for tile in tiles]
        jobs += [
            Job(model, precision, rows, None, tile, early=EARLY[model]) for tile in batch_tuning.ATTENTION
        ]
    return jobs


def run(pool: ProcessPoolExecutor, key: tuple[str, str], is_tuned: bool, record: dict[str, Any]) -> None:
    """Everything about one model."""
    weights, choice = random_weights(*key), None
    if is_tuned:
        choice = tuned(*key, new_step(weights, None, early=EARLY[key[0]]), record["tuning"])
        compile_all(pool, whole_steps(*key, choice))
    record["checks"][" ".join(key)] = found = check(weights, choice)
    print(*key, found, flush=True)
    record["rows"] += measure(*key, weights, choice)
    del weights
    torch.cuda.empty_cache()


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["-".join(key) for key in BARS]
    parser.add_argument("--out", type=Path, required=True, help="where the record goes")
    parser.add_argument("--only", nargs="*", default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--tune", nargs="*", default=[], help="models whose tiles are tried first")
    parser.add_argument("--workers", type=int, default=15, help="processes that compile")
    parser.add_argument("--commit", default="", help="where there is no git: what is measured")
    return parser.parse_args()


def main() -> None:
    arguments, start = arguments_of(), time.time()
    wanted = [key for key in BARS if "-".join(key) in arguments.only]
    is_tuned = {key: "-".join(key) in arguments.tune for key in wanted}
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record: dict[str, Any] = {
        "machine": f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "commit": arguments.commit or head,
        "command": " ".join(["python", *sys.argv]),
        "rows": [],
        "checks": {},
        "tuning": {},
    }
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        first = [tuning_jobs(*key) if is_tuned[key] else whole_steps(*key, None) for key in wanted]
        compile_all(pool, [job for jobs in first for job in jobs])
        record["copy_tb_per_s"] = round(copy_bandwidth() / 1e12, 3)
        for key in wanted:
            run(pool, key, is_tuned[key], record)
            record["seconds"] = round(time.time() - start)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        if "bar" in row:
            verdict = "PASS" if row["pass"] else "MISSED"
            name = f"{row['model']} {row['precision']} {row['rows']:3} rows"
            print(f"{name}: {row['tok_s']:6} tok/s, bar {row['bar']:6} {verdict}")
    print(f"copy {record['copy_tb_per_s']} TB/s; {record['seconds']} s")


if __name__ == "__main__":
    main()
