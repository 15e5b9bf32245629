"""How often the judge is right: many judgements whose answer is known, at the default size.

    python benchmarks/judgements.py [--recipes w8,w6,w5,w4] [--judgements 200]

Every recipe is compared with the source once, over 80 windows spread over the evaluation text. They are the
world: what a recipe costs in it is known, and a judgement sees 16 windows (8,192 tokens) drawn from it. For
each recipe's noise the token losses are moved so that the world's increase is exactly 0 (the source against
its equal) or exactly +0.5 %, and both are judged against a budget of 0: is it worse than the source?

- a false alarm: `fail` of the equal.
- a detection: `fail` of the one that is worse by 0.5 %. `insufficient` is no claim; `pass` is a wrong one.

Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import hasten
from bar import Bar, Settings, record, say
from hasten.core import Budget
from hasten.engine.loaded import fingerprint
from hasten.quality.divergence import BLOCK, KL_BLOCK, Divergence, Reference, States, interval, judge
from hasten.quality.text import WINDOW, default_text, windows

SIZE = 8192
"""Tokens of a judgement: the default of `hasten eval`."""
RISE = 0.005
CLUSTERS = (16, 64, 128, BLOCK, KL_BLOCK)
"""Tokens that are drawn together: what the choice of `BLOCK` and `KL_BLOCK` rests on."""


def compared(model: str, recipes: Sequence[str], threads: int, size: int) -> dict[str, list[Divergence]]:
    """Each recipe against the source, an entry for each of `size` windows."""
    source = hasten.load(model, "bf16", threads=threads, context=WINDOW)
    cut = windows(default_text().evaluation, source.tokenizer, tokens=size * WINDOW)
    held = Reference(source, cut, states=States(fingerprint(source), source.name))
    found = {}
    for recipe in recipes:
        started = time.monotonic()
        candidate = hasten.load(model, recipe, threads=threads, context=WINDOW)
        found[recipe] = [held.compare(candidate, index) for index in range(len(cut))]
        candidate.close()
        say(f"{recipe}: {len(cut)} windows in {time.monotonic() - started:.0f} s")
    return found


def moved(world: Sequence[Divergence], rise: float) -> list[Divergence]:
    """The same noise, with an increase of `rise` over the whole world."""
    whole = Divergence.join(world)
    shift = np.log1p(rise) - (whole.nll - whole.nll_source).mean()
    return [replace(one, nll=one.nll + shift) for one in world]


def verdicts(world: Sequence[Divergence], judgements: int, seed: int) -> dict[str, Any]:
    """How many judgements of samples of a world end in each verdict."""
    rng = np.random.default_rng(seed)
    counts = {"pass": 0, "fail": 0, "insufficient": 0}
    detectable = []
    for _ in range(judgements):
        drawn = rng.integers(0, len(world), SIZE // WINDOW)
        verdict = judge(Divergence.join(world[index] for index in drawn), Budget(0.0))
        counts[verdict.status] += 1
        detectable.append(verdict.ppl_detectable)
    return {**counts, "detectable": float(np.median(detectable))}


def coverage(world: Sequence[Divergence], judgements: int, seed: int) -> dict[str, Any]:
    """Share of intervals that hold the world's mean, by tokens drawn together: of the losses, and of KL."""
    whole = Divergence.join(world)
    truth = {"loss": (whole.nll - whole.nll_source).mean(), "kl": whole.kl.mean()}
    held = {name: dict.fromkeys(map(str, CLUSTERS), 0) for name in truth}
    rng = np.random.default_rng(seed)
    for _ in range(judgements):
        drawn = Divergence.join(world[index] for index in rng.integers(0, len(world), SIZE // WINDOW))
        for name, values in (("loss", drawn.nll - drawn.nll_source), ("kl", drawn.kl)):
            for cluster in CLUSTERS:
                sure = interval(values, cluster)
                held[name][str(cluster)] += int(sure.low <= truth[name] <= sure.high)
    return {name: {size: n / judgements for size, n in by.items()} for name, by in held.items()}


def examined(recipe: str, world: Sequence[Divergence], judgements: int) -> dict[str, Any]:
    """Everything about one recipe's noise."""
    whole = Divergence.join(world)
    return {
        "recipe": recipe,
        "tokens": whole.tokens,
        "kl_mean": float(whole.kl.mean()),
        "ppl_increase": float(np.expm1((whole.nll - whole.nll_source).mean())),
        "judgements": judgements,
        "equal": verdicts(moved(world, 0.0), judgements, 1),
        "worse": verdicts(moved(world, RISE), judgements, 2),
        "coverage": coverage(world, judgements, 3),
    }


def bars_of(found: Sequence[dict[str, Any]]) -> list[Bar]:
    """False alarms of each noise; detections where the judge says that it can see so much; no wrong claim."""
    bars = []
    for one in found:
        name, count = one["recipe"], one["judgements"]
        alarms, worse = one["equal"]["fail"] / count, one["worse"]
        bars.append(Bar(f"noise of {name}: false alarms", alarms, 0.05, "share", at_least=False))
        if worse["detectable"] <= RISE:
            bars.append(Bar(f"noise of {name}: +0.5 % detected", worse["fail"] / count, 0.9, "share"))
        wrong = worse["pass"] / count
        bars.append(Bar(f"noise of {name}: +0.5 % passed", wrong, 0.05, "share", at_least=False))
    return bars


def read(path: Path) -> dict[str, list[Divergence]]:
    """Comparisons that `--figures` wrote."""
    with np.load(path) as kept:
        return {
            name: [
                Divergence(*(part[k] for k in range(3)), part[3] > 0.5)
                for part in kept[name].transpose(1, 0, 2)
            ]
            for name in kept.files
        }


def write(path: Path, found: dict[str, list[Divergence]]) -> None:
    """Each recipe as [4, windows, tokens]."""
    arrays = {
        name: np.array([[getattr(one, column) for one in world] for column in COLUMNS], np.float64)
        for name, world in found.items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


COLUMNS = ("kl", "nll_source", "nll", "agree")


def main() -> int:
    """Compare, judge, print, write results/judgements.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", default="w8,w6,w5,w4")
    parser.add_argument("--judgements", type=int, default=200)
    parser.add_argument("--world", type=int, default=80, help="windows that are drawn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figures", type=Path, help="keep the comparisons here, or take them from here")
    given = parser.parse_args()
    if given.figures is not None and given.figures.is_file():
        found = read(given.figures)
    else:
        found = compared(given.model, given.recipes.split(","), given.threads, given.world)
        if given.figures is not None:
            write(given.figures, found)
    rows = [examined(recipe, world, given.judgements) for recipe, world in found.items()]
    text = default_text()
    details = {"size": SIZE, "rise": RISE, "blocks": {"loss": BLOCK, "kl": KL_BLOCK}, "noises": rows}
    details["text"] = {"name": text.name, "sha256": text.sha256}
    bars = bars_of(rows)
    settings = Settings(given.model, "", given.threads, 1, None, None)
    say(f"written: {record('judgements', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    raise SystemExit(main())
