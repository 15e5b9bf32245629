"""Decode and prefill of a model's real shapes with made-up weights: every format, 1, 2, 4 and 8 rows.

    python benchmarks/kernels.py                 # the chosen kernels over the best single instruction set
    python benchmarks/kernels.py --old FOLDER    # and over an older build: FOLDER holds its hasten package

Shapes are those of Qwen2.5-0.5B. A step is the whole decoder's, attention and head included, at a context of
256. Weights are constant bytes: integer kernels take the same time whatever the values. Every contender is a
process of its own that keeps its weights; they are timed in turn, and ratios are medians over the rounds of
one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORMATS = {
    "w4": (4, 32, True),
    "w5": (5, 32, True),
    "w6": (6, 32, True),
    "w8": (8, 32, True),
    "w4-g128": (4, 128, True),
    "w4-asym": (4, 32, False),
    "w6-g16": (6, 16, True),
    "bf16": (16, 32, True),
}
ROWS = (1, 2, 4, 8)
PROMPT = 256
WIDTH, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 896, 4864, 24, 14, 2, 64, 151936


class Child:
    """A process that times steps of one build with one setting."""

    def __init__(self, name: str, package: Path, isa: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, __file__, "--serve", str(package), "--isa", isa, "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> Any:
        """One question as a line of JSON; the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve(package: Path, isa: str, threads: int) -> None:
    """Answer questions on stdin: what isas there are, build a format, time steps."""
    native = load_native(package)
    if isa != "best":
        native.use_isa(isa)
    model: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        if "isas" in question:
            answer: Any = native.isas()
        elif "format" in question:
            model = None  # its memory first
            model = Model(native, FORMATS[question["format"]], threads)
            answer = choose(native, model.fmt, threads) if question.get("choose") else None
        else:
            answer = model.seconds(question["rows"], question["prompt"])
        print(json.dumps(answer), flush=True)


def load_native(package: Path) -> Any:
    """The compiled module of a hasten package in this folder."""
    found = sorted(package.glob("_native*.so"))
    if not found:
        raise SystemExit(f"no _native*.so in {package}")
    spec = importlib.util.spec_from_file_location("_native", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(native: Any, fmt: tuple[int, int, bool], threads: int) -> list[str]:
    """Measure and take ways as hasten does when a model is loaded."""
    from hasten.machine.probe import measure_ways

    if fmt[0] == 16:
        return []
    ways = measure_ways(native, fmt, WIDTH, threads)
    for row_class, way in enumerate(ways):
        native.choose_way(*fmt, row_class, way)
    return list(ways)


class Model:
    """A decoder with constant weights of one format."""

    def __init__(self, native: Any, fmt: tuple[int, int, bool], threads: int) -> None:
        import numpy as np

        self._np = np
        self.fmt = fmt
        frequencies = (1e6 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))).tolist()
        config = {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, "layers": LAYERS,
            "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "norm_eps": 1e-6,
            "activation": "silu", "score_scale": HEAD_DIM**-0.5, "attention_softcap": 0.0,
            "logit_softcap": 0.0, "embed_scale": 1.0, "window": 0, "sliding": [0] * LAYERS,
            "rope": [1] * LAYERS, "rope_global": frequencies, "rope_local": [], "rope_long": [],
            "rope_scale": 1.0, "rope_long_scale": 1.0,
        }  # fmt: skip
        self._pages = -(-(PROMPT + 64) // native.PAGE_TOKENS)
        self._decoder = native.Decoder(config, threads, 8 * self._pages, False)
        bits, group, symmetric = fmt
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes = {"q": (q, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH), "o": (WIDTH, q)}
        shapes |= {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
        ones = np.ones(WIDTH, np.float32)
        for layer in range(LAYERS):
            for name, (rows, cols) in shapes.items():
                self._matrix(native, f"layers.{layer}.{name}", rows, cols, bits, group, symmetric)
            for norm in ("attn_norm", "mlp_norm"):
                self._decoder.set_vector(f"layers.{layer}.{norm}", ones)
        self._matrix(native, "embed", VOCAB, WIDTH, bits, group, symmetric)
        self._decoder.set_vector("final_norm", ones)
        self._decoder.check()

    def _matrix(
        self, native: Any, name: str, rows: int, cols: int, bits: int, group: int, symmetric: bool
    ) -> None:
        panels = -(-rows // 16)
        padded = -(-cols // max(group, 32)) * max(group, 32)
        size = panels * padded * 32
        if bits != 16:
            size = panels * (padded // group) * (2 * bits * group + (32 if symmetric else 64))
        data = native.allocate(size)
        data[:] = 0x2C  # as fp16 or bf16, a small number
        self._decoder.set_linear(name, data, rows, cols, bits, group, symmetric)

    def seconds(self, rows: int, prompt: int) -> float:
        """Seconds of one decode step of `rows` sequences, head included; or of a prompt, if `prompt`."""
        np = self._np
        tables = np.arange(8 * self._pages, dtype=np.int32).reshape(8, self._pages)
        count, sequences, steps = (prompt, 1, 1) if prompt else (1, rows, 12)
        past = 0 if prompt else PROMPT
        tokens = np.arange(count * sequences, dtype=np.int32)
        started = time.perf_counter()
        for step in range(steps):
            hidden = self._decoder.step(
                tokens,
                np.full(sequences, count, np.int32),
                np.full(sequences, past + step, np.int32),
                tables[:sequences],
                np.zeros(sequences, np.uint8),
                np.arange(count * sequences, dtype=np.int32)[-sequences:],
                bool(prompt),
            )
            self._decoder.head(hidden)
        return (time.perf_counter() - started) / steps


def main() -> int:
    """Time every format in turn, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="folder of an older hasten package with its compiled module")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--peer-isas", nargs="*", help="sets to force, one a contender; all but scalar if left out"
    )
    parser.add_argument("--isa", default="best", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.isa, given.threads)
        return 0
    return compare(given)


def compare(given: argparse.Namespace) -> int:
    """Every contender in turn, round after round; bars from paired ratios."""
    from bar import Bar, Settings, record, say
    from hasten.bench.figures import paired_ratio

    new = Path(__file__).parents[1] / "src" / "hasten"
    if not list(new.glob("_native*.so")):
        from hasten import _native

        new = Path(_native.__file__).parent
    chosen = Child("chosen", new, "best", given.threads)
    forced = given.peer_isas or [isa for isa in chosen.ask(isas=1) if isa != "scalar"]
    others = [Child(isa, new, isa, given.threads) for isa in forced]
    if given.old:
        others.append(Child("old", given.old, "best", given.threads))
    bars, details = [], {}
    for fmt in given.formats:
        ways = chosen.ask(format=fmt, choose=True)
        for child in others:
            child.ask(format=fmt)
        for rows, prompt in [(rows, 0) for rows in ROWS] + [(1, PROMPT)]:
            seconds: dict[str, list[float]] = {child.name: [] for child in (chosen, *others)}
            for _ in range(given.runs + 1):
                for child in (chosen, *others):
                    seconds[child.name].append(child.ask(rows=rows, prompt=prompt))
            what = f"prefill of {prompt}" if prompt else f"{rows} rows"
            rates = {name: [(prompt or rows) / s for s in found[1:]] for name, found in seconds.items()}
            details[f"{fmt}, {what}"] = {"tok_per_s": rates, "ways": ways}
            say(
                f"{fmt:8} {what:14} " + "  ".join(f"{n} {statistics.median(r):.1f}" for n, r in rates.items())
            )
            details[f"{fmt}, {what}"]["over"] = {
                child.name: paired_ratio(rates["chosen"], rates[child.name]) for child in others
            }
            best = max(forced, key=lambda isa: statistics.median(rates[isa]))
            bars.append(Bar(f"{fmt}, {what}: chosen over {best}", ratio(rates, best), 0.98, "x"))
            if given.old:
                bars.append(Bar(f"{fmt}, {what}: chosen over old", ratio(rates, "old"), 1.0, "x"))
    for child in (chosen, *others):
        child.close()
    settings = Settings("Qwen2.5-0.5B shapes", "", given.threads, given.runs, None, None)
    os.environ.pop("HASTEN_ISA", None)
    say(f"written: {record('kernels', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Median of chosen over another, round by round."""
    return statistics.median(a / b for a, b in zip(rates["chosen"], rates[other], strict=True))


if __name__ == "__main__":
    sys.exit(main())
