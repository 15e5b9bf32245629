"""What keys and values in int8 cost over bf16 ones: divergence and bytes, bf16 weights on both sides.

    python benchmarks/int8_cache.py

Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse

import hasten
from bar import Bar, Settings, record, say
from hasten.core import Budget, as_json
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import WINDOW, default_text, windows


def main() -> int:
    """Judge, print, write results/int8_cache.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    plain, small = (
        hasten.load(given.model, recipe, threads=given.threads, context=WINDOW)
        for recipe in ("bf16", "bf16-kv8")
    )
    text = default_text()
    held = Reference(plain, windows(text.evaluation, plain.tokenizer, tokens=given.tokens))
    verdict = evaluate(small, held, Budget())
    share = small.executor.page_bytes / plain.executor.page_bytes
    bars = [
        Bar("int8 keys and values: mean KL over bf16", verdict.kl_mean, 0.002, "nats", at_least=False),
        Bar("int8 keys and values: bytes over bf16", share, 0.54, "x", at_least=False),
    ]
    details = {"text": {"name": text.name, "sha256": text.sha256}, "verdict": as_json(verdict)}
    settings = Settings(given.model, "", given.threads, 1, None, None)
    say(f"written: {record('int8_cache', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    raise SystemExit(main())
