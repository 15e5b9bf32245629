"""Methods at 4 bits, judged on text that none of them saw, with the time and memory each takes.

    python benchmarks/quantise.py
    python benchmarks/quantise.py --recipes w4-head8 w4-head8-gptq w4-best

Every recipe is made by `hasten compress` in a process of its own. Statistics of earlier runs are kept in the
cache folder: for the time of a first run give an empty one (HASTEN_CACHE=FOLDER, with the demo model in it).
Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hasten
from bar import Bar, Settings, record, say
from hasten.core import Budget, as_json
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import WINDOW, default_text, windows

RECIPES = ("w4-head8", "w4-asym-head8-hqq", "w4-head8-awq", "w4-head8-gptq", "w4-head8-awq-gptq", "w4-best")
GPTQ, BEST = "w4-head8-gptq", "w4-best"


def main() -> int:
    """Make, judge, print the table, write results/quantise.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    settings = Settings(given.model, "", given.threads, 1, None, None)
    source = hasten.load(given.model, "bf16", threads=given.threads, context=WINDOW)
    text = default_text()
    held = Reference(source, windows(text.evaluation, source.tokenizer, tokens=given.tokens))
    rows: dict[str, dict[str, Any]] = {}
    for recipe in given.recipes:
        rows[recipe] = made(settings, recipe, held)
        say(line(recipe, rows[recipe]))
    details = {"text": {"name": text.name, "sha256": text.sha256}, "rows": rows}
    bars = bars_of(rows)
    say(f"written: {record('quantise', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


def made(settings: Settings, recipe: str, held: Reference) -> dict[str, Any]:
    """One recipe by `hasten compress`, and its verdict."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "made.hasten"
        command = [sys.executable, "-m", "hasten", "compress", settings.model, "--recipe", recipe]
        command += ["--out", str(out), "--threads", str(settings.threads), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout)
        model = hasten.load(out, threads=settings.threads, context=WINDOW)
        verdict = evaluate(model, held, Budget())
        model.close()
    kept = {key: told[key] for key in ("bits_per_weight", "seconds", "peak_rss_bytes")}
    return {**kept, "verdict": as_json(verdict)}


def line(recipe: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    verdict, peak = row["verdict"], row.get("peak_rss_bytes")
    cost = f" {row['seconds']:6.0f} s {peak / 1e9:5.2f} GB" if peak else ""
    return (
        f"{recipe:<20} {row['bits_per_weight']:5.2f} bits {verdict['ppl_increase']:+8.2%} "
        f"KL {verdict['kl_mean']:8.5f} p99 {verdict['kl_p99']:7.4f} "
        f"top-1 {verdict['top1_agreement']:6.1%}{cost}"
    )


def bars_of(rows: dict[str, dict[str, Any]]) -> list[Bar]:
    """The issue's limits, for the recipes that were made."""
    bars = []
    if BEST in rows:
        verdict = rows[BEST]["verdict"]
        bars.append(Bar(f"{BEST}: perplexity increase", verdict["ppl_increase"], 0.03, "", at_least=False))
        bars.append(Bar(f"{BEST}: mean KL", verdict["kl_mean"], 0.035, "nats", at_least=False))
    for name in (GPTQ, BEST):
        if name in rows:
            bars.append(Bar(f"{name}: time", rows[name]["seconds"] / 60, 8, "min", at_least=False))
            peak = rows[name]["peak_rss_bytes"] / 1e9
            bars.append(Bar(f"{name}: peak memory", peak, 4, "GB", at_least=False))
    return bars


if __name__ == "__main__":
    raise SystemExit(main())
