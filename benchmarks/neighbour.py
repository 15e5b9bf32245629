"""Decode beside one other busy process over decode on a quiet machine, in turn, in one run.

    python benchmarks/neighbour.py all                 # w4 of the demo model, 2 threads
    python benchmarks/neighbour.py all --isa avx2      # with another instruction set

The neighbour is a loop of plain Python with normal priority. Rounds alternate between quiet and busy; the
ratio is that of medians with its interval, and the bar is held against its lower end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import hasten
from bar import Bar, Benchmark, Settings, say
from bar_command import asked, measured
from hasten.bench.figures import paired_ratio
from hasten.bench.measure import PromptRing, default_text, run_once

PROMPT, OUTPUT = 128, 96


def neighbour(settings: Settings) -> tuple[list[Bar], Any]:
    """One busy process on the cores that the engine uses."""
    model = hasten.load(settings.model, recipe="w4", threads=settings.threads, context=PROMPT + OUTPUT)
    ring = PromptRing(model.tokenizer.encode(default_text(), add_special=False))
    quiet: list[float] = []
    busy: list[float] = []
    for number in range(2 * settings.runs + 2):
        sample = beside(number % 2, lambda n=number: run_once(model, [ring.prompt(n, PROMPT)], OUTPUT))
        if number > 1:  # one warm-up each
            (busy if number % 2 else quiet).append(sample.decode_tok_per_s)
            say(f"{'busy ' if number % 2 else 'quiet'} {sample.decode_tok_per_s:.1f} tok/s")
    model.close()
    ratio = paired_ratio(busy, quiet)
    bars = [Bar("w4: decode beside one busy process over quiet, lower end", ratio.low, 0.55, "x")]
    return bars, {"ratio": ratio, "quiet_tok_per_s": quiet, "busy_tok_per_s": busy}


def beside(processes: int, work: Any) -> Any:
    """What `work` gives while so many processes are busy."""
    loop = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(loop) for _ in range(processes)]
    try:
        time.sleep(0.5)
        return work()
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> int:
    """Measure and write the record."""
    known: dict[str, Benchmark] = {"neighbour": neighbour}
    _, settings = asked(__doc__, known, "", "not used")
    return 0 if measured("neighbour", neighbour, settings) else 1


if __name__ == "__main__":
    sys.exit(main())
