"""What estimates are worth: predictions of the speed model against measured runs that it never saw.

    python benchmarks/predict.py                  all rounds, then the record
    python benchmarks/predict.py --rounds 1       less

Calibration (`hasten.bench.calibrate`) times layers with random weights of three other models' sizes. Here the
demo model runs through the engine as in `hasten bench`: seven recipes, three batches, three prompt lengths.
Recipes take turns, so that a slow minute of the machine does not fall on one of them alone.

A machine that others use too is not the same from one second to the next. `raw` is what was measured, the
median of the fastest half of the rounds. `steady` is the median of rounds that are each divided by how slow
the calibration's two steps of known speed were in between. Last, each recipe's peak of memory in a process of
its own.

Bars: median error of time to the first token and time a token at most 8 %, 90th percentile at most 20 %, nine
tenths of the intervals hold the truth, memory within 5 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hasten
from hasten.bench.calibrate import COMPUTES, READS, Canary, load_or_calibrate
from hasten.bench.figures import percentile
from hasten.bench.measure import PromptRing, default_text, run_once
from hasten.core import EngineOptions, Format, Recipe, ServingOptions, Workload, as_json
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.machine.probe import probe
from hasten.models.open import open_model
from hasten.runtime.sampling import SamplingOptions
from hasten.speed.fit import Calibration
from hasten.speed.forecast import Case, Forecast, forecast, memory_of
from hasten.weights.packed import source_layout

RECIPES = ("bf16", "w8", "w6", "w5", "w4", "w4-kv8", "source")
BATCHES = (1, 4, 8)
PROMPTS = (64, 256, 768)
OUTPUT = 24
RECORD = Path(__file__).parent / "results" / "predict.json"
MEMORY_CASE = Workload(512, 32, 4)
Key = tuple[str, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--calibrate", action="store_true", help="time the machine again first")
    parser.add_argument("--peak", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RECORD)
    asked = parser.parse_args()
    if asked.peak:
        print(json.dumps(peak(asked.model, asked.peak)))
        return
    calibration = load_or_calibrate(fresh=asked.calibrate, say=told)
    found: dict[Key, list[Run]] = {}
    for number in range(asked.rounds):
        told(f"round {number + 1} of {asked.rounds}")
        measure(asked.model, calibration, found)
        record = compared(asked.model, calibration, found)
        record["rounds"], record["memory"] = number + 1, []
        asked.out.write_text(json.dumps(record, indent=1) + "\n")  # what was measured stays if it is stopped
    record["memory"] = [memory(asked.model, name) for name in RECIPES]
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("steady", "raw")}, indent=1))
    print(*(f"{one['recipe']}: {one['error']:+.1%}" for one in record["memory"]))


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(ref: str, calibration: Calibration, found: dict[Key, list[Run]]) -> None:
    """One round of every point, behind those that were found."""
    canary = Canary(calibration.threads)
    for name in RECIPES:
        told(name)
        model = hasten.load(ref, name, options=EngineOptions(context=2048))
        ring = PromptRing(model.tokenizer.encode(default_text(), add_special=False))
        run_once(model, ring.round(0, Workload(64, 4, 1)), 4)
        for batch in BATCHES:
            for prompt in PROMPTS:
                work = Workload(prompt, OUTPUT, batch)
                run = one_run(model, ring.round(1, work), canary, calibration.canary_s)
                found.setdefault((name, batch, prompt), []).append(run)
        model.close()


@dataclass(frozen=True)
class Run:
    """Milliseconds of one run, as they were, and at the speed that the machine had when it was calibrated."""

    ttft_ms: float
    tpot_ms: float
    steady_ttft_ms: float
    steady_tpot_ms: float


def one_run(model: LanguageModel, prompts: list[list[int]], canary: Canary, usual: tuple[float, ...]) -> Run:
    """A run as `hasten bench` makes it, step by step; the canary is timed between prompt steps and before and
    after decoding, and its time is nobody's."""
    sampling = SamplingOptions(ignore_eos=True)
    raw = {True: 0.0, False: 0.0}  # seconds until all have a first token, and after
    steady, waiting, made = dict(raw), {str(i) for i in range(len(prompts))}, 0
    before = canary()
    with model.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(Request(tuple(prompt), OUTPUT, sampling, id=str(number)))
        decoding: list[float] = []
        while engine.busy:
            started, reading = time.perf_counter(), bool(waiting)
            news = engine.step()
            seconds = time.perf_counter() - started
            for one in news:
                made += 0 if reading else len(one.token_ids)
                waiting -= {one.request_id} if one.token_ids else set()
            raw[reading] += seconds
            if reading:
                after = canary()
                steady[True] += seconds * 2 * usual[COMPUTES] / (before[COMPUTES] + after[COMPUTES])
                before = after
            else:
                decoding.append(seconds)
    slow = (before[READS] + canary()[READS]) / (2 * usual[READS])
    each = 1e3 * len(prompts) / made
    return Run(1e3 * raw[True], each * raw[False], 1e3 * steady[True], each * sum(decoding) / slow)


def usual(values: list[float]) -> float:
    """The median of the fastest half: other work can only slow a round down."""
    return statistics.median(sorted(values)[: (len(values) + 1) // 2])


def recipe_of(ref: str, name: str) -> Recipe:
    recipe = Recipe.parse(name)
    if name != "source":
        return recipe
    kept = {n: source_layout(t) for n, t in open_model(ref).tensors.items() if len(t.shape) == 2}
    return Recipe(name, default=Format.of(16), layers=kept)


def compared(ref: str, calibration: Calibration, found: dict[Key, list[Run]]) -> dict[str, Any]:
    """The record: every point with its prediction, and errors."""
    spec, points = open_model(ref).config, []
    for (name, batch, prompt), runs in found.items():
        case = Case(Workload(prompt, OUTPUT, batch))
        guess = forecast(spec, recipe_of(ref, name), case, calibration)
        points.append(point(guess, runs))
    return {
        "model": ref,
        "version": hasten.__version__,
        "command": "python benchmarks/predict.py",
        "machine": as_json(probe(measure=False)),
        "calibration": {
            key: getattr(calibration, key)
            for key in ("isa", "threads", "seconds", "noise", "repeated", "untrusted", "step_s", "choose_s")
        },
        "points": points,
        **{
            which: {
                "ttft": errors([one[f"{which}_ttft_ms"] for one in points]),
                "tpot": errors([one[f"{which}_tpot_ms"] for one in points]),
                "all": errors([one[f"{which}_{k}_ms"] for one in points for k in ("ttft", "tpot")]),
            }
            for which in ("steady", "raw")
        },
    }


def point(guess: Forecast, runs: list[Run]) -> dict[str, Any]:
    assert guess.decode_tok_per_s is not None
    work = guess.case.workload
    figures: dict[str, Any] = {"recipe": guess.recipe, "batch": work.batch, "prompt": work.prompt}
    tpot = guess.decode_tok_per_s.per(1e3 * work.batch)
    for kind, predicted, values in (
        ("steady_ttft_ms", guess.ttft_ms, [run.steady_ttft_ms for run in runs]),
        ("steady_tpot_ms", tpot, [run.steady_tpot_ms for run in runs]),
        ("raw_ttft_ms", guess.ttft_ms, [run.ttft_ms for run in runs]),
        ("raw_tpot_ms", tpot, [run.tpot_ms for run in runs]),
    ):
        truth = usual(values) if kind.startswith("raw") else statistics.median(values)
        figures[kind] = {
            "predicted": predicted.value,
            "low": predicted.low,
            "high": predicted.high,
            "measured": truth,
            "runs": values,
            "error": predicted.value / truth - 1,
            "inside": predicted.low <= truth <= predicted.high,
        }
    return figures


def errors(figures: list[dict[str, Any]]) -> dict[str, Any]:
    off = [abs(one["error"]) for one in figures]
    return {
        "points": len(off),
        "median_error": statistics.median(off),
        "p90_error": percentile(off, 0.9),
        "bias": statistics.median(one["error"] for one in figures),
        "inside": sum(one["inside"] for one in figures) / len(figures),
    }


def memory(ref: str, name: str) -> dict[str, Any]:
    """Predicted and measured peak of a process that does MEMORY_CASE alone."""
    command = [sys.executable, __file__, "--model", ref, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    truth = json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"]
    guess = memory_of(open_model(ref).config, recipe_of(ref, name), Case(MEMORY_CASE))
    return {
        "recipe": name,
        "predicted": guess.total,
        "parts": as_json(guess),
        "measured": truth,
        "error": guess.total / truth - 1,
    }


def peak(ref: str, name: str) -> dict[str, Any]:
    from hasten.machine.memory import peak_rss_bytes

    model = hasten.load(ref, name, options=EngineOptions(context=2048))
    ring = PromptRing(model.tokenizer.encode(default_text()[:20_000], add_special=False))
    run_once(model, ring.round(0, MEMORY_CASE), MEMORY_CASE.output)
    return {"peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    main()
