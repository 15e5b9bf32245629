"""What widths by layer gain: the map, a mixture against a uniform recipe of the same bits, `mix:1%`.

    python benchmarks/mixture.py --method gptq
    python benchmarks/mixture.py --method rtn --parts map,equal

`map`     measures the map and how far its predictions are off; the integers it needs are calibrated before
          the clock starts, as their time belongs to calibration.
`equal`   uniform recipes (`--uniform`) against the mixtures with the least predicted harm in as many bytes,
          by the same method and judged on the evaluation text, which none of them saw. Every group gets
          integers of 4 to 8 bits: keeping the source's own values would be cheating where a file is
          quantised already. Half of the demo model's file is Q5_0, whose values w5 holds exactly: there
          uniform w5 is a recipe by layer itself, and little is left to win.
`budget`  `mix:1%` and uniform int8, timed in turn.

Quality does not need a quiet machine, `budget`'s speed does. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import hasten
from bar import Bar, Settings, record, say
from hasten.bench.figures import paired_ratio
from hasten.bench.measure import PromptRing, run_once
from hasten.bench.measure import default_text as bench_text
from hasten.compress.result import Progress
from hasten.core import Budget, EngineOptions, Recipe, Verdict, Workload, as_json
from hasten.errors import HastenError
from hasten.optimize.calibrated import is_calibrated, split
from hasten.optimize.mixture import lightest, mixture_recipe, predicted_harm
from hasten.optimize.sensitivity import PROBE, Choice, SensitivityMap, draw, groups, measure_harms
from hasten.optimize.workshop import Workshop
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import default_text, windows

TOKENS = 8192
MAP_SECONDS = 150.0
UNIFORM = "w4,w4-head8,w5,w6"
"""What mixtures of the same bytes are held against."""
LIMITS = {"map_s": 300.0, "gain": 0.30, "bits": 5.5, "decode": 1.25}
RUNS_WORKLOAD = Workload(prompt=64, output=96)


def gentlest(menus: Sequence[Sequence[Choice]], most_bytes: float) -> list[Choice] | None:
    """One choice a group with the least summed harm in at most `most_bytes`; None if nothing is so small.

    The other side of `lightest`: the limit in harm is halved until the lightest set just fits. Costs 40 of
    its runs.
    """
    low, high = 0.0, sum(max(c.harm for c in menu) for menu in menus) * 1.02 + 1e-30
    best = lightest(menus, high)
    if best is None or sum(c.bytes for c in best) > most_bytes:
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5 if low > 0 else high / 4
        found = lightest(menus, middle)
        if found is not None and sum(c.bytes for c in found) <= most_bytes:
            best, high = found, middle
        else:
            low = middle
        if high < 1e-12 or (low > 0 and high / low < 1.0005):
            break
    return best


class Mixtures:
    """The model, and what both parts need of it."""

    def __init__(self, settings: Settings, method: str) -> None:
        self.settings, self.method = settings, method
        self.text = default_text()
        self.workshop = Workshop(settings.model, EngineOptions(threads=settings.threads))
        self._said = ""
        if method != "rtn":
            self.workshop.calibrate(self.text, self.watch)
        self.source = self.workshop.build(Recipe.parse("bf16"))

    def watch(self, progress: Progress) -> None:
        """One line a stage."""
        if progress.stage != self._said:
            self._said = progress.stage
            say(f"{progress.stage}: {progress.detail}")

    def measured_map(self) -> tuple[SensitivityMap, float]:
        """The map, and the seconds it took once the integers were there."""
        say("calibrating what the map needs")
        for group in groups(self.workshop.config):
            for name in group.tensors if is_calibrated(PROBE, self.method) else ():
                self.workshop.calibrated_linear(name, PROBE)
        began = time.perf_counter()
        harms = measure_harms(
            self.workshop,
            self.source,
            split(self.text.calibration)[1],
            seconds=MAP_SECONDS,
            observer=self.watch,
            method=self.method,
        )
        drawn = draw(self.workshop, harms, method=self.method)
        return drawn, time.perf_counter() - began

    def judged(self, recipe: Recipe, held: Reference) -> tuple[Verdict, float]:
        """Quality on the evaluation text, and bits a weight."""
        model = self.workshop.build(recipe)
        try:
            found = evaluate(model, held, Budget(0.01))
        finally:
            model.close()
        say(f"{recipe.name}: {model_bits(recipe, self.workshop):.3f} bits, KL {found.kl_mean:.5f}")
        return found, model_bits(recipe, self.workshop)


def model_bits(recipe: Recipe, workshop: Workshop) -> float:
    """Stored bits a weight of a recipe that keeps nothing."""
    bits = recipe.bits_per_weight(workshop.config)
    assert bits is not None
    return bits


def equal_bits(mixtures: Mixtures, drawn: SensitivityMap, names: list[str]) -> tuple[list[Bar], Any]:
    """Uniform recipes, each against the gentlest mixture in its bytes."""
    tokenizer = mixtures.workshop.tokenizer()
    held = Reference(mixtures.source, windows(mixtures.text.evaluation, tokenizer, tokens=TOKENS))
    bars: list[Bar] = []
    details: dict[str, Any] = {}
    for name in names:
        uniform, mixture = pair(drawn, Recipe.parse(name))
        flat, flat_bits = mixtures.judged(uniform, held)
        mixed, mixed_bits = mixtures.judged(mixture, held)
        gain = 1 - mixed.kl_mean / flat.kl_mean
        bars += [
            Bar(f"{mixtures.method}: KL of the mixture below {name}", gain, LIMITS["gain"], "share"),
            Bar(f"bits of the mixture over those of {name}", mixed_bits - flat_bits, 0.0, "bits", False),
        ]
        details[name] = {
            kind: {
                "bits_per_weight": bits,
                "predicted_kl": predicted_harm(recipe, drawn.groups),
                **as_json(verdict),
            }
            for kind, recipe, bits, verdict in (
                ("uniform", uniform, flat_bits, flat),
                ("mixture", mixture, mixed_bits, mixed),
            )
        }
        details[name]["widths"] = {
            s.group.name: str(mixture.layout_for(s.group.tensors[0])) for s in drawn.groups
        }
    return bars, details


def pair(drawn: SensitivityMap, asked: Recipe) -> tuple[Recipe, Recipe]:
    """A uniform recipe by the map's method, and the gentlest mixture in its bytes."""
    menus: list[tuple[Choice, ...]] = [
        tuple(choice for choice in s.menu if choice.layout is not None) for s in drawn.groups
    ]
    same = []
    for s, menu in zip(drawn.groups, menus, strict=True):
        head = asked.head if s.group.name == "head" else None
        same.append(next(c for c in menu if c.layout == (head or asked.default)))
    mixed = gentlest(menus, sum(choice.bytes for choice in same))
    assert mixed is not None, "the uniform recipe itself is in its bytes"
    return (
        mixture_recipe(asked.name, drawn.groups, same, drawn.method),
        mixture_recipe(f"mixture for {asked.name}", drawn.groups, mixed, drawn.method),
    )


def map_bars(drawn: SensitivityMap, seconds: float) -> tuple[list[Bar], Any]:
    """Time and error of the map."""
    bars = [Bar("sensitivity map", seconds, LIMITS["map_s"], "s", at_least=False)]
    checks = [
        {"group": check.group, "layout": str(check.layout), "measured": check.harm, "predicted": predicted}
        for check, predicted in drawn.checked()
    ]
    harms = {s.group.name: {str(c.layout): c.harm for c in s.menu} for s in drawn.groups}
    return bars, {"seconds": seconds, "median_error": drawn.error, "checks": checks, "kl": harms}


def within_budget(settings: Settings) -> tuple[list[Bar], Any]:
    """`mix:1%` against uniform int8: bits, quality, decode speed in turn."""
    mixed = hasten.load(settings.model, "mix:1%", threads=settings.threads)
    wide = hasten.load(settings.model, "w8", threads=settings.threads)
    held = Reference(
        hasten.load(settings.model, "bf16", threads=settings.threads),
        windows(default_text().evaluation, mixed.tokenizer, tokens=TOKENS),
    )
    verdict = evaluate(mixed, held, Budget(0.01))
    ring = PromptRing(mixed.tokenizer.encode(bench_text(), add_special=False))
    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(settings.runs + 1):
        prompts = ring.round(number, RUNS_WORKLOAD)
        for model, into in ((mixed, speeds[0]), (wide, speeds[1])):
            into.append(run_once(model, prompts, RUNS_WORKLOAD.output).decode_tok_per_s)
    ratio = paired_ratio(speeds[0][1:], speeds[1][1:])
    bars = [
        Bar("mix:1%: upper end of the perplexity increase", verdict.ppl_increase_high, 0.01, "share", False),
        Bar("mix:1%: bits a weight, head included", mixed.bits_per_weight, LIMITS["bits"], "bits", False),
        Bar("mix:1%: decode over uniform int8", ratio.median, LIMITS["decode"], "times"),
    ]
    return bars, {"verdict": as_json(verdict), "decode_tok_per_s": speeds, "ratio": as_json(ratio)}


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", choices=["rtn", "gptq"], default="gptq")
    parser.add_argument("--parts", default="map,equal,budget")
    parser.add_argument("--uniform", default=UNIFORM)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    settings = Settings(given.model, "", given.threads, given.runs, None, None)
    parts = given.parts.split(",")
    bars: list[Bar] = []
    details: dict[str, Any] = {"method": given.method}
    try:
        if {"map", "equal"} & set(parts):
            mixtures = Mixtures(settings, given.method)
            drawn, seconds = mixtures.measured_map()
            more, details["map"] = map_bars(drawn, seconds)
            bars += more
            if "equal" in parts:
                more, details["equal_bits"] = equal_bits(mixtures, drawn, given.uniform.split(","))
                bars += more
            mixtures.source.close()
        if "budget" in parts:
            more, details["budget"] = within_budget(settings)
            bars += more
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return 1
    name = "mixture" if given.method == "gptq" else f"mixture-{given.method}"
    say(f"written: {record(name, settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
