"""What `hasten optimize` is worth: against measuring everything, and beside a process that disturbs it.

    python benchmarks/search.py space               a space of 48 recipes, all of them measured (20 minutes)
    python benchmarks/search.py choices --runs 10   ten searches beside a process that takes a core at random

Space: widths 8, 6, 5 and 4 in groups of 32, 64 and 128, the head in 8 or 6 bits, keys and values in bf16 or
int8. Each is packed, judged on all tokens and timed as a search does it, without leaving anything out. The
best of those within the budget is then raced against what `hasten optimize` chose, in turn on the same
prompts. Bars: at most 3 % slower, in at most a quarter of the time. (The search also tries recipes that are
not in the space, so it may come out faster.)

Choices: each search begins with an empty cache. The other process works for 0.2 to 3 s on one core and sleeps
as long, drawn anew each time. Bar: the same choice in nine of ten.

Run it on a machine where nothing else runs: all of it is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import hasten
from hasten.bench.figures import steady
from hasten.bench.measure import rates_of
from hasten.compress.result import Progress
from hasten.core import Budget, EngineOptions, Recipe, as_json
from hasten.machine.probe import probe
from hasten.optimize.choice import Aims, cost_of
from hasten.optimize.prospect import OptimizeResult
from hasten.optimize.race import Lap, Racer, race
from hasten.optimize.search import BASELINE, Effort, optimize
from hasten.optimize.workshop import Built, Timed, Workshop
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import default_text, windows

RECORD = Path(__file__).parent / "results" / "search.json"
SPACE = tuple(
    f"w{bits}-g{group}-head{head}{kv}"
    for bits, group, head, kv in product((8, 6, 5, 4), (32, 64, 128), (8, 6), ("", "-kv8"))
)
BEST, SHARE, ALIKE = 1.03, 0.25, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("space", "choices"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=10, help="searches of `choices`")
    parser.add_argument("--out", type=Path, default=RECORD)
    asked = parser.parse_args()
    record = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    record |= {
        "model": asked.model,
        "version": hasten.__version__,
        "machine": as_json(probe(measure=False)),
        asked.what: space(asked.model) if asked.what == "space" else choices(asked.model, asked.runs),
    }
    asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record[asked.what].items() if k != "points"}, indent=1))


def told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def searched(model: str, folder: Path) -> tuple[OptimizeResult, float]:
    """One search with an empty cache, without calibration, and its seconds."""
    os.environ["HASTEN_CACHE"] = str(folder / "cache")
    began = time.perf_counter()
    found = optimize(model, out=folder / "chosen.hasten", calibrate=False, observer=_said)
    return found, time.perf_counter() - began


def _said(progress: Progress) -> None:
    if progress.candidate is not None:
        told(f"  {progress.detail}: {progress.candidate.verdict.status}")


# A space, all of it -----------------------------------------------------------------------------------------


def space(model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        chosen, seconds = searched(model, Path(folder))
        began = time.perf_counter()
        points = measured(model)
        spent = time.perf_counter() - began
        passing = [one for one in points if one["status"] == "pass"]
        best = min(passing, key=lambda one: one["cost_ms"])
        slower = beside(model, chosen.chosen.recipe, best["recipe"])
    return {
        "command": "python benchmarks/search.py space",
        "chosen": chosen.chosen.recipe.name,
        "best": best["recipe"],
        "ratio": slower,
        "search_seconds": seconds,
        "space_seconds": spent,
        "share_of_time": seconds / spent,
        "bars": {"ratio": slower <= BEST, "share_of_time": seconds / spent <= SHARE},
        "points": points,
    }


def measured(model: str) -> list[dict[str, Any]]:
    """Every point of the space: packed, judged on all tokens, timed."""
    workshop, aims, effort = Workshop(model, EngineOptions()), Aims(), Effort()
    source = workshop.build(BASELINE)
    cut = windows(default_text().evaluation, workshop.tokenizer(), tokens=effort.tokens)
    reference, points = Reference(source, cut), []
    for name in SPACE:
        told(name)
        built = workshop.build(Recipe.parse(name))
        try:
            verdict = evaluate(built, reference, Budget())
            points.append({"recipe": name, **as_json(verdict), "cost_ms": cost_ms(workshop, built, aims)})
        finally:
            built.close()
    source.close()
    return points


def cost_ms(workshop: Workshop, built: Built, aims: Aims) -> float:
    """Milliseconds of the workload's request, median of three runs after a warm-up."""
    work = aims.workload
    workshop.run(built, work, 0)
    found = steady(lambda number: workshop.run(built, work, number), rates_of, Effort().runs)
    return cost_of(workshop.measurement(built, work, Timed(found.rounds, found.disturbed)), aims.goal)


def beside(model: str, ours: Recipe, best: str, rounds: int = 9) -> float:
    """Median ratio of a request's time, ours over the best of the space, in rounds of both."""
    workshop, work = Workshop(model, EngineOptions()), Aims().workload
    models = {"ours": workshop.build(ours), "best": workshop.build(Recipe.parse(best))}

    def racer(name: str) -> Racer:
        workshop.run(models[name], replace(work, output=8), 0)
        return Racer(name, lambda number: Lap(workshop.run(models[name], work, number)))

    standings = race([racer("ours"), racer("best")], seconds_of, least=rounds)
    costs = {name: {n: seconds_of(lap) for n, lap in one.laps.items()} for name, one in standings.items()}
    for model_built in models.values():
        model_built.close()
    return statistics.median(costs["ours"][n] / costs["best"][n] for n in costs["ours"] if n in costs["best"])


def seconds_of(lap: Lap) -> float:
    return lap.sample.whole_s


# The same choice --------------------------------------------------------------------------------------------


def choices(model: str, runs: int) -> dict[str, Any]:
    found, seconds = [], []
    with neighbour():
        for number in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                result, spent = searched(model, Path(folder))
            found.append(result.chosen.recipe)
            seconds.append(spent)
            told(f"{number + 1} of {runs}: {result.chosen.recipe.name} in {spent:.0f} s")
    names = Counter(one.name for one in found)
    often = max(names.values())
    return {
        "command": f"python benchmarks/search.py choices --runs {runs}",
        "chosen": dict(names),
        "different_recipes": len({json.dumps(as_json(one), sort_keys=True) for one in found}),
        "seconds": seconds,
        "same_share": often / runs,
        "bars": {"same_share": often / runs >= ALIKE},
    }


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that takes a core at random moments."""
    other = multiprocessing.get_context("spawn").Process(target=_works_and_sleeps, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.kill()
        other.join()


def _works_and_sleeps() -> None:
    draw = random.Random(0)
    while True:
        until = time.perf_counter() + draw.uniform(0.2, 3.0)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.uniform(0.2, 3.0))


if __name__ == "__main__":
    main()
