"""What every kind of pruning costs in quality, with repair and without, and what gets faster here.

    python benchmarks/prune.py --calibration 8192 --tokens 4096
    python benchmarks/prune.py --only ffn --time

Each pruned model is packed as w8 and held against the source in bf16 on the evaluation text; its calibration
text is another. `--time` adds decode speed, the source in w8 measured again beside each. A smaller vocabulary
writes the text in other tokens: its figure is the loss of the whole text, against the source in w8, counted a
token of the source, and there is no KL.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from bar import Bar, Settings, record, say
from hasten.bench.measure import measure_model
from hasten.compress.calibration import Calibration, cut
from hasten.compress.prune import prune
from hasten.core import Budget, EngineOptions, Recipe, Workload
from hasten.engine.model import LanguageModel, load_packed
from hasten.errors import HastenError
from hasten.machine.cores import usable_cores
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import default_text, windows
from hasten.recipe import Pruning
from hasten.weights.packed import pack_model

CASES = (
    Pruning("ffn", 0.25),
    Pruning("heads", 0.25),
    Pruning("heads", 0.5),
    Pruning("layers", 0.125),
    Pruning("width", 0.125),
    Pruning("vocabulary", 0.5),
    Pruning("magnitude", 0.5),
    Pruning("wanda", 0.5),
    Pruning("sparsegpt", 0.5),
    Pruning("wanda", 0.5, (2, 4)),
    Pruning("sparsegpt", 0.5, (2, 4)),
)
ALWAYS_REPAIRED = ("sparsegpt", "vocabulary")  # one figure: choosing is repairing, or nothing can be repaired
PIECE = 2000  # characters of text read at once where token ids differ
TIMED = Workload(prompt=128, output=64)


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    source: Source
    calibration: Calibration
    reference: Reference  # the source in bf16 over the evaluation windows
    plain: LanguageModel  # the source in w8, what speed is held against
    threads: int
    runs: int  # timed runs a model; 0: none

    @classmethod
    def of(cls, given: argparse.Namespace) -> Bench:
        source, text = open_model(given.model), default_text()
        tokenizer = source.tokenizer()
        read = windows(text.evaluation, tokenizer, tokens=given.tokens)
        runs = given.runs if given.time else 0
        return cls(
            source,
            cut("default", text.calibration, tokenizer, tokens=given.calibration),
            Reference(packed(source, "bf16", given.threads), read),
            packed(source, "w8", given.threads),
            given.threads,
            runs,
        )


def main() -> int:
    """Measure all cases and write results/prune.json."""
    given = arguments()
    try:
        bench = Bench.of(given)
        say("the source in w8, nothing pruned")
        rows = [{"kind": "none", **quality(bench, bench.source, bench.plain)}]
        for pruning in cases(given.only):
            rows.append(measured(bench, pruning))
            print(line(rows[-1]), flush=True)
    except HastenError as wrong:
        say(f"{wrong}\nhint: {wrong.hint}")
        return wrong.exit_code
    settings = Settings(given.model, "", given.threads, bench.runs, None, None)
    details = {
        "calibration_tokens": bench.calibration.tokens,
        "calibration_sha256": bench.calibration.sha256,
        "cases": rows,
    }
    say(f"written: {record('prune', settings, bars(rows), details)}")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens of calibration text")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of evaluation text")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="*", default=[], help="kinds, such as ffn; default: all")
    parser.add_argument("--time", action="store_true", help="decode speed too; needs a quiet machine")
    parser.add_argument("--runs", type=int, default=5, help="timed runs a model")
    return parser.parse_args()


def cases(only: list[str]) -> list[Pruning]:
    """All cases, each unrepaired first where that is another model."""
    found = []
    for case in CASES:
        if not only or case.kind in only:
            if case.kind not in ALWAYS_REPAIRED:
                found.append(Pruning(case.kind, case.amount, case.pattern, repair=False))
            found.append(case)
    return found


def measured(bench: Bench, pruning: Pruning) -> dict[str, Any]:
    """One row of the table."""
    name = f"{pruning.kind} {pruning.amount:g}{' repaired' if pruning.repair else ''}"
    found = prune(
        bench.source, pruning, bench.calibration, lambda done, total: say(f"{name}: {done} of {total}")
    )
    model = packed(found.source, "w8", bench.threads)
    row = {
        "kind": pruning.kind,
        "amount": pruning.amount,
        "pattern": pruning.pattern,
        "repaired": pruning.repair and pruning.kind != "vocabulary",
        "weights_left": found.weights_after / found.weights_before,
        "bytes_left": found.bytes_after / found.bytes_before,
        "gets_faster": found.gets_faster,
        "because": found.because,
        "parts": found.parts,
        **quality(bench, found.source, model),
    }
    if bench.runs:
        plain = measure_model(bench.plain, TIMED, bench.runs).decode_tok_per_s
        ours = measure_model(model, TIMED, bench.runs).decode_tok_per_s
        row |= {"decode_tok_per_s": ours, "source_tok_per_s": plain, "faster": ours.median / plain.median}
    model.close()
    gc.collect()
    return row


def quality(bench: Bench, source: Source, model: LanguageModel) -> dict[str, Any]:
    """Perplexity increase, KL and agreement against the source in bf16."""
    if source.config.vocab == bench.source.config.vocab:
        verdict = evaluate(model, bench.reference, Budget())
        return {
            "ppl_increase": verdict.ppl_increase,
            "ppl_increase_low": verdict.ppl_increase_low,
            "ppl_increase_high": verdict.ppl_increase_high,
            "kl_mean": verdict.kl_mean,
            "top1_agreement": verdict.top1_agreement,
            "tokens": verdict.tokens,
        }
    text = default_text().evaluation
    wanted = sum(window.targets.size for window in bench.reference.windows)
    ours = theirs = tokens = 0.0
    for at in range(0, len(text), PIECE):
        piece = "\n" + text[at : at + PIECE].strip()  # the same first token, which nobody predicts
        ours += loss(model, piece)[0]
        nll, count = loss(bench.plain, piece)
        theirs, tokens = theirs + nll, tokens + count
        if tokens >= wanted:
            break
    return {"ppl_increase": float(np.expm1((ours - theirs) / tokens)), "kl_mean": None, "tokens": int(tokens)}


def loss(model: LanguageModel, piece: str) -> tuple[float, int]:
    """Nats of a text's tokens but the first, and how many those are."""
    ids = np.array(model.tokenizer.encode(piece, add_special=False), np.int32)
    hidden, total = model.hidden(ids[:-1]), 0.0
    for at in range(0, len(hidden), 128):
        logits = model.logits_of(np.ascontiguousarray(hidden[at : at + 128])).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(logits)), ids[1 + at : 1 + at + len(logits)]]
        total += float((np.log(np.exp(logits).sum(axis=-1)) - chosen).sum())
    return total, len(ids) - 1


def packed(source: Source, recipe: str, threads: int) -> LanguageModel:
    """A model ready to run, from memory."""
    model = pack_model(source, Recipe.parse(recipe), threads)
    return load_packed(model, source, EngineOptions(threads=threads, context=1024, max_sequences=1))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    pattern = "" if row["pattern"] is None else " {}:{}".format(*row["pattern"])
    text = (
        f"{row['kind']}{pattern} {row['amount']:g}{' repaired' if row['repaired'] else ''}: perplexity "
        f"{row['ppl_increase']:+.1%}, KL {'-' if row['kl_mean'] is None else format(row['kl_mean'], '.4f')}, "
        f"{row['weights_left']:.1%} of the weights"
    )
    if "faster" in row:
        text += f", decode {row['faster']:.2f}x ({row['decode_tok_per_s'].median:.1f} tok/s)"
    return text


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """A quarter of the FFN channels, repaired, against no repair."""
    kl = {row["repaired"]: row["kl_mean"] for row in rows if row["kind"] == "ffn"}
    if not {False, True} <= kl.keys():
        return []
    return [Bar("25 % of FFN channels: KL repaired / not", kl[True] / kl[False], 1.0, "x", at_least=False)]


if __name__ == "__main__":
    sys.exit(main())
