r"""Our calibrated 4 bits against the quantisers of others: same values, same text, same judge.

    python benchmarks/quantisers.py --peer llm-compressor=PYTHON --peer autoround=PYTHON \
        --peer llama.cpp=PYTHON
    python benchmarks/quantisers.py --only llama.cpp:q4_0 llama.cpp:q4_k_m --recipes w4-head8

Every peer gets the model in bf16 and the windows our own calibration reads (16,384 tokens in windows of 512,
or all the text has), and makes 4 bits in groups of 32, symmetric, of all linear layers; head and embedding
are int8 in groups of 32 for everybody. Q4_K_M is as llama.cpp makes it, which means more bits where 256 does
not divide a layer's inputs: the bar for it is held by the best of our recipes that has no more bits. All
results are opened by our engine, values kept, and read 8,192 tokens of the evaluation text with int8
activations against the model in bf16.

What a peer made is kept under --work, so that a second run only judges. Results from a busy machine are as
good as from a quiet one, times are not. Exit code 1: a bar was missed or a contender failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hasten
from bar import Bar, Settings, record, say
from hasten.cache import cache_dir
from hasten.core import Budget
from hasten.engine.model import LanguageModel
from hasten.errors import HastenError, UsageError
from hasten.models.open import open_model
from hasten.quality.divergence import Reference, evaluate
from hasten.quality.text import WINDOW, default_text, windows
from hasten.weights.tensors import TYPES
from quantisers_material import prepare
from quantisers_peers import DEFAULT, PEERS, TOOLS, made

RECIPES = ("w4-head8", "w4-head8-gptq", "w4-best", "w5-head8-best")
"""The last has as many bits as Q4_K_M of a model whose inputs 256 does not divide."""
BUDGET = {"ppl_increase": 0.03, "kl_mean": 0.035}
"""What the best of ours at 4 bits must keep, whatever the others do."""
ROUNDING = 0.01
"""Bits a weight that count as none."""


@dataclass(frozen=True)
class Judged:
    """A contender's figures; `bits` are a file's own where it is GGUF, what our engine stores otherwise."""

    name: str
    is_ours: bool
    bits: float
    bits_in_engine: float
    ppl_increase: float
    ppl_increase_low: float
    ppl_increase_high: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    making: Mapping[str, Any]  # versions, settings, seconds; empty for ours

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.name:<26} {self.bits:5.2f} {self.ppl_increase:+8.2%} {self.kl_mean:9.5f} "
            f"{self.kl_p99:8.4f} {self.top1_agreement:7.1%}"
        )


HEAD = f"{'':<26} {'bits':>5} {'ppl':>8} {'KL':>9} {'KL p99':>8} {'top-1':>7}"


def main() -> int:
    """Quantise, judge, print the table, write results/quantisers.json."""
    given = arguments()
    settings = Settings(given.model, "", given.threads, 1, None, None)
    try:
        tools = dict(tool_of(text) for text in given.peer)
        judged, failed, details = measure(settings, tools, given)
    except HastenError as wrong:
        say(f"failed: {wrong.message}" + (f"\nhint: {wrong.hint}" if wrong.hint else ""))
        return 1
    print("\n".join([HEAD, *(one.line() for one in sorted(judged, key=lambda one: one.kl_mean))]))
    bars = bars_of(judged)
    say(f"written: {record('quantisers', settings, bars, {**details, 'failed': failed, 'judged': judged})}")
    return 0 if bars and all(bar.passed for bar in bars) and not failed else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="TOOL=PYTHON",
        help=f"where it is; tools: {', '.join(TOOLS)}",
    )
    parser.add_argument(
        "--only", nargs="*", choices=[*PEERS], default=[*DEFAULT], help="peers to compare with"
    )
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES], help="ours")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "quantisers")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def tool_of(text: str) -> tuple[str, str]:
    """(tool, Python) of TOOL=PYTHON.

    Raises:
        UsageError: no such tool, or no Python.
    """
    name, _, python = text.partition("=")
    if name not in TOOLS or not python:
        raise UsageError(
            f"--peer {text}: no tool and Python", hint=f"TOOL=PYTHON with one of {', '.join(TOOLS)}"
        )
    return name, python


def measure(
    settings: Settings, tools: Mapping[str, str], given: argparse.Namespace
) -> tuple[list[Judged], dict[str, str], dict[str, Any]]:
    """Everybody's figures, who failed and why, and what it was measured on."""
    text = default_text()
    material, calibration = prepare(settings.model, text, given.work, settings.threads)
    say("the source in bf16: loading")
    source = hasten.load(settings.model, "bf16", threads=settings.threads, context=WINDOW)
    reference = Reference(source, windows(text.evaluation, source.tokenizer, tokens=given.tokens))
    judged: list[Judged] = []
    failed: dict[str, str] = {}
    for name in [*given.recipes, *given.only]:
        try:
            judged.append(contender(name, settings, reference, material, tools))
            say(judged[-1].line())
        except HastenError as wrong:
            failed[name] = wrong.message
            say(f"{name} failed: {wrong.message}" + (f"\nhint: {wrong.hint}" if wrong.hint else ""))
    details = {
        "text": {"name": text.name, "sha256": text.sha256},
        "calibration": {"tokens": calibration.tokens, "windows": list(calibration.ids.shape)},
        "evaluation_tokens": sum(window.targets.size for window in reference.windows),
    }
    return judged, failed, details


def contender(name: str, settings: Settings, reference: Reference, material: Any, tools: Any) -> Judged:
    """Make and judge one: a peer by its name, or a recipe of ours."""
    peer = PEERS.get(name)
    if peer is None:
        model = hasten.load(settings.model, name, threads=settings.threads, context=WINDOW)
        return judge(name, model, reference, None, {})
    path, making = made(peer, material, tools, settings.threads)
    model = hasten.load(path, peer.recipe, threads=settings.threads, context=WINDOW, store=False)
    return judge(name, model, reference, bits_of(path), making)


def judge(
    name: str, model: LanguageModel, reference: Reference, bits: float | None, making: Mapping[str, Any]
) -> Judged:
    """Read the evaluation windows; the model is let go."""
    say(f"{name}: reading the evaluation text")
    try:
        verdict = evaluate(model, reference, Budget(BUDGET["ppl_increase"]))
        shown = {key: value for key, value in making.items() if key != "digest"}
        return Judged(
            name=name,
            is_ours=not making,
            bits=bits if bits is not None else model.bits_per_weight,
            bits_in_engine=model.bits_per_weight,
            ppl_increase=verdict.ppl_increase,
            ppl_increase_low=verdict.ppl_increase_low,
            ppl_increase_high=verdict.ppl_increase_high,
            kl_mean=verdict.kl_mean,
            kl_p99=verdict.kl_p99,
            top1_agreement=verdict.top1_agreement,
            making=shown,
        )
    finally:
        model.close()


def bits_of(file: str | Path) -> float | None:
    """Stored bits a weight of a GGUF file, head included; None for a folder."""
    path = Path(file)
    if path.suffix != ".gguf":
        return None
    source = open_model(path)
    held = [source.tensors[name] for name in source.config.linear_shapes()]
    stored = sum(TYPES[tensor.dtype].bytes_of(tensor.shape) for tensor in held)
    return 8 * stored / source.config.weights_stored


def bars_of(judged: Sequence[Judged]) -> list[Bar]:
    """The best of ours at 4 bits against the budget, and against each peer the best with no more bits."""
    ours = [one for one in judged if one.is_ours]
    if not ours:
        return []
    fewest = min(one.bits for one in ours)
    best = _best(ours, fewest)
    bars = [
        Bar(f"{best.name}: {key}", asdict(best)[key], limit, "", at_least=False)
        for key, limit in BUDGET.items()
    ]
    for peer in judged:
        if not peer.is_ours:
            rival = _best(ours, max(peer.bits, fewest))
            bars.append(
                Bar(f"{rival.name} / {peer.name}: KL", rival.kl_mean / peer.kl_mean, 1.0, "x", at_least=False)
            )
    return bars


def _best(ours: Sequence[Judged], bits: float) -> Judged:
    return min((one for one in ours if one.bits <= bits + ROUNDING), key=lambda one: one.kl_mean)


if __name__ == "__main__":
    sys.exit(main())
