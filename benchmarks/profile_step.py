"""Where a step's time goes: seconds by operation of the native decoder, for prefill and for decode.

python benchmarks/profile_step.py demo --recipe w4 --threads 2
"""

from __future__ import annotations

import argparse
import sys
import time

import hasten
from hasten.bench.workloads import PromptRing, default_text
from hasten.runtime.sampling import SamplingOptions


def main() -> int:
    """Profile one prompt and its continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    given = parser.parse_args()
    context = given.prompt + given.output
    model = hasten.load(given.model, recipe=given.recipe, threads=given.threads, context=context)
    if not hasattr(model.executor, "profile"):
        print("this build has no profile", file=sys.stderr)
        return 1
    ring = PromptRing(model.tokenizer.encode(default_text(), add_special=False))
    options = SamplingOptions(ignore_eos=True)
    list(model.stream(ring.prompt(0, given.prompt), 8, options))  # warm-up
    model.executor.profile()
    tokens = model.stream(ring.prompt(1, given.prompt), given.output, options)
    started = time.perf_counter()
    next(tokens)
    wall = time.perf_counter() - started
    print(f"prefill of {given.prompt}: {1000 * wall:.1f} ms, {given.prompt / wall:.1f} tokens a second")
    _show(wall, 1, model.executor.profile())
    started = time.perf_counter()
    steps = sum(1 for _ in tokens)
    wall = time.perf_counter() - started
    print(f"decode: {1000 * wall / steps:.3f} ms a token, {steps / wall:.1f} tokens a second")
    _show(wall, steps, model.executor.profile())
    return 0


def _show(wall_s: float, steps: int, seconds: dict[str, float]) -> None:
    rest = wall_s - sum(seconds.values())
    for name, value in sorted({**seconds, "outside": rest}.items(), key=lambda item: -item[1]):
        print(f"  {name:<12} {1000 * value / steps:9.3f} ms  {100 * value / wall_s:5.1f} %")


if __name__ == "__main__":
    sys.exit(main())
